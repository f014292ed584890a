"""Adapters of embeddings through the CUDA backend, interpreted, against the reference."""

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.reference import ReferenceBackend
from fader_adapters.spec import RowTerms, StepTerms
from tests.support.lora_world import make_delta_world

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
VOCAB, WIDTH = 90, 64
ONE, BLEND = ((0, 1.0),), ((1, 0.5), (2, -1.0))
MIXES = {
    "decode": StepTerms((RowTerms(1, ONE), RowTerms(1), RowTerms(1, BLEND))),
    "prefill": StepTerms((RowTerms(70, BLEND), RowTerms(5), RowTerms(3, ONE))),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", MIXES)
def test_every_mix_equals_the_reference_and_base_rows_keep_their_bits(name: str) -> None:
    world = make_delta_world(((64, (32,)), (VOCAB, (WIDTH,))), [(8,), (20,), (3,)], torch.float32)
    terms = MIXES[name]
    tokens = sum(row.tokens for row in terms.rows)
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (tokens,), generator=random)
    before = torch.randn(tokens, WIDTH, generator=random)
    results = []
    for backend in (
        CudaBackend(CPU, torch.float32, entries=16),
        ReferenceBackend(),
    ):
        kernel = backend.bind_lookup(world.sites[1])
        step = backend.prepare(world.tables, terms)
        if isinstance(backend, CudaBackend):
            step.buffers.z.fill_(torch.nan)
        y = before.clone()
        kernel(y, ids, step)
        results.append(y)
        kernel(before, ids, None)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    plain = [not row.terms for row in terms.rows for _ in range(row.tokens)]
    assert torch.equal(results[0][plain], before[plain])
    assert not torch.equal(results[0], before)
