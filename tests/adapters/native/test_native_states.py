"""States of sequences: convolutions and gated recurrences against plain torch in fp64."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Convolution, Scan, ScanForm, StateRows

FORMS = {
    "delta rule": ScanForm(2, 4, 32, 64, delta=True, unit=True),
    "narrow delta rule": ScanForm(3, 3, 16, 48, delta=True, unit=False),
    "decay by key": ScanForm(2, 4, 48, 32, delta=True, unit=True, by_key=True),
    "state space": ScanForm(1, 4, 128, 32, delta=False, unit=False),
}
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rows_of(counts: list[int], came_from: list[int], to: list[int]) -> StateRows:
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return StateRows(*(torch.tensor(x, dtype=torch.int32) for x in (starts, came_from, to)))


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """One whole sequence, x [n, channels], in fp64."""
    padded = F.pad(x.double().t(), (weight.shape[1] - 1, 0))
    other = None if bias is None else bias.double()
    return F.conv1d(padded[None], weight.double()[:, None], other, groups=len(weight))[0].t()


def convolution(dtype: torch.dtype, *, taps: int, silu: bool = False) -> Convolution:
    weight, bias = noise(96, taps, dtype=dtype, seed=1), noise(96, dtype=dtype, seed=2)
    kernel = Convolution(weight, bias, slots=8, silu=silu)
    kernel.states.fill_(float("nan"))
    return kernel


@DTYPES
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("silu", [False, True])
def test_rows_are_convolved_each_by_itself(
    level: str, dtype: torch.dtype, taps: int, silu: bool
) -> None:
    kernel = convolution(dtype, taps=taps, silu=silu)
    x = noise(14, 96, dtype=dtype)
    found = kernel(x, rows_of([1, 9, 4], [-1, -1, -1], [0, 1, 2]))
    weight, bias = noise(96, taps, dtype=dtype, seed=1), noise(96, dtype=dtype, seed=2)
    expected = torch.cat([convolved(part, weight, bias) for part in torch.split(x, [1, 9, 4])])
    if silu:
        expected = F.silu(expected.to(dtype).double())
    torch.testing.assert_close(
        found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    other = kernel(x, rows_of([2, 8, 4], [-1, -1, -1], [0, 1, 2]))  # cut elsewhere: not the same
    assert not torch.equal(other[1], found[1])
    assert not torch.equal(other[2], found[2])


@DTYPES
def test_a_convolution_cut_in_rows_gives_the_bits_of_the_whole(
    level: str, dtype: torch.dtype
) -> None:
    kernel = convolution(dtype, taps=4)
    x = noise(12, 96, dtype=dtype)
    whole = kernel(x, rows_of([12], [-1], [7]))
    parts, at, slot = [], 0, -1
    for i, count in enumerate((1, 1, 2, 5, 3)):
        parts.append(kernel(x[at : at + count], rows_of([count], [slot], [i])))
        at, slot = at + count, i
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(kernel.states[4], kernel.states[7])
    assert not torch.equal(kernel.states[3], kernel.states[7])


def test_a_convolution_reads_strided_rows(level: str) -> None:
    kernel = convolution(torch.bfloat16, taps=4)
    wide = noise(6, 200, dtype=torch.bfloat16)
    rows = rows_of([6], [-1], [0])
    assert torch.equal(kernel(wide[:, 8:104], rows), kernel(wide[:, 8:104].contiguous(), rows))


@dataclasses.dataclass
class Inputs:
    """One sequence's, in one tensor: k, q, v, each at a place of its own."""

    x: torch.Tensor
    gates: torch.Tensor
    places: tuple[int, int, int]

    @classmethod
    def of(cls, form: ScanForm, tokens: int, dtype: torch.dtype, seed: int = 0) -> "Inputs":
        group, head = form.groups * form.keys, form.heads * form.values
        x = noise(tokens, 2 * group + head + 5, dtype=dtype, seed=seed)
        decay = -noise(tokens, form.decays, dtype=torch.float32, seed=seed + 1).abs()
        strength = noise(tokens, form.heads, dtype=torch.float32, seed=seed + 2).sigmoid()
        gates = torch.cat([decay, strength], dim=1)
        return cls(x, gates, (group, 0, 2 * group + 5))

    def part(self, begin: int, end: int) -> "Inputs":
        return dataclasses.replace(self, x=self.x[begin:end], gates=self.gates[begin:end])


