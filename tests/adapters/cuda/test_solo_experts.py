"""Rows that run alone, of a mixture with adapters of its experts, on the CUDA backend, interpreted:
experts ask for the step of one row between linears that ask for that of all."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from tests.adapters.cuda.test_backend import LIMITS, same, told, use_cuda
from tests.server.parity.test_expert_adapters import base_of, targets
from tests.support.peft_adapters import write_adapter
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU"),
    pytest.mark.slow,
]


def test_rows_that_run_alone_get_their_own_experts_deltas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("phi-moe", tmp_path)

    def world() -> TinyWorld:
        return TinyWorld(base, limits=LIMITS, blocks=40, backend="reference", arena=1 << 23)

    reference = world()
    assert reference.base.solo is not None
    given = {
        name: write_adapter(
            base, tmp_path / name, rank=rank, seed=rank, **targets("phi-moe", reference)
        )
        for name, rank in (("a", 8), ("b", 20))
    }
    prompts = {"a": [5, 6, 7], "b": [8, 9, 10, 11]}
    asks = [Ask(prompt, {name: 1.0}, greedy(3)) for name, prompt in prompts.items()]
    for name, path in given.items():
        reference.load(name, path)
    want = told(reference.run(asks))
    swapped = told(reference.run([Ask(asks[0].prompt, {"b": 1.0}, greedy(3))]))
    assert swapped[0][1] != pytest.approx(want[0][1], abs=1e-3), "the comparison sees nothing"
    use_cuda(monkeypatch)
    cuda = world()
    for name, path in given.items():
        cuda.load(name, path)
    same(told(cuda.run(asks)), want)
