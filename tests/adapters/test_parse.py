"""One good adapter, and everything that can be wrong with it: each refused under its own name."""

import json
import math
import time

import pytest
import torch
from safetensors.torch import save

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.source import RawAdapter
from fader_adapters.spec import EXTENT_ALIGN
from tests.adapters.peft_files import (
    BASE,
    LAYERS,
    make_base,
    make_config,
    make_parsed,
    make_raw,
    make_tensors,
    read,
)

Q0 = "model.layers.0.self_attn.q_proj"
PREFIX = "base_model.model."


def key(path, factor):
    return f"{PREFIX}{path}.lora_{factor}.weight"


def test_the_layout_holds_a_row_major_and_b_rank_major():
    parsed, tensors = make_parsed(), make_tensors()
    flat = torch.full((parsed.spec.numel,), math.nan)
    parsed.write(flat)
    assert len(parsed.spec.deltas) == 3 * LAYERS
    for delta in parsed.spec.deltas:
        path = BASE.linears[delta.linear].path
        a, b = tensors[key(path, "A")], tensors[key(path, "B")]
        assert torch.equal(flat[delta.a_offset :][: a.numel()].view(4, -1), a)
        assert torch.equal(flat[delta.b_offset :][: b.numel()].view(4, -1), b.t())
        assert delta.a_offset % EXTENT_ALIGN == delta.b_offset % EXTENT_ALIGN == 0
        assert delta.scale == 2.0
    assert flat.isfinite().all()


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype_is_cast_to_the_arena_dtype(stored, dtype):
    tensors = make_tensors(dtype=stored)
    parsed = read(make_raw(tensors=tensors), dtype=dtype)
    flat = torch.empty(parsed.spec.numel, dtype=dtype)
    parsed.write(flat)
    delta = parsed.spec.by_linear[BASE.index_of[Q0]]
    assert torch.equal(
        flat[delta.a_offset :][: 4 * 64].view(4, 64), tensors[key(Q0, "A")].to(dtype)
    )
    assert parsed.report.source_dtypes == (
        {torch.float32: "F32", torch.float16: "F16"}.get(stored, "BF16"),
    )


def test_the_report_says_what_was_found():
    config = make_config(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 32})
    ranks = {linear.path: 2 for linear in BASE.linears if "q_proj" in linear.path}
    report = read(make_raw(config, make_tensors(ranks=ranks))).report
    assert (report.matched, report.total) == (9, 10)
    assert report.targets == ("down_proj", "q_proj", "v_proj")
    assert report.ranks == (2, 4)
    assert report.alphas == (8.0, 32.0)
    assert report.scales == (2.0, 4.0, 8.0)
    assert (report.peft_type, report.base_name) == ("LORA", "tiny/base")


def test_the_delta_norm_is_that_of_the_scaled_product():
    report = make_parsed().report
    tensors = make_tensors()
    for module in report.modules:
        delta = 2.0 * tensors[key(module.path, "B")] @ tensors[key(module.path, "A")]
        assert module.delta_norm == pytest.approx(delta.norm().item(), rel=1e-4)
    assert report.delta_norm == pytest.approx(math.hypot(*(m.delta_norm for m in report.modules)))


def test_rslora_divides_by_the_root_of_the_rank():
    parsed = read(make_raw(make_config(use_rslora=True)))
    assert {delta.scale for delta in parsed.spec.deltas} == {8 / math.sqrt(4)}


def test_versions_depend_on_weights_and_effective_config_only():
    good = make_parsed().spec.version
    assert (
        read(make_raw(make_config(lora_dropout=0.5, peft_version="0.5", revision="x"))).spec.version
        == good
    )
    assert read(make_raw(make_config(alpha_pattern={"nothing": 3}))).spec.version == good
    assert read(make_raw(), dtype=torch.bfloat16).spec.version == good
    others = [
        make_raw(make_config(lora_alpha=9)),
        make_raw(make_config(use_rslora=True)),
        make_raw(make_config(alpha_pattern={Q0: 9})),
        make_raw(tensors=make_tensors(seed=1)),
    ]
    versions = {read(raw).spec.version for raw in others}
    assert len(versions | {good}) == 5


