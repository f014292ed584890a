"""Selective scans against plain torch in fp64: rows, cuts, company, slots."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import SelectiveScan
from tests.adapters.native.test_native_states import BAD_ROWS, DTYPES, TOLERANCE, noise, rows_of

CHANNELS = 80
"""A whole item of work, and a part of one."""
KEYS = pytest.mark.parametrize("keys", [1, 7, 16])


@dataclasses.dataclass
class Inputs:
    """One sequence's; x and gate are slices of wider rows."""

    x: torch.Tensor
    steps: torch.Tensor
    gate: torch.Tensor

    @classmethod
    def of(cls, keys: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> "Inputs":
        wide = noise(tokens, 3 * CHANNELS, dtype=dtype, seed=seed)
        steps = noise(tokens, CHANNELS + 2 * keys, dtype=dtype, seed=seed + 1)
        return cls(wide[:, :CHANNELS], steps, wide[:, 2 * CHANNELS :])

    def part(self, begin: int, end: int) -> "Inputs":
        return Inputs(self.x[begin:end], self.steps[begin:end], self.gate[begin:end])

    def behind(self, other: "Inputs") -> "Inputs":
        return Inputs(
            *(
                torch.cat([getattr(part, field.name) for part in (other, self)])
                for field in dataclasses.fields(self)
            )
        )


def vectors(keys: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decay, bias and skip."""
    decay = -noise(CHANNELS, keys, dtype=torch.float32, seed=7).exp()
    return decay, noise(CHANNELS, dtype=dtype, seed=8), noise(CHANNELS, dtype=dtype, seed=9)


def scan(keys: int, dtype: torch.dtype, *, plain: bool = False) -> SelectiveScan:
    """plain: without bias, skip and softplus."""
    decay, bias, skip = vectors(keys, dtype)
    kernel = SelectiveScan(
        decay, None if plain else bias, None if plain else skip, slots=8, softplus=not plain
    )
    kernel.states.fill_(float("nan"))
    return kernel


def selected(keys: int, given: Inputs, *, plain: bool = False) -> torch.Tensor:
    """[tokens, channels] of one sequence, in fp64 but for the rounding of steps."""
    dtype = given.x.dtype
    decay, bias, skip = (v.double() for v in vectors(keys, dtype))
    dt, b, c = given.steps.split([CHANNELS, keys, keys], dim=1)
    step = dt if plain else F.softplus((dt + bias).to(dtype).double()).to(dtype)
    step, b, c, x = (t.double() for t in (step, b, c, given.x))
    h, out = torch.zeros(CHANNELS, keys, dtype=torch.float64), []
    for t in range(len(x)):
        h = (step[t][:, None] * decay).exp() * h + (step[t] * x[t])[:, None] * b[t]
        out.append(h @ c[t])
    y = torch.stack(out)
    return y if plain else (y + x * skip) * F.silu(given.gate.double())


@DTYPES
@KEYS
@pytest.mark.parametrize("plain", [False, True])
def test_a_selective_scan_is_the_recurrence_of_its_definition(
    level: str, dtype: torch.dtype, keys: int, plain: bool
) -> None:
    kernel, given = scan(keys, dtype, plain=plain), Inputs.of(keys, 14, dtype)
    if plain:
        given.steps[:, :CHANNELS].abs_().clamp_(max=2)  # they are no steps below 0
    rows, gate = rows_of([1, 9, 4], [-1, -1, -1], [0, 1, 2]), None if plain else given.gate
    found = kernel(given.x, given.steps, rows, gate=gate)
    assert found.dtype == dtype
    cuts = ((0, 1), (1, 10), (10, 14))
    expected = torch.cat([selected(keys, given.part(*p), plain=plain) for p in cuts])
    bound = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
    wrong = torch.cat([selected(keys, given.part(*p), plain=plain) for p in ((0, 1), (1, 14))])
    assert not torch.allclose(found.double(), wrong, atol=2 * bound, rtol=2 * bound)


@DTYPES
@KEYS
def test_a_sequence_cut_in_rows_has_the_bits_of_the_whole_in_any_company(
    level: str, dtype: torch.dtype, keys: int
) -> None:
    kernel, given = scan(keys, dtype), Inputs.of(keys, 12, dtype)
    other = Inputs.of(keys, 3, dtype, seed=50)
    whole = kernel(given.x, given.steps, rows_of([12], [-1], [7]), gate=given.gate)
    found, at, slot = [], 0, -1
    for i, count in enumerate((4, 1, 1, 6)):
        both = given.part(at, at + count).behind(other)
        rows = rows_of([3, count], [-1, slot], [6, i])
        found.append(kernel(both.x, both.steps, rows, gate=both.gate)[3:])
        at, slot = at + count, i
    assert torch.equal(torch.cat(found), whole)
    assert torch.equal(kernel.states[3], kernel.states[7])
    assert not torch.equal(kernel.states[2], kernel.states[7])
    last = given.part(6, 12)
    again = kernel(last.x, last.steps, rows_of([6], [2], [5]), gate=last.gate)
    assert torch.equal(again, whole[6:])  # the state it went on from is as it was


def test_what_slots_hold_stays_when_there_are_more() -> None:
    kernel, given = scan(16, torch.float32), Inputs.of(16, 6, torch.float32)
    whole = kernel(given.x, given.steps, rows_of([6], [-1], [0]), gate=given.gate)
    begin, end = given.part(0, 4), given.part(4, 6)
    kernel(begin.x, begin.steps, rows_of([4], [-1], [7]), gate=begin.gate)
    kernel.grow(40)
    rows = rows_of([2], [7], [39])
    assert torch.equal(kernel(end.x, end.steps, rows, gate=end.gate), whole[4:])


def test_threads_change_no_bit() -> None:
    kernel, given = scan(16, torch.bfloat16), Inputs.of(16, 40, torch.bfloat16)
    found = []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        rows = rows_of([30, 10], [-1, -1], [0, 1])
        found.append(kernel(given.x, given.steps, rows, gate=given.gate))
    native.set_threads(None)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("counts", [[0, 3, 0], [0, 0, 0]])
def test_a_row_of_no_tokens_leaves_what_it_went_on_from(level: str, counts: list[int]) -> None:
    rows, given = rows_of(counts, [0, 1, -1], [4, 5, 6]), Inputs.of(16, sum(counts), torch.float32)
    kernel = scan(16, torch.float32)
    kernel.states[:2] = noise(2, *kernel.states.shape[1:], dtype=torch.float32)
    kernel(given.x, given.steps, rows, gate=given.gate)
    assert torch.equal(kernel.states[4], kernel.states[0])
    assert torch.equal(kernel.states[5], kernel.states[1]) == (sum(counts) == 0)
    assert not kernel.states[6].any()


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_lead_nowhere_are_refused(name: str) -> None:
    kernel, given = scan(16, torch.float32), Inputs.of(16, 4, torch.float32)
    with pytest.raises(ValueError, match="outside its table"):
        kernel(given.x, given.steps, rows_of(*BAD_ROWS[name]), gate=given.gate)


def test_shapes_that_the_kernel_does_not_take_are_refused() -> None:
    for shape in ((24, 16), (16, 257)):
        with pytest.raises(ValueError, match="channels must be a multiple of 16"):
            SelectiveScan(torch.zeros(shape), None, None, slots=2, softplus=True)
    kernel, given, rows = (
        scan(16, torch.float32),
        Inputs.of(16, 4, torch.float32),
        rows_of([4], [-1], [0]),
    )
    with pytest.raises(ValueError, match=r"steps must have shape \[4, 112\]"):
        kernel(given.x, given.steps[:, :-1].contiguous(), rows)
    with pytest.raises(TypeError, match="steps must be"):
        kernel(given.x, given.steps.bfloat16(), rows)
    with pytest.raises(TypeError, match="gate must be"):
        kernel(given.x, given.steps, rows, gate=given.gate.bfloat16())
