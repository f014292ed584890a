"""Embeddings that scale what they give, where the checkpoint's dtype is not the served one."""

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fader_adapters import attach
from fader_adapters.architecture import auto_class
from fader_adapters.describe import describe
from fader_adapters.weightspace.base import open_base
from tests.server.parity.test_families import SCALE, check, difference, prompts
from tests.support.composites import write_composite
from tests.support.families import COMMON, write_family
from tests.support.lanes import merge, publish
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

EXACT = math.sqrt(COMMON["hidden_size"])
ROUNDED = float(torch.tensor(EXACT, dtype=torch.bfloat16))
BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""In fp32 far below what one scale beside the other costs."""
KINDS = {
    "table": {"target_modules": ["embed_tokens"]},
    "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "inside": {"target_modules": r".*layers\.1\.self_attn\.q_proj"},  # towers have one layer
}
FP32_OF_BF16 = (torch.bfloat16, torch.float32)
BF16_OF_FP32 = (torch.float32, torch.bfloat16)
CASES = [
    pytest.param("gemma3", *FP32_OF_BF16, id="gemma3-bf16-as-fp32"),
    pytest.param("gemma2", *FP32_OF_BF16, id="gemma2-bf16-as-fp32", marks=pytest.mark.slow),
    pytest.param("gemma4", *FP32_OF_BF16, id="gemma4-bf16-as-fp32", marks=pytest.mark.slow),
    pytest.param("gemma3", *BF16_OF_FP32, id="gemma3-fp32-as-bf16"),
    pytest.param("gemma2", *BF16_OF_FP32, id="gemma2-fp32-as-bf16", marks=pytest.mark.slow),
]


def stored(family: str, folder: Path, dtype: torch.dtype, *, scale: float) -> Path:
    """A checkpoint in a dtype."""
    if family == "gemma4":
        write_composite(family, folder)
    else:
        write_family(family, folder, scale=scale)
    kind = auto_class(AutoConfig.from_pretrained(folder))
    kind.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    return folder


def adapters(base: Path, folder: Path) -> dict[str, Path]:
    return {
        name: write_adapter(base, folder / name, rank=4, seed=seed, scale=0.2, **config)
        for seed, (name, config) in enumerate(KINDS.items())
    }


def asks(name: str) -> list[Ask]:
    blend = {name: 1.0} if name else {}
    return [Ask(prompt, blend, greedy(2, prompt_logprobs=0)) for prompt in prompts(4)]


@pytest.mark.parametrize(("family", "read", "served"), CASES)
def test_base_delta_and_lane_scale_as_a_model_loaded_in_the_served_dtype(
    family, read, served, tmp_path: Path
):
    source = stored(family, tmp_path / "base", read, scale=SCALE[served])
    given = adapters(source, tmp_path)
    world = TinyWorld(source, dtype=served)
    for name, path in given.items():
        world.load(name, path)
    oracle = Oracle(source, served, given)
    for name in ("", *given):
        check(oracle, asks(name), world.run(asks(name)), BOUND[served])
    for name in ("table", "dora"):
        publish(world, merge(world, {name: 1.0}, form="bf16"))
        check(oracle, asks(name), world.run(asks(name)), BOUND[served])
        without = Ask(asks(name)[2].prompt, {}, asks(name)[2].params)
        assert difference(oracle, without, world.run(asks(name))[2], 10.0) > 10 * BOUND[served]


def _factor(model: PreTrainedModel) -> float:
    return next(one.multiplier for one in describe(model).linears if one.role == "embedding")


def test_what_a_model_multiplies_by_is_read_from_the_model_as_it_is(tmp_path: Path):
    source = stored("gemma3", tmp_path / "base", torch.bfloat16, scale=0.05)
    assert ROUNDED != EXACT
    for dtype, factor in ((torch.float32, EXACT), (torch.bfloat16, ROUNDED)):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        assert _factor(model) == pytest.approx(factor, rel=1e-7)
        assert _factor(model.float()) == pytest.approx(factor, rel=1e-7), "it stays as rounded"
    (linear,) = (one for one in open_base(source).spec.linears if one.role == "embedding")
    assert linear.multiplier == EXACT, "there is no dtype on the disk"


@pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied weights
def test_a_notebooks_model_keeps_the_scale_it_was_loaded_with(tmp_path: Path):
    source = stored("gemma3", tmp_path / "base", torch.bfloat16, scale=0.05)
    adapter = adapters(source, tmp_path)["table"]

    def model() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).float().eval()

    ids = torch.tensor([prompts(4)[3]])
    with torch.inference_mode():
        theirs = PeftModel.from_pretrained(model(), adapter).eval()(input_ids=ids).logits
        lora = attach(ours := model(), arena_bytes=1 << 22)
        lora.load("table", adapter)
        with lora.rows(["table"]):
            torch.testing.assert_close(ours(input_ids=ids).logits, theirs, rtol=0, atol=2e-5)
        assert (ours(input_ids=ids).logits - theirs).abs().max() > 1e-2