def scanned(
    form: ScanForm, given: Inputs, skip: torch.Tensor | None, state: torch.Tensor | None = None
) -> torch.Tensor:
    """[tokens, heads, values] of one sequence, in fp64, by the definition."""
    q, k, v = (
        given.x.double()[:, at : at + n * width].unflatten(1, (n, width))
        for at, n, width in zip(
            given.places,
            (form.groups, form.groups, form.heads),
            (form.keys, form.keys, form.values),
            strict=True,
        )
    )
    q, k = (x.repeat_interleave(form.heads // form.groups, dim=1) for x in (q, k))
    if form.unit:
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q = q / form.keys**0.5
    decay, strength = given.gates.double().split([form.decays, form.heads], dim=1)
    decay = decay.unflatten(1, (form.heads, -1))[..., None]
    s, out = torch.zeros(form.heads, form.keys, form.values, dtype=torch.float64), []
    for t in range(len(q)):
        s = s * decay[t].exp()
        change = v[t] - (torch.einsum("hkv,hk->hv", s, k[t]) if form.delta else 0.0)
        s = s + k[t][:, :, None] * (strength[t][:, None] * change)[:, None]
        out.append(torch.einsum("hkv,hk->hv", s, q[t]))
    found = torch.stack(out)
    return found if skip is None else found + skip.double()[:, None] * v


def scan(form: ScanForm, skip: torch.Tensor | None = None) -> Scan:
    kernel = Scan(form, slots=8, skip=skip)
    kernel.states.fill_(float("nan"))
    return kernel


@DTYPES
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("skips", [False, True])
def test_a_scan_is_the_recurrence_of_its_definition(
    level: str, dtype: torch.dtype, name: str, skips: bool
) -> None:
    form = FORMS[name]
    skip = noise(form.heads, dtype=dtype, seed=9) if skips else None
    kernel, given = scan(form, skip), Inputs.of(form, 14, dtype)
    found = kernel(
        given.x, given.gates, rows_of([1, 9, 4], [-1, -1, -1], [0, 1, 2]),
        places=given.places, dtype=torch.float32,
    )  # fmt: skip
    expected = torch.cat([scanned(form, given.part(*p), skip) for p in ((0, 1), (1, 10), (10, 14))])
    torch.testing.assert_close(found.double(), expected, atol=3e-5, rtol=3e-5)
    wrong = torch.cat([scanned(form, given.part(*p), skip) for p in ((0, 1), (1, 14))])
    assert not torch.allclose(found.double(), wrong, atol=1e-2)  # another row's state is another


@DTYPES
@pytest.mark.parametrize("name", FORMS)
def test_a_sequence_cut_in_rows_has_the_bits_of_the_whole_in_any_company(
    level: str, dtype: torch.dtype, name: str
) -> None:
    form = FORMS[name]
    kernel, given = scan(form), Inputs.of(form, 12, dtype)
    other = Inputs.of(form, 3, dtype, seed=50)
    how = {"places": given.places, "dtype": dtype}
    whole = kernel(given.x, given.gates, rows_of([12], [-1], [7]), **how)
    found, at, slot = [], 0, -1
    for i, count in enumerate((4, 1, 1, 6)):
        x = torch.cat([other.x, given.x[at : at + count]])
        gates = torch.cat([other.gates, given.gates[at : at + count]])
        rows = rows_of([3, count], [-1, slot], [6, i])
        found.append(kernel(x, gates, rows, **how)[3:])
        at, slot = at + count, i
    assert torch.equal(torch.cat(found), whole)
    assert torch.equal(kernel.states[3], kernel.states[7])
    again = kernel(given.x[6:], given.gates[6:], rows_of([6], [2], [5]), **how)
    assert torch.equal(again, whole[6:])  # the state it went on from is as it was


def test_what_slots_hold_stays_when_there_are_more() -> None:
    form = FORMS["delta rule"]
    kernel, given = scan(form), Inputs.of(form, 6, torch.float32)
    how = {"places": given.places, "dtype": torch.float32}
    whole = kernel(given.x, given.gates, rows_of([6], [-1], [0]), **how)
    kernel(given.x[:4], given.gates[:4], rows_of([4], [-1], [7]), **how)
    kernel.grow(40)
    assert torch.equal(
        kernel(given.x[4:], given.gates[4:], rows_of([2], [7], [39]), **how), whole[4:]
    )
    one = convolution(torch.float32, taps=4)
    x = noise(6, 96, dtype=torch.float32)
    whole = one(x, rows_of([6], [-1], [0]))
    one(x[:4], rows_of([4], [-1], [7]))
    one.grow(40)
    assert torch.equal(one(x[4:], rows_of([2], [7], [39])), whole[4:])


def test_threads_change_no_bit() -> None:
    form = FORMS["delta rule"]
    kernel, given = scan(form), Inputs.of(form, 40, torch.bfloat16)
    found = []
    for threads in (1, 2, 3):
        native.set_threads(threads)
        rows = rows_of([30, 10], [-1, -1], [0, 1])
        found.append(kernel(given.x, given.gates, rows, places=given.places, dtype=torch.bfloat16))
    native.set_threads(None)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


BAD_ROWS = {
    "a slot that is not there": ([4], [-1], [8]),
    "a state that is not there": ([4], [9], [0]),
    "a state over itself": ([4], [3], [3]),
    "fewer tokens": ([3], [-1], [0]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_lead_nowhere_are_refused(name: str) -> None:
    rows = rows_of(*BAD_ROWS[name])
    kernel, given = scan(FORMS["state space"]), Inputs.of(FORMS["state space"], 4, torch.float32)
    with pytest.raises(ValueError, match="outside its table"):
        kernel(given.x, given.gates, rows, places=given.places, dtype=torch.float32)
    with pytest.raises(ValueError, match="outside its table"):
        convolution(torch.float32, taps=4)(noise(4, 96, dtype=torch.float32), rows)


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        Convolution(torch.zeros(24, 4), None, slots=2, silu=False)
    with pytest.raises(ValueError, match="multiples of 16"):
        Scan(ScanForm(1, 1, 24, 16, delta=True, unit=True), slots=2)
    with pytest.raises(ValueError, match="must divide"):
        Scan(ScanForm(2, 3, 16, 16, delta=True, unit=True), slots=2)
    kernel, given = scan(FORMS["state space"]), Inputs.of(FORMS["state space"], 4, torch.float32)
    rows, how = rows_of([4], [-1], [0]), {"dtype": torch.float32}
    with pytest.raises(ValueError, match="lie within"):
        kernel(given.x, given.gates, rows, places=(0, 128, 300), **how)
    kernel = scan(FORMS["state space"])
    kernel(given.x, given.gates, rows, places=given.places, **how)
    with pytest.raises(ValueError, match="in every call"):
        kernel(given.x, given.gates, rows, places=(0, 1, 2), **how)


@pytest.mark.parametrize("counts", [[0, 3, 0], [0, 0, 0]])
def test_a_row_of_no_tokens_leaves_what_it_went_on_from(level: str, counts: list[int]) -> None:
    rows, tokens = rows_of(counts, [0, 1, -1], [4, 5, 6]), sum(counts)
    form = FORMS["delta rule"]
    given = Inputs.of(form, tokens, torch.float32)
    recurrence, one = scan(form), convolution(torch.float32, taps=4)
    for kernel in (recurrence, one):
        kernel.states[:2] = noise(2, *kernel.states.shape[1:], dtype=torch.float32)
    recurrence(given.x, given.gates, rows, places=given.places, dtype=torch.float32)
    one(noise(tokens, 96, dtype=torch.float32), rows)
    for kernel in (recurrence, one):
        assert torch.equal(kernel.states[4], kernel.states[0])
        assert torch.equal(kernel.states[5], kernel.states[1]) == (tokens == 0)
        assert not kernel.states[6].any()
