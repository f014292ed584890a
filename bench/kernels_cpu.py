"""Times the native CPU kernels beside torch, bitsandbytes and the machine's own limits, after a
parity check.

`python bench/kernels_cpu.py --json out.json`; `run()` and `table()` serve a command line. Knows
kernels, no server."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fader_adapters.kernels import native
from fader_adapters.kernels.native.library import library

SHAPES = ((2048, 2048), (5632, 2048), (4096, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 128)
STREAMED = 192 << 20  # bytes of weights to cycle through, so that they come from DRAM
Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one method on one case: median, fastest, and the middle half's width over
    the median."""

    case: str
    method: str
    median_ms: float
    best_ms: float
    spread: float


@dataclass(frozen=True)
class Report:
    """One run: where, under which limits, and every timing."""

    machine: dict[str, str]
    limits: dict[str, float]
    parity: dict[str, float]
    timings: list[Timing]


def interleave(case: str, methods: dict[str, Call], repeats: int) -> list[Timing]:
    """Time `methods` in turn, so that a noisy moment falls on all of them."""
    for call in methods.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, call in methods.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    out = []
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        out.append(Timing(case, name, middle * 1e3, min(values) * 1e3, (high - low) / middle))
    return out


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = lines[0].split(":", 1)[1].strip() if lines else cpu
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": native.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }


def limits(repeats: int) -> dict[str, float]:
    """Best seen DRAM read (GB/s) and bf16 dot products (GFLOP/s) with torch's number of threads."""
    lib, threads = library(), torch.get_num_threads()
    data = native.PanelStore().take(STREAMED).fill_(1)
    flops = lib.fader_probe_dot(20_000, threads)
    read = interleave(
        "", {"r": lambda: lib.fader_probe_read(data.data_ptr(), STREAMED, threads)}, repeats
    )
    dot = interleave("", {"d": lambda: lib.fader_probe_dot(20_000, threads)}, repeats)
    return {
        "read_gb_s": STREAMED / read[0].best_ms / 1e6,
        "dot_gflop_s": flops / dot[0].best_ms / 1e6,
    }


def panels(n: int, k: int) -> tuple[native.Nf4Panels, native.Quantised]:
    """Random NF4 weights."""
    q = native.quantise_nf4(torch.randn(n, k))
    if q.absmax is None:
        raise TypeError("plain quantisation gives absmax")
    return native.Nf4Panels.from_bnb(q.packed, q.absmax, n, k), q


def clone(w: native.Nf4Panels, copies: int) -> list[native.Nf4Panels]:
    """`copies` of w in huge pages, as a model keeps its weights; peers allocate as they do."""
    store = native.PanelStore()
    out = []
    for _ in range(copies):
        panels = store.take(w.panels.nbytes).view_as(w.panels).copy_(w.panels)
        scales = store.take(w.scales.nbytes).view(torch.float32).view_as(w.scales).copy_(w.scales)
        out.append(native.Nf4Panels(panels, scales, w.n, w.k))
    return out


def rms(got: Tensor, want: Tensor) -> float:
    """Root mean square error relative to `want`'s."""
    return float((got.double() - want).pow(2).mean().sqrt() / want.pow(2).mean().sqrt())


def adapters(slots: int, rank: int, n: int, k: int) -> native.SiteTables:
    """`slots` random bf16 adapters of one rank for one linear."""
    size = rank * (n + k)
    a_off = torch.arange(slots)[:, None] * size
    ranks = torch.full((slots, 1), rank, dtype=torch.int32)
    arena = (torch.randn(slots * size) * 0.02).bfloat16()
    return native.SiteTables(arena, a_off, a_off + rank * k, ranks, torch.ones(slots, 1), [(0, n)])


def parity() -> dict[str, float]:
    """Relative errors against float64; raises if one is out of bounds, so that no number is
    printed for wrong work."""
    w, _ = panels(512, 512)
    x = torch.randn(37, 512).bfloat16()
    want = x.double() @ w.dense(torch.float32).double().T
    tables = adapters(8, 16, 512, 512)
    blends = [[(i % 8, 1.0)] for i in range(37)]
    y = native.delta(torch.zeros(37, 512), x, tables, plan(blends))
    exact = torch.zeros(37, 512, dtype=torch.float64)
    for i in range(37):
        at = int(tables.a_off[i % 8, 0])
        a, b = tables.arena[at : at + 16 * 1024].double().view(2, 16, 512)
        exact[i] = (x[i].double() @ a.T) @ b
    errors = {"gemm": rms(native.gemm(x, w), want), "delta": rms(y, exact)}
    if errors["gemm"] > 2e-3 or errors["delta"] > 1e-5:
        raise RuntimeError(f"parity failed: {errors}")
    return errors


def plan(blends: list[list[tuple[int, float]]]) -> native.StepPlan:
    """One token a row, 16 slots at most."""
    return native.StepPlan.of(blends, list(range(len(blends))), slots=8)


def bitsandbytes_calls(
    q: native.Quantised, n: int, k: int, copies: int
) -> Callable[[Tensor], Call] | None:
    """bitsandbytes' packed CPU path on its own Linear4bit, None where this machine lacks it."""
    from bitsandbytes.nn import modules

    if native.best_isa() != "avx512_bf16" or n % 32:
        return None
    params: Any = modules.Params4bit  # its keywords pass through __new__
    layers = []
    for _ in range(copies):
        layer = modules.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = (
            native.dequantise_nf4(q.packed, q.absmax, (n, k))
            if q.absmax is not None
            else torch.randn(n, k)
        )
        layer.weight = params(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=False
        )
        layers.append(layer.to("cpu").eval())

    def bind(x: Tensor) -> Call:
        turn = cycle(layers)

        def call() -> object:
            with torch.inference_mode():
                return next(turn)(x)

        for _ in layers:
            call()
        return call

    return bind


