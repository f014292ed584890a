"""Parameters that a family keeps in fp32 in a bf16 model: as transformers loads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Params4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fader_server.model import loader
from fader_server.model.checkpoint import read_config, read_nf4
from fader_server.model.precision import cast_base
from tests.support.many_families import MOE, SLIDING, write_many
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.solo_families import SOLO
from tests.support.world import Ask, TinyWorld, greedy

BF16 = torch.bfloat16
ERNIE = {"moe_num_experts": 16, "moe_k": 4, "num_hidden_layers": 4, "moe_layer_start_index": 0}
FAMILIES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "ernie": ("ernie4_5_moe", {**MOE, **ERNIE}),
    "flint": ("flint", {**MOE, **SLIDING, "mlp_only_layers": [0]}),
    "llama": ("llama", {}),
}
XGLM = {"d_model": 128, "ffn_dim": 512, "num_layers": 2, "attention_heads": 4}
KEPT = {
    "ernie": {"gate.weight", "moe_statics.e_score_correction_bias"},
    "flint": {"gate.weight", "sinks"},
    "llama": set(),
}


BUFFERED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "apertus": ("apertus", {}),
    "falcon-h1": ("falcon_h1", SOLO["falcon-h1"][1]),
    "gemma": ("gemma", {}),
    "gpt-j": ("gptj", {"n_embd": 128, "n_head": 4, "n_layer": 2, "rotary_dim": 16}),
    "xglm": ("xglm", XGLM),
}
"""Families that make numbers of their own beside rotary frequencies, and GPT-J, in fp32."""


@pytest.mark.parametrize("stored", [torch.float32, BF16])
@pytest.mark.parametrize("served", [torch.float32, BF16])
@pytest.mark.parametrize("family", sorted(BUFFERED))
def test_buffers_are_those_of_a_model_in_the_dtype_it_is_served_in(
    family: str, stored: torch.dtype, served: torch.dtype, tmp_path: Path
):
    base = write_many(*BUFFERED[family], tmp_path / "base")
    if stored != torch.float32:
        AutoModelForCausalLM.from_pretrained(base, dtype=stored).save_pretrained(base)
    theirs = dict(AutoModelForCausalLM.from_pretrained(base, dtype=served).named_buffers())
    ours = read_nf4(
        str(base), read_config(str(base)), device=torch.device("cpu"), attn_implementation=None
    )
    assert ours.config.dtype == stored
    before = {path for path, buffer in ours.named_buffers() if not same(buffer, theirs[path])}
    assert bool(before) == (stored != served and family != "gpt-j")
    cast_base(ours, served)
    for path, buffer in ours.named_buffers():
        assert same(buffer, theirs[path]), path


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_sinusoidal_positions_of_an_fp32_checkpoint_meet_bf16(tmp_path: Path):
    """They are a buffer, which a checkpoint's fp32 was left in."""
    base = write_many("xglm", XGLM, tmp_path / "base")
    (answer,) = TinyWorld(base, dtype=BF16).run([Ask([5, 6, 7, 8], {}, WHOLE)])
    tokens = [5, 6, 7, 8, *answer.tokens]
    logprobs = torch.log_softmax(Oracle(base, BF16, {}).logits(tokens[:-1], {}), dim=-1)
    own = logprobs[torch.arange(len(tokens) - 1), tokens[1:]]
    told = [x.logprob for x in [*answer.prompt_logprobs, *answer.logprobs]]
    assert (torch.tensor(told) - own).abs().max() < 0.05


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_transformers_keeps_in_fp32_is_kept(family: str, tmp_path: Path):
    base = write_many(*FAMILIES[family], tmp_path / "base")
    theirs = dict(AutoModelForCausalLM.from_pretrained(base, dtype=BF16).named_parameters())
    world = TinyWorld(base, dtype=BF16)
    found = set()
    for path, ours in world.base.model.named_parameters():
        if path in theirs and not isinstance(ours, Params4bit) and "lm_head" not in path:
            assert ours.dtype == theirs[path].dtype, path
            found |= {kept for kept in KEPT[family] if path.endswith(kept) and ours.dtype != BF16}
    assert found == KEPT[family]
    (answer,) = world.run([Ask([5, 6, 7, 8])])
    assert answer.error is None


def trained_ernie(folder: Path) -> Path:
    """With balancing biases that have an offset, as trained ones do."""
    base = write_many(*FAMILIES["ernie"], folder)
    file = base / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(3)
    for name, tensor in tensors.items():
        if "correction" in name:
            tensors[name] = 8 + 0.03 * torch.randn_like(tensor)
    save_file(tensors, file, metadata={"format": "pt"})
    return base


def test_experts_are_chosen_as_transformers_chooses_them_in_bf16(tmp_path: Path, monkeypatch):
    base = trained_ernie(tmp_path / "base")
    oracle = Oracle(base, BF16, {})
    asks = [Ask([(7 * i * i + s) % 500 for i in range(100)], params=WHOLE) for s in range(3)]

    def error() -> float:
        world, errors = TinyWorld(base, dtype=BF16), []
        for ask, answer in zip(asks, world.run(asks), strict=True):
            tokens = [*ask.prompt, *answer.tokens]
            logprobs = torch.log_softmax(oracle.logits(tokens[:-1], {}), dim=-1)
            told = torch.tensor([x.logprob for x in [*answer.prompt_logprobs, *answer.logprobs]])
            errors.append((told - logprobs[torch.arange(len(told)), tokens[1:]]).abs().mean())
        return float(torch.stack(errors).mean())

    kept = error()

    def rounded(model: torch.nn.Module, dtype: torch.dtype) -> None:
        for parameter in model.parameters():
            if not isinstance(parameter, Params4bit):
                parameter.data = parameter.data.to(dtype)

    monkeypatch.setattr(loader, "cast_base", rounded)
    assert error() > 2 * kept
    assert kept < 0.01


def test_a_router_that_is_kept_in_fp32_takes_adapters(tmp_path: Path):
    base = trained_ernie(tmp_path / "base")
    router = write_adapter(
        base, tmp_path / "router", rank=4, seed=1, scale=1.0,
        target_modules=["o_proj"], target_parameters=["gate.weight"],
    )  # fmt: skip
    world = TinyWorld(base, dtype=BF16)
    world.load("router", router)
    ask = Ask([7 * i % 500 for i in range(60)], {"router": 1.0}, WHOLE)
    answer, plain = world.run([ask, Ask(ask.prompt, params=WHOLE)])
    assert answer.error is None
    tokens = [*ask.prompt, *answer.tokens]
    oracle = Oracle(base, BF16, {"router": router})
    places = torch.arange(len(tokens) - 1), tokens[1:]

    def error(blend: dict[str, float]) -> float:
        own = torch.log_softmax(oracle.logits(tokens[:-1], blend), dim=-1)[places]
        told = torch.tensor([x.logprob for x in [*answer.prompt_logprobs, *answer.logprobs]])
        return float((told - own).abs().mean())

    assert error({"router": 1.0}) < 0.01 < error({}) / 5
    assert plain.tokens != answer.tokens or plain.logprobs != answer.logprobs


WHOLE = greedy(4, prompt_logprobs=0)
