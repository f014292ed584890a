"""The GPU suite's peer without a GPU: steps go on from a cache, each row by its own adapter."""

import peft
import pytest
import torch
import transformers

from bench.gpu import peers
from bench.gpu.section import ParityFailed, Rig
from tests.support.families import COMMON, VOCAB

NAMES = ["a0", "a1"]


def mixed(*, random: bool) -> peft.PeftModel:
    """A tiny base with two adapters; not random: with B of zeros."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**COMMON))
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=not random)
    both = peft.get_peft_model(model, lora, adapter_name=NAMES[0])
    both.add_adapter(NAMES[1], lora)
    return both.eval()


def test_steps_go_on_from_the_prompt_with_an_adapter_for_each_row() -> None:
    seen: list[tuple[int, int]] = []
    model = mixed(random=True)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    rig = Rig(torch.device("cpu"), torch.float32, small=True)
    times = peers._decode(rig, model, NAMES, vocab=VOCAB, context=20)
    assert seen == [(2, 20), (1, 20), *[(2, 1)] * 8]
    assert times.median > 0


def test_adapters_that_change_nothing_leave_no_figure() -> None:
    rig = Rig(torch.device("cpu"), torch.float32, small=True)
    with pytest.raises(ParityFailed, match="change nothing"):
        peers._decode(rig, mixed(random=False), NAMES, vocab=VOCAB, context=20)