def gemm_timings(repeats: int) -> Iterator[Timing]:
    """Base GEMM: native, torch bf16, bitsandbytes packed; weights streamed from DRAM."""
    for n, k in SHAPES:
        w, q = panels(n, k)
        workspace = native.Workspace()
        copies = max(2, STREAMED // w.nbytes)
        clones = clone(w, copies)
        sites = cycle([native.Site(c, workspace=workspace) for c in clones])
        wide = cycle([torch.randn(n, k).bfloat16() for _ in range(max(2, STREAMED // (2 * n * k)))])
        peer = bitsandbytes_calls(q, n, k, copies)
        for rows in ROWS:
            x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)
            methods: dict[str, Call] = {
                "native": lambda x=x, out=out, sites=sites: next(sites)(x, out=out),
                "torch bf16": lambda x=x, wide=wide: torch.mm(x, next(wide).T),
            }
            if peer is not None:
                methods["bitsandbytes"] = peer(x)
            yield from interleave(f"gemm {n}x{k} M={rows}", methods, repeats)


def delta_timings(repeats: int) -> Iterator[Timing]:
    """A site with r = 16 adapters: none, 8 distinct on 8 rows, two terms a row."""
    one = [[(i, 1.0)] for i in range(8)]
    two = [[(i, 1.0), ((i + 3) % 8, 0.5)] for i in range(8)]
    for n, k in ((2048, 2048), (4096, 4096)):
        w, _ = panels(n, k)
        workspace = native.Workspace()
        copies = max(2, STREAMED // w.nbytes)
        clones = clone(w, copies)
        sites = cycle([native.Site(c, adapters(8, 16, n, k), workspace=workspace) for c in clones])
        x, out = torch.randn(8, k).bfloat16(), torch.empty(8, n, dtype=torch.bfloat16)
        methods: dict[str, Call] = {
            "base": lambda x=x, out=out, sites=sites: next(sites)(x, out=out)
        }
        for name, blends in (("8 adapters", one), ("8 adapters, 2 terms", two)):
            step = plan(blends)
            methods[name] = lambda x=x, out=out, step=step, sites=sites: next(sites)(
                x, step, out=out
            )
        yield from interleave(f"site {n}x{k} r=16 M=8", methods, repeats)


def other_timings(repeats: int) -> Iterator[Timing]:
    """lm_head, attention, quantiser."""
    head = native.PanelStore().take(32000 * 2048 * 2).view(torch.bfloat16).view(32000, 2048)
    head.copy_(torch.randn(32000, 2048))
    for rows in (1, 8, 16):
        x = torch.randn(rows, 2048).bfloat16()
        methods: dict[str, Call] = {
            "native": lambda x=x: native.dense(x, head),
            "torch bf16": lambda x=x: torch.mm(x, head.T),
        }
        yield from interleave(f"lm_head 32000x2048 M={rows}", methods, max(4, repeats // 4))
    for rows, queries, context in ((1, 1, 2048), (8, 1, 512), (1, 256, 256)):
        columns = -(-context // 16)
        cache = torch.randn(2, rows * columns, 16, 4, 64).bfloat16()
        layer = native.PagedAttention(cache[0], cache[1], heads=32, scale=0.125)
        q = torch.randn(rows * queries, 32, 64).bfloat16()
        where = {
            "q_start": torch.arange(rows + 1, dtype=torch.int32) * queries,
            "context": torch.full((rows,), context, dtype=torch.int32),
            "block_tables": torch.randperm(rows * columns).int().reshape(rows, columns),
        }
        methods = {"native": lambda layer=layer, q=q, where=where: layer(q, **where)}
        yield from interleave(
            f"attention 32/4x64 rows={rows} queries={queries} context={context}", methods, repeats
        )
    import bitsandbytes.functional as bnb

    weight = torch.randn(2048, 2048).bfloat16()
    methods = {
        "native": lambda: native.quantise_nf4(weight),
        "bitsandbytes": lambda: bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64),
    }
    yield from interleave("quantise 2048x2048", methods, max(4, repeats // 4))


def run(repeats: int = 30) -> Report:
    """Parity, limits, then every timing. Raises: RuntimeError without the library or when parity
    fails."""
    torch.manual_seed(0)
    errors, bounds = parity(), limits(repeats)
    timings = [*gemm_timings(repeats), *delta_timings(repeats), *other_timings(repeats)]
    return Report(machine(), bounds, errors, timings)


def table(report: Report) -> str:
    """The report as text; GB/s and the share of the dot limit for the GEMM rows."""
    lines = [f"{key}: {value}" for key, value in report.machine.items()]
    lines += [f"{key}: {value:.1f}" for key, value in report.limits.items()]
    lines += [f"parity {key}: {value:.1e}" for key, value in report.parity.items()]
    for t in report.timings:
        note = ""
        if t.case.startswith("gemm") and t.method == "native":
            n, k = map(int, t.case.split()[1].split("x"))
            rows = int(t.case.split("=")[1])
            speed, work = n * k * 0.5625 / t.median_ms / 1e6, 2 * n * k * rows / t.median_ms / 1e6
            note = (
                f"  {speed:5.1f} GB/s = {speed / report.limits['read_gb_s']:4.0%} of read"
                f", {work / report.limits['dot_gflop_s']:4.0%} of dot"
            )
        lines.append(f"{t.case:58} {t.method:20} {t.median_ms:9.3f} ms  ±{t.spread / 2:4.0%}{note}")
    return "\n".join(lines)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = run(args.repeats)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    sys.stdout.write(table(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