BAD_CONFIGS = {
    "dora": {"use_dora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa iterations": {"init_lora_weights": "pissa_niter_16"},
    "olora": {"init_lora_weights": "OLoRA"},
    "loftq": {"init_lora_weights": "loftq"},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "unknown init": {"init_lora_weights": "novel"},
    "init number": {"init_lora_weights": 1},
    "peft_type": {"peft_type": "ADALORA"},
    "no peft_type": {"peft_type": ...},
    "task": {"task_type": "SEQ_CLS"},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "replication": {"layer_replication": [[0, 2]]},
    "parameters": {"target_parameters": ["experts.gate"]},
    "tokens": {"trainable_token_indices": [1]},
    "alora": {"alora_invocation_tokens": [1]},
    "megatron": {"megatron_config": {"a": 1}},
    "arrow": {"arrow_config": {"top_k": 1}},
    "kasa": {"kasa_config": {"beta": 1}},
    "tying": {"ensure_weight_tying": True},
    "unknown field": {"use_magic": True},
    "unknown number": {"magic": 0},
    "rank zero": {"r": 0},
    "rank negative": {"r": -1},
    "rank boolean": {"r": True},
    "rank float": {"r": 4.0},
    "rank missing": {"r": ...},
    "alpha zero": {"lora_alpha": 0},
    "alpha text": {"lora_alpha": "8"},
    "alpha huge": {"lora_alpha": 1e9},
    "alpha missing": {"lora_alpha": ...},
    "rslora text": {"use_rslora": "yes"},
    "fan text": {"fan_in_fan_out": "no"},
    "targets null": {"target_modules": None},
    "targets empty": {"target_modules": []},
    "targets numbers": {"target_modules": [1]},
    "targets object": {"target_modules": {"q_proj": 1}},
    "patterns list": {"rank_pattern": ["q_proj"]},
    "pattern rank": {"rank_pattern": {"q_proj": "4"}},
    "pattern alpha": {"alpha_pattern": {"q_proj": None}},
    "layers text": {"layers_to_transform": "0"},
    "layers with pattern": {"target_modules": ".*_proj", "layers_to_transform": [0]},
    "layers_pattern regex": {"layers_pattern": ["(a+)+"], "layers_to_transform": [0, 1, 2]},
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_are_not_implemented_exactly_are_invalid(name):
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        read(make_raw(make_config(**BAD_CONFIGS[name])))


def test_initialisations_that_change_the_base_name_the_remedy():
    with pytest.raises(AdapterInvalid, match="path_initial_model_for_weight_conversion"):
        read(make_raw(make_config(init_lora_weights="pissa")))


@pytest.mark.parametrize(
    "config",
    [b"", b"[]", b"{", b'"text"', b"\xff\xfe", b'{"r":NaN}', b"[" * 100_000, b'{"r":1,"r":1}',
     b'{"r":' + b"1" * 5000 + b"}"],
    ids=range(9),
)  # fmt: skip
def test_configs_that_are_not_sound_json_are_invalid(config):
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json"):
        read(RawAdapter(config, make_raw().weights, "test"))


@pytest.mark.parametrize(
    "changes",
    [
        {"fan_in_fan_out": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": None},
        {"use_magic": None},
        {"use_magic": False},
        {"magic": []},
        {"task_type": None},
        {"lora_alpha": 8.5},
        {"modules_to_save": []},
        {
            "bias": ...,
            "use_rslora": ...,
            "use_dora": ...,
            "alpha_pattern": ...,
            "rank_pattern": ...,
        },
        {"loftq_config": {}, "runtime_config": {"ephemeral_gpu_offload": False}},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
    ],
)
def test_configs_that_change_nothing_are_accepted(changes):
    assert read(make_raw(make_config(**changes))).report.matched == 9


TARGETS = {
    "full paths": [f"model.layers.{n}.{m}" for n in range(LAYERS) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")],
    "last names": ["q_proj", "v_proj", "down_proj"],
    "two names": ["self_attn.q_proj", "v_proj", "mlp.down_proj"],
    "pattern": r".*\.(q_proj|v_proj|down_proj)",
    "all-linear": "all-linear",
    "All-Linear": "All-Linear",
    "broad pattern": r"model\..*proj",
}  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_every_way_to_name_the_same_targets_is_the_same_adapter(name):
    parsed = read(make_raw(make_config(target_modules=TARGETS[name])))
    assert parsed.spec == make_parsed().spec


def test_all_linear_may_include_the_output_head_and_must_include_the_layers():
    with_head = make_tensors(targets=("q_proj", "v_proj", "down_proj", "lm_head"))
    config = make_config(target_modules="all-linear")
    assert read(make_raw(config, with_head)).report.matched == 10
    with pytest.raises(AdapterInvalid, match="partial"):
        read(make_raw(config, make_tensors(targets=("q_proj", "v_proj"))))


def test_filters_select_as_in_peft():
    q_only = make_config(target_modules=["q_proj"], layers_to_transform=[0, 2])
    tensors = {k: t for k, t in make_tensors(targets=["q_proj"]).items() if ".1." not in k}
    assert read(make_raw(q_only, tensors)).report.matched == 2
    assert read(make_raw({**q_only, "layers_pattern": "layers"}, tensors)).report.matched == 2
    with pytest.raises(AdapterInvalid, match="does not select"):
        read(make_raw({**q_only, "layers_pattern": ["blocks"]}, tensors))
    with pytest.raises(AdapterInvalid, match="partial"):
        read(make_raw({**q_only, "layers_to_transform": [0, 1, 2]}, tensors))
    for exclude in (
        ["model.layers.1.self_attn.q_proj"],
        ["1.self_attn.q_proj"],
        r".*layers\.1\..*",
    ):
        config = make_config(target_modules=["q_proj"], exclude_modules=exclude)
        assert read(make_raw(config, tensors)).report.matched == 2
        with pytest.raises(AdapterInvalid, match="does not select"):
            read(make_raw(config, make_tensors(targets=["q_proj"])))


@pytest.mark.parametrize(
    "pattern",
    [{"q_proj": 2}, {"self_attn.q_proj": 2}, {r".*q_proj": 2}, {r"layers\.\d+\.self_attn\.q_proj": 2},
     {"q.proj": 2}, {"q_proj|k_proj": 2}, {"^model.layers.[012].self_attn.q_proj": 2},
     {"q_proj": 2, ".*": 4}],
    ids=str,
)  # fmt: skip
def test_rank_and_alpha_patterns_match_as_in_peft(pattern):
    ranks = {linear.path: 2 for linear in BASE.linears if "q_proj" in linear.path}
    tensors = make_tensors(ranks=ranks)
    alphas = {k: v * 10 for k, v in pattern.items()}
    parsed = read(make_raw(make_config(rank_pattern=pattern, alpha_pattern=alphas), tensors))
    assert {d.rank for d in parsed.spec.deltas} == {2, 4}
    assert parsed.spec.by_linear[BASE.index_of[Q0]].scale == 10.0
    with pytest.raises(AdapterInvalid, match="declares rank"):
        read(make_raw(make_config(), tensors))


@pytest.mark.parametrize("pattern", ["roj", "^q_proj", "proj", "layers.0.q_proj", "q_pro"])
def test_patterns_that_peft_would_not_match_do_not_match(pattern):
    with pytest.raises(AdapterInvalid, match="declares rank 8"):
        read(make_raw(make_config(r=8, rank_pattern={pattern: 4})))


BOMB = "(a+)+" * 3 + "(?:(?:.*)*.*)*x" + "(.*a){20}"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_pattern_bombs_are_answered_in_bounded_time(field):
    start = time.perf_counter()
    with pytest.raises(AdapterInvalid):
        read(
            make_raw(make_config(**{field: BOMB if field == "target_modules" else r"(?=(\w*)*)\1"}))
        )
    with pytest.raises(AdapterInvalid):
        read(make_raw(make_config(rank_pattern={BOMB: 4, "(": 4})))
    assert time.perf_counter() - start < 3


def test_unsafe_patterns_say_what_to_do():
    for changes in (
        {"target_modules": r"(a)\1"},
        {"rank_pattern": {r"(?<=a)b": 4}},
        {"alpha_pattern": {"a)|(b": 4}},
    ):
        with pytest.raises(AdapterInvalid, match="list the module names"):
            read(make_raw(make_config(**changes)))


def test_other_tensor_names_of_the_same_modules_are_accepted():
    good = make_parsed().spec.deltas
    for name in (
        "base_model.model.{path}.lora_{factor}.default.weight",
        "base_model.model.{path}.lora_{factor}.tone.weight",
        "{path}.lora_{factor}.weight",
    ):
        assert read(make_raw(tensors=make_tensors(key=name))).spec.deltas == good


def test_paths_of_wrapped_and_headless_models_are_accepted_when_unambiguous():
    good = make_parsed().spec.deltas
    prefixes = ["model.", "", "model.language_model.", "language_model.model."]
    for theirs in prefixes:
        for ours in prefixes:
            tensors = make_tensors(make_base(theirs, head=False))
            assert read(make_raw(tensors=tensors), make_base(ours)).spec.deltas == good
    with_head = make_tensors(make_base("model.language_model."), targets=("q_proj", "lm_head"))
    config = make_config(target_modules=["q_proj", "lm_head"])
    assert read(make_raw(config, with_head)).report.matched == LAYERS + 1
    with pytest.raises(AdapterMismatch, match="another base"):
        read(make_raw(tensors=make_tensors(make_base("transformer.h."))))


def test_an_adapter_that_fits_two_places_is_a_mismatch():
    two = make_base("model.").linears + make_base("language_model.", head=False).linears
    base = type(BASE)(two, BASE.fingerprint, "test")
    with pytest.raises(AdapterMismatch, match="several places"):
        read(make_raw(tensors=make_tensors(make_base("", head=False))), base)


def renamed(old, new):
    return {k.replace(old, new): t for k, t in make_tensors().items()}


def changed(path, factor, change):
    tensors = make_tensors()
    tensors[key(path, factor)] = change(tensors[key(path, factor)])
    return {k: t for k, t in tensors.items() if t is not None}


def extra(name, *shape):
    return {**make_tensors(), name: torch.ones(*shape or (1,))}


BAD_TENSORS = {
    "renamed module": (renamed("q_proj", "query"), AdapterMismatch, "another base"),
    "other layers": (renamed(".2.", ".7."), AdapterMismatch, "another base"),
    "no B": (changed(Q0, "B", lambda t: None), AdapterInvalid, "no lora_B"),
    "no A": (changed(Q0, "A", lambda t: None), AdapterInvalid, "no lora_A"),
    "A transposed": (changed(Q0, "A", lambda t: t.t().contiguous()), AdapterInvalid, "declares rank"),
    "B transposed": (changed(Q0, "B", lambda t: t.t().contiguous()), AdapterInvalid, "declares rank"),
    "wide A": (changed(Q0, "A", lambda t: torch.ones(4, 65)), AdapterMismatch, "features"),
    "long B": (changed(Q0, "B", lambda t: torch.ones(63, 4)), AdapterMismatch, "features"),
    "higher rank A": (changed(Q0, "A", lambda t: torch.ones(5, 64)), AdapterInvalid, "declares rank"),
    "higher rank B": (changed(Q0, "B", lambda t: torch.ones(64, 5)), AdapterInvalid, "declares rank"),
    "three dimensions": (changed(Q0, "A", lambda t: t[None]), AdapterInvalid, "matrix"),
    "NaN in A": (changed(Q0, "A", lambda t: t.index_fill(1, torch.tensor(3), math.nan)), AdapterInvalid, "NaN"),
    "Inf in B": (changed(Q0, "B", lambda t: t * math.inf), AdapterInvalid, "NaN or infinite"),
    "huge": (changed(Q0, "B", lambda t: t * 1e12), AdapterInvalid, "norm"),
    "overflowing": (changed(Q0, "B", lambda t: t * 1e38), AdapterInvalid, "norm"),
    "bias": (extra(f"{PREFIX}{Q0}.bias"), AdapterInvalid, "bias"),
    "lora bias": (extra(f"{PREFIX}{Q0}.lora_B.bias"), AdapterInvalid, "bias"),
    "magnitude": (extra(f"{PREFIX}{Q0}.lora_magnitude_vector"), AdapterInvalid, "DoRA"),
    "embedding": (extra(f"{PREFIX}model.embed_tokens.lora_embedding_A"), AdapterInvalid, "embedding"),
    "full embedding": (extra(f"{PREFIX}model.embed_tokens.weight"), AdapterInvalid, "save_embedding"),
    "full head": (extra(f"{PREFIX}lm_head.weight"), AdapterInvalid, "save_embedding"),
    "saved module": (extra(f"{PREFIX}lm_head.modules_to_save.weight"), AdapterInvalid, "full module"),
    "stranger": (extra("stranger"), AdapterInvalid, "no part of a LoRA pair"),
    "twice": (extra(f"{Q0}.lora_A.weight", 4, 64), AdapterInvalid, "two tensors"),
    "two adapters": (
        {**make_tensors(targets=["q_proj"]), **make_tensors(targets=["v_proj", "down_proj"], key="{path}.lora_{factor}.b.weight")},
        AdapterInvalid, "several adapters",
    ),
    "zero": ({k: t * ("lora_A" in k) for k, t in make_tensors().items()}, AdapterInvalid, "zero"),
    "partial": (make_tensors(targets=["q_proj", "v_proj"]), AdapterInvalid, "partial"),
    "one module less": (
        {k: t for k, t in make_tensors().items() if Q0 not in k}, AdapterInvalid, "partial",
    ),
    "undeclared": (make_tensors(targets=["q_proj", "v_proj", "down_proj", "lm_head"]), AdapterInvalid, "does not select"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(name):
    tensors, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message):
        read(make_raw(tensors=tensors))


def test_a_target_the_base_does_not_have_is_a_mismatch():
    with pytest.raises(AdapterMismatch, match="c_attn"):
        read(make_raw(make_config(target_modules=["q_proj", "v_proj", "down_proj", "c_attn"])))


def test_values_that_overflow_the_arena_dtype_are_refused_after_the_cast():
    raw = make_raw(tensors=changed(Q0, "A", lambda t: t * 0 + 7e4))
    limits = Limits(delta_norm=1e9)
    assert read(raw, dtype=torch.bfloat16, limits=limits)
    with pytest.raises(AdapterInvalid, match="float16"):
        read(raw, dtype=torch.float16, limits=limits)


def test_values_that_vanish_in_the_arena_dtype_are_refused():
    raw = make_raw(tensors={k: t * 1e-20 for k, t in make_tensors().items()})
    assert read(raw, dtype=torch.bfloat16)
    with pytest.raises(AdapterInvalid, match="zero"):
        read(raw, dtype=torch.float16)


def test_a_rank_limit_is_checked_before_weights_are_touched(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("weights were touched")

    raw = make_raw()
    monkeypatch.setattr(torch, "frombuffer", touched)
    with pytest.raises(AdapterTooLarge, match="limit is 3"):
        read(raw, limits=Limits(rank=3))
    with pytest.raises(AdapterTooLarge):
        read(make_raw(make_config(r=1 << 20)))
    with pytest.raises(AdapterTooLarge):
        read(make_raw(make_config(rank_pattern={"q_proj": 1 << 20})))
    with pytest.raises(AssertionError, match="touched"):  # the control
        read(raw)


def test_the_bytes_given_are_never_changed():
    raw = make_raw()
    before = (bytes(bytearray(raw.config)), bytes(bytearray(raw.weights)))
    read(raw, dtype=torch.bfloat16)
    assert (raw.config, raw.weights) == before


def test_the_file_order_of_tensors_does_not_matter_for_the_layout():
    config = json.dumps(make_config()).encode()
    tensors = dict(reversed(list(make_tensors().items())))
    assert read(RawAdapter(config, save(tensors), "x")).spec.deltas == make_parsed().spec.deltas
