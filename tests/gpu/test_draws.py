"""Draws on a GPU: the tokens that tensors draw there, alone and beside others, without a wait."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from bench.gpu.draws import draws_of
from fader_server.model.cuda_distribution import CudaDistributions
from fader_server.model.distribution import TorchDistributions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("vocab", [1000, 32_000, 151_936])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3])
def test_tokens_are_those_of_tensors_and_of_a_row_alone(vocab: int, top_p: float) -> None:
    torch.manual_seed(vocab)
    device = torch.device("cuda")
    logits, index = 3 * torch.randn(33, vocab, device=device), torch.arange(33, device=device)
    ours, plain = CudaDistributions(vocab, device), TorchDistributions()
    seen = set()
    for seed in range(5):
        tokens = ours.draw(logits, index, draws_of(33, top_p, seed=seed))
        assert torch.equal(tokens, plain.draw(logits, index, draws_of(33, top_p, seed=seed)))
        alone = ours.draw(logits, index[:1], draws_of(1, top_p, seed=seed))
        assert torch.equal(alone, tokens[:1])
        seen.add(int(tokens[7]))
    assert len(seen) > 1


def test_nothing_waits_for_the_device() -> None:
    device = torch.device("cuda")
    logits, index = torch.randn(9, 5000, device=device), torch.arange(9, device=device)
    ours = CudaDistributions(5000, device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.draw(logits, index, draws_of(9, 0.9))
    finally:
        torch.cuda.set_sync_debug_mode("default")
