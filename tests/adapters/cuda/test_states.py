"""States of sequences by the CUDA kernels, interpreted: convolutions and gated recurrences against
plain torch in fp64, and the same bits however a sequence is cut."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels.cuda import states_configs
from fader_adapters.kernels.cuda.states import CudaConvolution, CudaScan
from fader_adapters.kernels.native import ScanForm, StateRows
from tests.adapters.native.test_native_states import (
    FORMS,
    Inputs,
    convolved,
    noise,
    rows_of,
    scanned,
)

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]
CPU, FP32 = torch.device("cpu"), torch.float32
FORMS = FORMS | {"keys between powers of two": ScanForm(1, 2, 80, 24, delta=True, unit=True)}
STEPS = {
    "one token": [1],
    "rows of one token": [1] * 7,
    "a prompt": [63],
    "one long row": [131, 1, 1],
    "mixed": [1, 9, 4, 2, 17],
}
QUICK = {"mixed"}
SWEEP = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in STEPS]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted ones take their time: wide blocks, whose last ones are not full."""
    monkeypatch.setattr(states_configs, "VALUES", 32)
    monkeypatch.setattr(states_configs, "CHANNELS", 64)


def between_nans(x: torch.Tensor) -> torch.Tensor:
    """The same rows, strided, NaN before and behind each."""
    wide = torch.full((len(x) + 2, x.shape[1] + 24), torch.nan)
    inner = wide[1:-1, 8 : 8 + x.shape[1]]
    return inner.copy_(x)


def scan(form: ScanForm, skip: torch.Tensor | None = None) -> CudaScan:
    kernel = CudaScan(form, slots=8, skip=skip, device=CPU)
    kernel.states.fill_(torch.nan)
    return kernel


def convolution(*, taps: int = 4, silu: bool = False, biased: bool = True) -> CudaConvolution:
    weight, bias = noise(96, taps, dtype=FP32, seed=1), noise(96, dtype=FP32, seed=2)
    kernel = CudaConvolution(weight, bias if biased else None, slots=8, silu=silu)
    kernel.states.fill_(torch.nan)
    return kernel


def fresh(counts: list[int]) -> StateRows:
    return rows_of(counts, [-1] * len(counts), list(range(len(counts))))


def cuts(counts: list[int]) -> list[tuple[int, int]]:
    return [(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]


@pytest.mark.parametrize("step", SWEEP)
@pytest.mark.parametrize("name", FORMS)
def test_a_scan_is_the_recurrence_of_its_definition(name: str, step: str) -> None:
    form, counts = FORMS[name], STEPS[step]
    skip = None if form.delta else noise(form.heads, dtype=FP32, seed=9)
    kernel, given = scan(form, skip), Inputs.of(form, sum(counts), FP32)
    how = {"places": given.places, "dtype": FP32}
    found = kernel(between_nans(given.x), given.gates, fresh(counts), **how)
    parts = [scanned(form, given.part(*cut), skip) for cut in cuts(counts)]
    bound = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found.double(), torch.cat(parts), **bound)
    if len(counts) > 1:
        joined = scanned(form, given, skip)
        assert not torch.allclose(found.double(), joined, **bound), "rows have states of their own"


@pytest.mark.parametrize("step", SWEEP)
@pytest.mark.parametrize(
    ("taps", "silu", "biased"), [(2, False, True), (3, False, False), (4, True, True)]
)
def test_rows_are_convolved_each_by_itself(
    taps: int, silu: bool, biased: bool, step: str
) -> None:  # fmt: skip
    counts = STEPS[step]
    kernel, x = convolution(taps=taps, silu=silu, biased=biased), noise(sum(counts), 96, dtype=FP32)
    found = kernel(between_nans(x), fresh(counts)).double()
    weight, bias = noise(96, taps, dtype=FP32, seed=1), noise(96, dtype=FP32, seed=2)
    own = [convolved(x[a:b], weight, bias if biased else None) for a, b in cuts(counts)]
    expected, joined = torch.cat(own), convolved(x, weight, bias if biased else None)
    if silu:
        expected, joined = F.silu(expected), F.silu(joined)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.allclose(found, joined, atol=1e-5) == (len(counts) == 1)


@pytest.mark.parametrize("name", FORMS)
def test_a_sequence_cut_in_rows_has_the_bits_of_the_whole_in_any_company(name: str) -> None:
    form = FORMS[name]
    kernel, given, other = scan(form), Inputs.of(form, 12, FP32), Inputs.of(form, 3, FP32, seed=50)
    how = {"places": given.places, "dtype": FP32}
    whole = kernel(given.x, given.gates, rows_of([12], [-1], [7]), **how)
    found, at, slot = [], 0, -1
    for i, count in enumerate((4, 1, 1, 6)):
        own = given.part(at, at + count)
        x, gates = torch.cat([other.x, own.x]), torch.cat([other.gates, own.gates])
        found.append(kernel(x, gates, rows_of([3, count], [-1, slot], [6, i]), **how)[3:])
        at, slot = at + count, i
    assert torch.equal(torch.cat(found), whole)
    assert torch.equal(kernel.states[3], kernel.states[7])
    again = kernel(given.x[6:], given.gates[6:], rows_of([6], [2], [5]), **how)
    assert torch.equal(again, whole[6:]), "the state it went on from is as it was"
    elsewhere = kernel(given.x[6:], given.gates[6:], rows_of([6], [6], [4]), **how)
    assert not torch.equal(elsewhere, whole[6:])


