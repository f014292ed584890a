"""One run from parity to table. Knows what the figures depend on."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby

import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels import native
from fader_adapters.kernels.measure import cases, parity
from fader_adapters.kernels.measure.cases import Sizes
from fader_adapters.kernels.measure.limits import DOT, READ, Limits, Reached
from fader_adapters.kernels.measure.quiet import QUIET, Others
from fader_adapters.kernels.measure.timing import Timing

BYTES = 0.5625
"""Of NF4 panels and their scales, a weight."""


@dataclass(frozen=True, slots=True)
class Report:
    """Under which limits, how wrong, and how fast."""

    kernels: dict[str, str | int]
    parity: dict[str, float]
    limits: dict[str, Reached]
    """By case; only the GEMMs have them."""
    repeats: int
    others: float
    """Share of the processors that other processes used meanwhile."""
    timings: list[Timing]

    @property
    def quiet(self) -> bool:
        """Whether the figures may be quoted."""
        return self.others <= QUIET


def run(sizes: Sizes | None = None, *, repeats: int = 30) -> Report:
    """Parity, limits, then every timing, with torch's number of threads; repeats at least 2.

    Raises KernelUnavailable without the library, ParityFailed when a kernel is wrong.
    """
    if not native.available():
        raise KernelUnavailable(f"there are no native kernels to measure: {native.reason()}")
    sizes = sizes or Sizes()
    before = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        errors = parity.prove()
        limits, others = Limits(sizes.streamed, torch.get_num_threads()), Others()
        products = list(cases.gemm(sizes, repeats, limits))
        timings = [
            *products,
            *cases.sites(sizes, repeats),
            *cases.rest(sizes, max(4, repeats // 4)),
        ]
    finally:
        torch.set_rng_state(before)
    reached = {case: limits.reached(list(group)) for case, group in groupby(products, _case)}
    return Report(_kernels(), errors, reached, repeats, others.share(), timings)


def _case(timing: Timing) -> str:
    return timing.case


def _kernels() -> dict[str, str | int]:
    versions = {name: metadata.version(name) for name in ("torch", "bitsandbytes")}
    return {"isa": native.isa(), "threads": torch.get_num_threads(), **versions}


def lines(report: Report) -> Iterator[str]:
    """The report as text: for each case its methods, what native gains, its share of the limits."""
    yield ", ".join(f"{key} {value}" for key, value in report.kernels.items())
    told = (f"{key} {value:.1e} ≤ {parity.BOUNDS[key]:.0e}" for key, value in report.parity.items())
    yield f"parity: {', '.join(told)}"
    read = sorted(reached.read_gb_s for reached in report.limits.values())
    dot = sorted(reached.dot_gflop_s for reached in report.limits.values())
    yield f"limits over the run: read {read[0]:.1f} to {read[-1]:.1f} GB/s"
    yield f"                     dot {dot[0]:.0f} to {dot[-1]:.0f} GFLOP/s"
    yield f"medians of {report.repeats} turns of calls in a row; ± half the middle half"
    for case, group in groupby(report.timings, _case):
        timings = [timing for timing in group if timing.method not in (READ, DOT)]
        first = timings[0]
        for timing in timings:
            ratio = timing.median_ms / first.median_ms
            if timing is not first:
                note = f"native ×{ratio:.2f}" if first.method == "native" else f"×{ratio:.2f}"
            elif case in report.limits:
                note = share(case, timing.median_ms, report.limits[case])
            else:
                note = ""
            figures = f"{timing.median_ms:9.3f} ms ±{timing.spread / 2:4.0%}"
            yield f"{case:52} {timing.method:20} {figures}  {note}".rstrip()
    yield f"others used {report.others:.0%} of the processors"
    if not report.quiet:
        yield "note: the machine was not quiet, do not quote these figures"


def share(case: str, ms: float, reached: Reached) -> str:
    """How near a GEMM case "gemm NxK M=rows" of `ms` is to what the machine could do then."""
    _, shape, rows = case.split()
    n, k = map(int, shape.split("x"))
    moved = n * k * BYTES / ms / 1e6
    work = 2 * n * k * int(rows.removeprefix("M=")) / ms / 1e6
    parts = f"{moved / reached.read_gb_s:4.0%} of read, {work / reached.dot_gflop_s:4.0%} of dot"
    return f"{moved:5.1f} GB/s = {parts}"
