"""A selective scan in chunks gives what it gives at once."""

from pathlib import Path

import pytest
import torch
import transformers

from fader_server.model.alone import SoloModel
from fader_server.model.continuing import continue_scans
from tests.support.many_families import write_many
from tests.support.solo_families import SOLO

CHUNKS = (7, 1, 5, 9)


@pytest.mark.parametrize("family", [f for f in ("falcon-mamba", "jamba", "mamba") if f in SOLO])
def test_a_prompt_in_chunks_has_the_logits_that_it_has_at_once(family: str, tmp_path: Path):
    source = write_many(*SOLO[family], tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    ids = torch.randint(3, 500, (1, sum(CHUNKS)), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        at_once = model(input_ids=ids, use_cache=False).logits[0]
        before = _in_chunks(model, ids[0])
        continue_scans(model)
        after = _in_chunks(model, ids[0])
        again = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(again, at_once)
    torch.testing.assert_close(after, at_once, atol=1e-5, rtol=1e-4)
    assert (before - at_once)[: CHUNKS[0] + 1].abs().max() < 1e-5
    assert (before - at_once).abs().max() > 1e-3, "transformers' own begin every chunk anew"


def _in_chunks(model: transformers.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    solo, found, start = SoloModel(model), [], 0
    cache = solo.new_cache()
    for chunk in torch.split(ids, list(CHUNKS)):
        found.append(solo.logits(chunk.tolist(), start, cache, list(range(len(chunk)))))
        start += len(chunk)
    return torch.cat(found)
