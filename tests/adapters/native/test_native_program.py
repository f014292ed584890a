"""Programs: elementwise calls are shared out among threads and stay what torch computes."""

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native import (
    Kind,
    Map,
    Op,
    Program,
    StepInputs,
    Workspace,
    activation,
)
from fader_adapters.kernels.native.activation import ACTIVATIONS

CODES = {torch.float32: 0, torch.bfloat16: 1}
SHAPES = [(1, 1, 1, 70_001), (1, 1, 37, 4096), (1, 5, 300, 64), (3, 700, 2, 32), (1, 1, 3, 70_000)]


@pytest.fixture(autouse=True)
def own_threads():
    yield
    native.set_threads(None)


def filled(op: Op, name: str, tensor: torch.Tensor) -> None:
    setattr(op, name, tensor.data_ptr())
    steps = [
        0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    getattr(op, f"{name}_step")[:] = [*steps[:3], 1] if name != "y" else steps


def run(kind: Map, x: torch.Tensor, y: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    op = Op(kind=Kind.MAP, map=kind, dtype=CODES[x.dtype], out_dtype=CODES[out.dtype])
    op.size[:] = out.shape
    filled(op, "x", x)
    filled(op, "out", out)
    if y is not None:
        filled(op, "y", y.expand(out.shape))
    nothing = torch.zeros(2, dtype=torch.int32)
    inputs = StepInputs(nothing, nothing[1:], nothing.view(1, 2)[:, :1], torch.zeros(1).long())
    Program([op], Workspace())(inputs.step())
    return out


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_is_computed_once_whoever_computes_it(level: str, shape, threads: int):
    native.set_threads(threads)
    for dtype in CODES:
        x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        room = torch.full((*shape[:2], 2 * shape[2], shape[3]), float("nan"), dtype=dtype)
        out = room[:, :, : shape[2]] if shape[1] == shape[0] == 1 else torch.empty_like(x)
        assert torch.equal(run(Map.ADD, x, y, out), x + y)
        if out.data_ptr() == room.data_ptr():
            assert room[:, :, shape[2] :].isnan().all(), "nothing is written behind the end"
        assert torch.equal(run(Map.MUL, x, y[:1, :1], torch.empty_like(x)), x * y[:1, :1])
        assert torch.equal(run(Map.NEG, x, None, torch.empty_like(x)), -x)
    wide = run(Map.COPY, x, None, torch.empty(shape))
    assert torch.equal(wide, x.float())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activations_bits_depend_on_no_place_and_no_number_of_threads(level: str, kind: Map):
    x = torch.randn(601, 67).abs().add(1e-3)
    alone = torch.cat([activation(row, kind) for row in x.split(1)])
    assert len(alone.unique()) > 20_000
    for first, count in ((0, 601), (5, 1), (7, 57), (1, 600)):
        part = x[first : first + count].contiguous().view(1, 1, count, 67)
        for threads in (1, 2, 3, 6):
            native.set_threads(threads)
            out = run(kind, part, None, torch.full_like(part, float("nan")))
            assert torch.equal(out[0, 0], alone[first : first + count])


def test_a_call_that_a_kernel_refuses_is_named_whoever_ran_it():
    native.set_threads(2)
    x = torch.randn(1, 1, 40, 4096)
    with pytest.raises(ValueError, match="call 0 of 1"):
        run(99, x, None, torch.empty_like(x))  # type: ignore[arg-type]
