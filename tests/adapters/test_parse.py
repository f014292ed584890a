"""One good adapter, and everything that can be wrong with it: each refused under its own name."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.parse import read_adapter
from fader_adapters.source import RawAdapter
from fader_adapters.spec import EXTENT_ALIGN, BaseSpec, LinearSpec
from tests.adapters.peft_files import (
    BASE,
    LAYERS,
    TARGETS,
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


def test_reading_and_writing_pause_at_every_module_and_end_with_what_a_pause_raises():
    calls: list[str] = []
    parsed = read_adapter(make_raw(), BASE, dtype=torch.float32, pause=lambda: calls.append("r"))
    modules = 3 * LAYERS
    assert len(calls) >= 3 * modules
    flat = torch.empty(parsed.spec.numel)
    parsed.write(flat, lambda: calls.append("w"))
    assert calls.count("w") == modules

    def give_up() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        read_adapter(make_raw(), BASE, dtype=torch.float32, pause=give_up)


def test_gaps_of_alignment_are_zero():
    base = BaseSpec((LinearSpec("model.layers.0.odd", 5, 7, 0),), BASE.fingerprint, "test")
    raw = make_raw(make_config(r=3, target_modules=["odd"]), make_tensors(base, ["odd"], ranks=3))
    parsed = read(raw, base)
    flat = torch.full((parsed.spec.numel,), math.nan)
    parsed.write(flat)
    assert flat.isfinite().all()
    assert flat.count_nonzero() == 3 * 5 + 3 * 7 < len(flat)


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


@pytest.mark.parametrize("ours", ["model.", "model.language_model."])
@pytest.mark.parametrize("targets", ["all-linear", [*TARGETS, "unembed_tokens"]])
def test_tinker_calls_the_output_head_by_a_name_of_its_own(ours, targets):
    names = (*TARGETS, "lm_head")
    tensors = make_tensors(targets=names)
    theirs = {k.replace("lm_head", "model.unembed_tokens"): t for k, t in tensors.items()}
    config = make_config(target_modules=targets)
    parsed = read(make_raw(config, theirs), make_base(ours))
    good = read(make_raw(make_config(target_modules=list(names)), tensors), make_base(ours))
    assert parsed.spec.deltas == good.spec.deltas
    assert parsed.report.matched == len(TARGETS) * LAYERS + 1
    with pytest.raises(AdapterMismatch, match="another base"):
        read(make_raw(config, theirs), make_base(ours, head=False))


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
    "A transposed": (
        changed(Q0, "A", lambda t: t.t().contiguous()),
        AdapterInvalid,
        "declares rank",
    ),
    "B transposed": (
        changed(Q0, "B", lambda t: t.t().contiguous()),
        AdapterInvalid,
        "declares rank",
    ),
    "wide A": (changed(Q0, "A", lambda t: torch.ones(4, 65)), AdapterMismatch, "features"),
    "long B": (changed(Q0, "B", lambda t: torch.ones(63, 4)), AdapterMismatch, "features"),
    "higher rank A": (
        changed(Q0, "A", lambda t: torch.ones(5, 64)),
        AdapterInvalid,
        "declares rank",
    ),
    "higher rank B": (
        changed(Q0, "B", lambda t: torch.ones(64, 5)),
        AdapterInvalid,
        "declares rank",
    ),
    "three dimensions": (changed(Q0, "A", lambda t: t[None]), AdapterInvalid, "matrix"),
    "NaN in A": (
        changed(Q0, "A", lambda t: t.index_fill(1, torch.tensor(3), math.nan)),
        AdapterInvalid,
        "NaN",
    ),
    "Inf in B": (changed(Q0, "B", lambda t: t * math.inf), AdapterInvalid, "NaN or infinite"),
    "huge": (changed(Q0, "B", lambda t: t * 1e12), AdapterInvalid, "norm"),
    "overflowing": (changed(Q0, "B", lambda t: t * 1e38), AdapterInvalid, "norm"),
    "bias": (extra(f"{PREFIX}{Q0}.bias"), AdapterInvalid, "bias"),
    "lora bias": (extra(f"{PREFIX}{Q0}.lora_B.bias"), AdapterInvalid, "lora_bias = false"),
    "magnitude": (extra(f"{PREFIX}{Q0}.lora_magnitude_vector"), AdapterInvalid, "use_dora = false"),
    "embedding": (
        extra(f"{PREFIX}model.embed_tokens.lora_embedding_A"),
        AdapterInvalid,
        "no lora_embedding_B",
    ),
    "full embedding": (
        extra(f"{PREFIX}model.embed_tokens.weight"),
        AdapterInvalid,
        "whole module of its own",
    ),
    "full head": (extra(f"{PREFIX}lm_head.weight", 128, 64), AdapterInvalid, "name the base"),
    "saved module": (
        extra(f"{PREFIX}lm_head.modules_to_save.weight"),
        AdapterInvalid,
        "whole module",
    ),
    "stranger": (extra("stranger"), AdapterInvalid, "no part of a LoRA pair"),
    "twice": (extra(f"{Q0}.lora_A.weight", 4, 64), AdapterInvalid, "two tensors"),
    "two adapters": (
        {
            **make_tensors(targets=["q_proj"]),
            **make_tensors(targets=["v_proj", "down_proj"], key="{path}.lora_{factor}.b.weight"),
        },
        AdapterInvalid,
        "several adapters",
    ),
    "zero": ({k: t * ("lora_A" in k) for k, t in make_tensors().items()}, AdapterInvalid, "zero"),
    "partial": (make_tensors(targets=["q_proj", "v_proj"]), AdapterInvalid, "partial"),
    "one module less": (
        {k: t for k, t in make_tensors().items() if Q0 not in k},
        AdapterInvalid,
        "partial",
    ),
    "undeclared": (make_tensors(targets=[*TARGETS, "lm_head"]), AdapterInvalid, "does not select"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_wrong_tensors_are_refused_by_name(name):
    tensors, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message):
        read(make_raw(tensors=tensors))


def test_a_target_the_base_does_not_have_is_told_and_changes_nothing():
    names = ["q_proj", "v_proj", "down_proj"]
    found = read(make_raw(make_config(target_modules=[*names, "c_attn", "attn.qkv"])))
    plain = read(make_raw(make_config(target_modules=names)))
    assert found.report.unmatched == ("attn.qkv", "c_attn")
    assert plain.report.unmatched == ()
    assert found.spec == plain.spec


def test_targets_of_which_the_base_has_none_are_a_mismatch():
    with pytest.raises(AdapterMismatch, match=r"target_modules names 'c_attn'.*another base"):
        read(make_raw(make_config(target_modules=["c_attn", "c_proj"])))


def test_an_adapter_of_the_text_model_fits_a_base_that_also_has_a_tower():
    text = make_base("model.language_model.")
    tower = LinearSpec("model.vision_tower.layers.0.self_attn.q_proj", 64, 64, 0)
    base = replace(text, linears=(tower, *text.linears))
    assert read(make_raw(), base).report.matched == 9  # made for model.layers…
    whole = make_raw(tensors=make_tensors(base))
    assert read(whole, base).report.matched == 10
    without = make_raw(tensors=make_tensors(text))  # its model had the tower
    with pytest.raises(AdapterInvalid, match=r"vision_tower.*partial"):
        read(without, base)


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


def test_a_product_that_vanishes_is_refused():
    """A and B are not zero, what they make of each other is."""
    tensors = make_tensors()
    for name, tensor in tensors.items():
        keep = tensor.clone()
        if "lora_A" in name:
            keep[2:] = 0
        else:
            keep[:, :2] = 0
        tensors[name] = keep
    with pytest.raises(AdapterInvalid, match="zero"):
        read(make_raw(tensors=tensors))
    some = next(name for name in tensors if "lora_B" in name)
    tensors[some] = make_tensors()[some]
    assert read(make_raw(tensors=tensors))


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


@pytest.mark.parametrize(
    "wrapper",
    ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model."],
)
def test_names_out_of_a_wrapper_say_which(wrapper):
    outer = "base_model.model."
    given = {k.replace(outer, outer + wrapper, 1): t for k, t in make_tensors().items()}
    told = rf"saved of a wrapped model: take '{wrapper.rstrip('.')}' out"
    with pytest.raises(AdapterInvalid, match=told):
        read(make_raw(tensors=given))


def test_names_of_a_wrapped_peft_model_say_the_outermost_wrapper():
    given = {f"module.{name}": tensor for name, tensor in make_tensors().items()}
    with pytest.raises(AdapterInvalid, match="take 'module' out"):
        read(make_raw(tensors=given))
    read(make_raw(tensors={k.removeprefix("module."): t for k, t in given.items()}))  # then


def test_a_name_with_half_a_character_is_refused_and_a_long_one_cut():
    with pytest.raises(AdapterInvalid, match="half a character"):
        read(make_raw(make_config(base_model_name_or_path="\ud800")))
    whole = read(make_raw(make_config(base_model_name_or_path="🦊" + "x" * 9000)))
    assert whole.report.base_name == "🦊" + "x" * 511


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_nobody_trained_change_nothing_and_others_are_refused(bias):
    plain, named = read(make_raw()), read(make_raw(make_config(bias=bias)))
    assert named.spec == plain.spec
    for of in ("bias", "base_layer.bias"):  # of a linear beside, and of an adapted one
        name = f"base_model.model.model.layers.0.self_attn.q_proj.{of}"
        with pytest.raises(AdapterInvalid, match="a trained bias of the base"):
            read(make_raw(make_config(bias=bias), {**make_tensors(), name: torch.ones(64)}))


@pytest.mark.parametrize(
    ("start", "told"),
    [(b"GGUF", "a GGUF file"), (b"PK\x03\x04", "torch.save"), (b"\x93NUMPY", "NumPy")],
)
def test_other_files_under_the_name_of_the_weights_are_told_apart(start, told):
    raw = make_raw()
    with pytest.raises(AdapterInvalid, match=told):
        read(replace(raw, weights=start + raw.weights))