def test_a_convolution_cut_in_rows_gives_the_bits_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, x = convolution(silu=True), noise(12, 96, dtype=FP32)
    whole = kernel(x, rows_of([12], [-1], [7]))
    parts, at, slot = [], 0, -1
    for i, count in enumerate((1, 1, 2, 5, 3)):
        parts.append(kernel(x[at : at + count], rows_of([count], [slot], [i])))
        at, slot = at + count, i
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(kernel.states[4], kernel.states[7])
    assert not torch.equal(kernel.states[3], kernel.states[7])
    for programs in (1, 5, 40):
        monkeypatch.setattr(states_configs, "parts", lambda *_, programs=programs: programs)
        assert torch.equal(kernel(x, rows_of([12], [-1], [6])), whole)
        assert torch.equal(kernel.states[6], kernel.states[7])


def test_padding_goes_on_from_nothing_and_leaves_nothing() -> None:
    form = FORMS["delta rule"]
    recurrence, one, given = scan(form), convolution(), Inputs.of(form, 6, FP32)
    x = noise(6, 96, dtype=FP32)
    rows = rows_of([2, 1, 0], [-1, -1, -1], [3, -1, -1])
    found = recurrence(given.x, given.gates, rows, places=given.places, dtype=FP32)
    convolved_ = one(x, rows)
    for kernel, out in ((recurrence, found), (one, convolved_)):
        assert not out[3:].any(), "tokens of no row"
        assert out[:3].all()
        left = [bool(state.isnan().any()) for state in kernel.states]
        assert left == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize("counts", [[0, 3, 0], [0, 0, 0]])
def test_a_row_of_no_tokens_leaves_what_it_went_on_from(counts: list[int]) -> None:
    rows, tokens, form = rows_of(counts, [0, 1, -1], [4, 5, 6]), sum(counts), FORMS["delta rule"]
    recurrence, one, given = scan(form), convolution(), Inputs.of(form, tokens, FP32)
    for kernel in (recurrence, one):
        kernel.states[:2] = noise(2, *kernel.states.shape[1:], dtype=FP32)
    recurrence(given.x, given.gates, rows, places=given.places, dtype=FP32)
    one(noise(tokens, 96, dtype=FP32), rows)
    for kernel in (recurrence, one):
        assert torch.equal(kernel.states[4], kernel.states[0])
        assert torch.equal(kernel.states[5], kernel.states[1]) == (tokens == 0)
        assert not kernel.states[6].any()


def test_what_slots_hold_stays_when_there_are_more() -> None:
    form = FORMS["state space"]
    kernel, given = scan(form), Inputs.of(form, 6, FP32)
    how = {"places": given.places, "dtype": FP32}
    whole = kernel(given.x, given.gates, rows_of([6], [-1], [0]), **how)
    kernel(given.x[:4], given.gates[:4], rows_of([4], [-1], [7]), **how)
    kernel.grow(40)
    assert torch.equal(
        kernel(given.x[4:], given.gates[4:], rows_of([2], [7], [39]), **how), whole[4:]
    )


def test_the_widths_that_are_shipped_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS["decay by key"]
    given, found = Inputs.of(form, 3, FP32), []
    for width in (32, 8):
        monkeypatch.setattr(states_configs, "VALUES", width)
        found.append(scan(form)(given.x, given.gates, fresh([3]), places=given.places, dtype=FP32))
    torch.testing.assert_close(*found)


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    with pytest.raises(KernelUnavailable, match="at most 256"):
        scan(dataclasses.replace(FORMS["delta rule"], keys=272))
    with pytest.raises(KernelUnavailable, match="divide the heads"):
        scan(dataclasses.replace(FORMS["delta rule"], groups=3))
    with pytest.raises(ValueError, match="one tap"):
        CudaConvolution(torch.zeros(16, 1), None, slots=2, silu=False)


def test_every_kernel_and_kind_of_recurrence_is_shipped() -> None:
    kinds = {
        (entry.constexprs["DELTA"], entry.constexprs["BY_KEY"], entry.constexprs["SKIPS"])
        for entry in states_configs.shipped()
        if "DELTA" in entry.constexprs
    }
    assert kinds == {(True, False, False), (True, True, False), (False, False, True)}
    taps = {entry.constexprs.get("TAPS") for entry in states_configs.shipped()}
    assert taps == {3, 4, None}
