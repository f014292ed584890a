"""adapter_config.json: what is accepted means what it means to PEFT, the rest is refused."""

import time
from contextlib import suppress

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.source import RawAdapter
from tests.adapters.peft_files import (
    BASE,
    make_config,
    make_parsed,
    make_raw,
    make_tensors,
    read,
)

Q0 = "model.layers.0.self_attn.q_proj"

BAD_CONFIGS = {
    "dora": {"use_dora": True},
    "bias": {"bias": "some"},
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
    "parameters by pattern": {"target_parameters": "experts.*"},
    "tokens": {"trainable_token_indices": [1]},
    "alora": {"alora_invocation_tokens": []},
    "megatron": {"megatron_config": {"a": 1}},
    "arrow": {"arrow_config": {"top_k": 1}},
    "kasa": {"kasa_config": {"beta": 1}},
    "tying": {"ensure_weight_tying": "yes"},
    "tokens twice": {"trainable_token_indices": [1, 1]},
    "tokens negative": {"trainable_token_indices": {"embed_tokens": [-1]}},
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


def test_another_kind_of_adapter_is_named_as_such_whatever_fields_it_has():
    with pytest.raises(AdapterInvalid, match="'peft_type' = 'IA3', expected \"LORA\""):
        read(make_raw(make_config(peft_type="IA3", feedforward_modules=["down_proj"])))


def test_advice_on_an_unknown_field_does_not_make_a_wrong_adapter_load():
    with pytest.raises(AdapterInvalid, match="null only if it changes nothing once training"):
        read(make_raw(make_config(kasa_config={"beta": 1e-4})))


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


SPELLINGS = {
    "full paths": [linear.path for linear in BASE.linears if linear.layer is not None],
    "last names": ["q_proj", "v_proj", "down_proj"],
    "two names": ["self_attn.q_proj", "v_proj", "mlp.down_proj"],
    "pattern": r".*\.(q_proj|v_proj|down_proj)",
    "all-linear": "all-linear",
    "All-Linear": "All-Linear",
    "broad pattern": r"model\..*proj",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_way_to_name_the_same_targets_is_the_same_adapter(name):
    parsed = read(make_raw(make_config(target_modules=SPELLINGS[name])))
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
    [{"q_proj": 2}, {"self_attn.q_proj": 2}, {r".*q_proj": 2},
     {r"layers\.\d+\.self_attn\.q_proj": 2},
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
    start = time.process_time()
    with pytest.raises(AdapterInvalid):
        read(
            make_raw(make_config(**{field: BOMB if field == "target_modules" else r"(?=(\w*)*)\1"}))
        )
    with pytest.raises(AdapterInvalid):
        read(make_raw(make_config(rank_pattern={BOMB: 4, "(": 4})))
    assert time.process_time() - start < 3


def test_thousands_of_patterns_are_answered_in_bounded_time():
    many = {f"[a-z]{{1,3}}.*{n}": 4 for n in range(4000)}
    start = time.process_time()
    with suppress(AdapterInvalid):
        read(make_raw(make_config(rank_pattern=many, alpha_pattern=many)))
    assert time.process_time() - start < 6


@pytest.mark.parametrize("piece", ["(a|b)?", "[^a]"])
def test_long_patterns_are_refused_before_they_take_long(piece: str):
    long = {f"{piece * (3800 // len(piece))}{n}": 4 for n in range(80)}
    few = dict(list(long.items())[:2])
    assert read(make_raw(make_config(rank_pattern=few)))
    start = time.process_time()
    with pytest.raises(AdapterInvalid, match="costs too much to evaluate"):
        read(make_raw(make_config(rank_pattern=long)))
    assert time.process_time() - start < 8


def test_unsafe_patterns_say_what_to_do():
    for changes in (
        {"target_modules": r"(a)\1"},
        {"rank_pattern": {r"(?<=a)b": 4}},
        {"alpha_pattern": {"a)|(b": 4}},
    ):
        with pytest.raises(AdapterInvalid, match="list the module names"):
            read(make_raw(make_config(**changes)))


@pytest.mark.parametrize("key", ["r", "rank_pattern", "trainable_token_indices"])
def test_a_number_of_any_length_is_told_in_few_words(key):
    number = 10**4000
    value = {"r": number, "rank_pattern": {"q_proj": number}}.get(key, {"lm_head": [number]})
    tensors = make_tensors()
    if key == "trainable_token_indices":
        name = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
        tensors[name] = torch.ones(1, 64)
    with pytest.raises((AdapterTooLarge, AdapterMismatch)) as caught:
        read(make_raw(make_config(**{key: value}), tensors))
    assert len(str(caught.value)) < 300
