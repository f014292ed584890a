"""Other ways of NF4 products than those of the tables and constants: what they would gain."""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.figures import Product, shape_of
from bench.gpu.parity import check_nf4, demand, limit
from bench.gpu.section import Result, Rig, gate
from bench.gpu.shapes import SITE_NAMES
from bench.gpu.timing import captured, turns
from bench.gpu.weights import nf4_weight, rms
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.nf4_configs import LEAST_SPLIT_BLOCKS, Launch
from fader_adapters.kernels.nf4 import Nf4Weight

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
SCRATCHES = (24, 48, 96, 256)
"""MiB"""
PIPELINES = ((4, 4), (4, 6), (8, 4), (2, 6))
"""(warps, stages)"""


def sweep_nf4(rig: Rig, result: Result) -> None:
    """Every site by splits, warps and stages, beside the tables' choice, each checked first.

    The tables hold one number of splits a shape, so the best for all rows together is told, too.
    """
    gate(check_nf4, rig, result)
    for name, (width, outs) in zip(SITE_NAMES, shape_of(rig).sites, strict=True):
        out = sum(outs)
        count = turns(out * width * 9 // 16, rig)
        scratch = nf4.Scratch(rig.device)
        scratch.way = "fused"
        linears = [
            nf4.Nf4Linear([nf4_weight(out, width, rig)], None, scratch) for _ in range(count)
        ]
        dense = linears[0].dense(rig.dtype)
        by_choice: dict[tuple[int, int, int], list[float]] = {}
        for rows in (1,) if rig.small else (1, 8, 32):
            x = torch.randn(rows, width, device=rig.device).to(rig.dtype)
            want = x @ dense.T
            shipped = _time(rig, linears, x, want, name)
            for splits, warps, stages in _choices(rig, width):
                rig.check_time()
                launch = Launch(max(16, rows), 128, warps, stages)
                others = [one.relaunched(splits=splits, launch=launch) for one in linears]
                told = f"{name} in {splits} splits by {launch}"
                median = _time(rig, others, x, want, told)
                by_choice.setdefault((splits, warps, stages), []).append(median / shipped)
                result.add(
                    site=name, rows=rows, splits=splits, warps=warps, stages=stages,
                    median_ms=round(median, 5), of_shipped=round(median / shipped, 4),
                )  # fmt: skip
            best = min(by_choice, key=lambda choice: by_choice[choice][-1])
            result.add(
                f"sweep {name} M={rows}: shipped {shipped * 1e3:.1f} µs; best splits, warps, "
                f"stages {best}: {by_choice[best][-1]:.2f}× of it"
            )
        best = min(by_choice, key=lambda choice: sum(by_choice[choice]))
        mean = sum(by_choice[best]) / len(by_choice[best])
        result.add(f"sweep {name}, all rows: {best}, {mean:.2f}× of shipped")


def sweep_prefill(rig: Rig, result: Result) -> None:
    """Products of prompts by the bytes of the scratch, and by the fused kernel, beside bf16; over
    weights that take turns."""
    gate(check_nf4, rig, result)
    totals: dict[str, float] = {}
    for name, (width, outs) in zip(SITE_NAMES, shape_of(rig).sites, strict=True):
        count = turns(sum(outs) * width * 9 // 16, rig)
        ways = _ways([nf4_weight(sum(outs), width, rig) for _ in range(count)], rig)
        for rows in (20,) if rig.small else (256, 512):
            x = torch.randn(rows, width, device=rig.device).to(rig.dtype)
            want = ways["bf16"][-1](x)
            for told, products in ways.items():
                rig.check_time()
                error = rms(products[-1](x), want)
                demand(error, 3 * limit(rig), f"{name} of {rows} rows, {told}")
                works = [partial(product, x) for product in products]
                median = captured(rig, works, repeats=10).median
                key = f"{rows} rows, {told}"
                totals[key] = totals.get(key, 0.0) + median
                result.add(site=name, rows=rows, way=told, median_ms=round(median, 5))
    for key, total in totals.items():
        bf16 = totals[f"{key.split(',')[0]}, bf16"]
        result.add(f"a layer's linears, {key}: {total:.3f} ms, {bf16 / total:.2f} of bf16's speed")


def _ways(weights: list[Nf4Weight], rig: Rig) -> dict[str, list[Product]]:
    """The weights in bf16, by the fused kernel, and through scratches of each size."""

    def linears(way: nf4.Way, nbytes: int) -> list[nf4.Nf4Linear]:
        scratch = nf4.Scratch(rig.device, nbytes)
        scratch.way = way
        return [nf4.Nf4Linear([weight], None, scratch) for weight in weights]

    fused = linears("fused", SCRATCHES[0] << 20)
    plain = [partial(_plain, one.dense(rig.dtype)) for one in fused]
    pieces = {f"{size} MiB": linears("pieces", size << 20) for size in SCRATCHES}
    return {"bf16": plain, "fused": fused, **pieces}


def _plain(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x @ weight.T


def _choices(rig: Rig, width: int) -> Iterator[tuple[int, int, int]]:
    for warps, stages in PIPELINES[:1] if rig.small else PIPELINES:
        for splits in SPLITS:
            if splits == 1 or width // 64 // splits >= LEAST_SPLIT_BLOCKS:
                yield splits, warps, stages


def _time(
    rig: Rig, linears: list[nf4.Nf4Linear], x: torch.Tensor, want: torch.Tensor, told: str
) -> float:
    """Median milliseconds of a product that was right."""
    demand(rms(linears[0](x), want), 3 * limit(rig), told)
    works = [lambda linear=linear: linear(x) for linear in linears]
    return captured(rig, works, repeats=10).median
