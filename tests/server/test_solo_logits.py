"""Logits of one sequence in the order asked for, from models that know of no choice as well."""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import Cache, LlamaForCausalLM, PreTrainedModel

from fader_server.model.alone import SoloModel, cache_name
from tests.support.families import write_family


class Whole(LlamaForCausalLM):
    """Gives the logits of every token."""

    def forward(self, input_ids: torch.Tensor, past_key_values: Cache, use_cache: bool):
        held = {cache_name(LlamaForCausalLM): past_key_values}
        return super().forward(input_ids=input_ids, use_cache=use_cache, **held)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Whole])
@pytest.mark.parametrize("wanted", [[4], [0, 2], [4, 0, 1, 2, 3], []])
def test_logits_come_in_the_order_that_is_asked_for(
    kind: type[PreTrainedModel], wanted: list[int], tmp_path: Path
):
    base = write_family("llama", tmp_path / "base")
    model = kind.from_pretrained(base).eval()
    usual = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokens = [5, 6, 7, 8, 9]
    with torch.inference_mode():
        solo = SoloModel(model)
        found = solo.logits(tokens, 0, solo.new_cache(), wanted)
        every = usual(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(found, every[wanted], atol=1e-5, rtol=1e-5)
    if len(wanted) == len(tokens):
        assert not torch.allclose(found, every, atol=1e-2)
