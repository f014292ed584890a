"""Which linears a model reads by itself is found in its own code, and no adapter may have those."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from fader_adapters import own_reads
from fader_adapters.describe import describe, kept_plain, to_be_quantised
from fader_adapters.errors import AdapterMismatch
from fader_adapters.own_reads import read_by_itself
from tests.adapters.peft_files import BASE, make_config, make_raw, make_tensors, read

SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 192}
JAMBA = {**SMALL, **HEADS, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1}


def made(model_type: str, changes: dict[str, Any], *, quantised: bool = False) -> PreTrainedModel:
    config = transformers.AutoConfig.for_model(model_type, **changes)
    if quantised:
        to_be_quantised(config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def dt_projs(parent: str, *layers: int) -> frozenset[str]:
    return frozenset(parent.format(layer) + ".dt_proj" for layer in layers)


@pytest.mark.parametrize(
    ("model_type", "changes", "quantised", "expected"),
    [
        ("mamba", SMALL, False, dt_projs("backbone.layers.{}.mixer", 0, 1)),
        ("mamba", SMALL, True, dt_projs("backbone.layers.{}.mixer", 0, 1)),
        ("falcon_mamba", SMALL, False, dt_projs("backbone.layers.{}.mixer", 0, 1)),
        ("falcon_mamba", SMALL, True, frozenset()),
        ("jamba", JAMBA, False, dt_projs("model.layers.{}.mamba", 0)),
        ("jamba", {**JAMBA, "num_experts": 2}, False, dt_projs("model.layers.{}.mamba", 0)),
        ("jamba", JAMBA, True, frozenset()),
        ("llama", {**SMALL, **HEADS}, True, frozenset()),
    ],
)
def test_what_a_model_reads_depends_on_whether_it_is_quantised(
    model_type: str, changes: dict[str, Any], quantised: bool, expected: frozenset[str]
):
    model = made(model_type, changes, quantised=quantised)
    assert read_by_itself(model) == expected
    spec = describe(model)
    assert spec.read == expected
    assert expected.isdisjoint(spec.index_of)


def test_only_code_that_names_a_childs_weight_is_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_reads, "_forward", lambda model: 1 / 0)
    monkeypatch.setattr(own_reads, "_reads", lambda kind, config: 1 / 0)
    assert not read_by_itself(made("llama", {**SMALL, **HEADS}))
    with pytest.raises(ZeroDivisionError):
        read_by_itself(made("mamba", SMALL))


def test_what_is_read_stays_plain_where_it_is_little():
    kept = kept_plain(made("mamba", {**SMALL, "time_step_rank": 16}, quantised=True))
    assert kept is not None
    assert dt_projs("backbone.layers.{}.mixer", 0, 1) <= set(kept)
    assert kept_plain(made("mamba", {**SMALL, "time_step_rank": 64}, quantised=True)) is None


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_adapter_of_a_linear_that_is_not_called_is_refused_by_name(prefix: str):
    raw = make_raw(make_config(), make_tensors())
    read(raw)
    own = frozenset({f"{prefix}layers.1.self_attn.q_proj"})
    with pytest.raises(AdapterMismatch, match=r"layers.1.self_attn.q_proj.* reads by itself"):
        read(raw, replace(BASE, read=own))
    read(raw, replace(BASE, read=frozenset({f"{prefix}layers.1.self_attn.o_proj"})))
