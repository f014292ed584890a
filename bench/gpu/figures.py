"""Figures of kernels: NF4 products by rows against their peers, deltas by what a step holds."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from bench.gpu.parity import check_lora, check_nf4, demand, limit
from bench.gpu.section import ParityFailed, Result, Rig, gate
from bench.gpu.shapes import LLAMA_8B, SITE_NAMES, SMALL, Shape
from bench.gpu.timing import Times, bandwidth, captured, turns
from bench.gpu.weights import base_of, nf4_weight, publish_adapters, rms
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.lora import DeltaKernels, delta
from fader_adapters.kernels.nf4 import Nf4Weight, dense
from fader_adapters.spec import RowTerms, StepTerms

Product = Callable[[torch.Tensor], torch.Tensor]


def shape_of(rig: Rig) -> Shape:
    return SMALL if rig.small else LLAMA_8B


def measure_bandwidth(rig: Rig, result: Result) -> None:
    """What the device copies: the ceiling of everything that streams weights."""
    rate = bandwidth(rig)
    result.add(f"copy bandwidth {rate / 1e9:.0f} GB/s (read + written)", copy_gb_per_s=rate / 1e9)


def measure_nf4(rig: Rig, result: Result) -> None:
    """Every site's product by rows: ours, the dequantised way, bitsandbytes, bf16."""
    gate(check_nf4, rig, result)
    scratch = nf4.Scratch(rig.device)
    sizes = (1, 4) if rig.small else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
    for name, (width, outs) in zip(SITE_NAMES, shape_of(rig).sites, strict=True):
        out = sum(outs)
        weights = [nf4_weight(out, width, rig) for _ in range(turns(out * width * 9 // 16, rig))]
        ours = [nf4.Nf4Linear([w], None, scratch) for w in weights]
        ways: dict[str, list[Product]] = {
            "fader": list(ours),
            "scratch": [_scratched(linear) for linear in ours],
        }
        if _bitsandbytes(weights[0], rig):
            ways["bitsandbytes"] = [nf4.BitsandbytesLinear([w], None) for w in weights]
        plain = [
            dense_weight(w, rig.dtype, scratch) for w in weights[: turns(2 * out * width, rig)]
        ]
        ways["dense"] = [_dense(w) for w in plain]
        for rows in sizes:
            rig.check_time()
            _measure_rows(rig, result, name, rows, ways, nbytes=ours[0].nbytes)


def _measure_rows(
    rig: Rig,
    result: Result,
    name: str,
    rows: int,
    ways: dict[str, list[Product]],
    *,
    nbytes: int,
) -> None:
    width = ways["fader"][0].in_features  # pyright: ignore[reportFunctionMemberAccess]
    x = torch.randn(rows, width, device=rig.device).to(rig.dtype)
    want = ways["dense"][0](x)
    times: dict[str, Times] = {}
    for way, products in list(ways.items()):
        try:
            demand(rms(products[0](x), want), 3 * limit(rig), f"{way} {name} at {rows} rows")
            times[way] = captured(rig, [_call(product, x) for product in products])
        except (RuntimeError, ParityFailed) as error:
            if way != "bitsandbytes":
                raise
            del ways[way]  # a peer that fails costs its own figures
            result.add(f"bitsandbytes {name} at {rows} rows: {type(error).__name__}: {error}"[:200])
    ours = times["fader"].median
    share = nbytes / bandwidth(rig) * 1e3 / ours
    figure = {"site": name, "rows": rows, "roofline_share": round(share, 4)}
    for way, found in times.items():
        figure |= found.facts(way)
    told = f"NF4 {name} M={rows}: {ours * 1e3:.0f} µs, {share:.0%} of copy bandwidth"
    for way in ("bitsandbytes", "dense"):
        if way in times:
            told += f", {times[way].median / ours:.2f}× as fast as {way}"
    result.add(told if rows in (1, 8, 32, 2048) or rig.small else None, **figure)


def dense_weight(weight: Nf4Weight, dtype: torch.dtype, scratch: nf4.Scratch) -> torch.Tensor:
    """W [out, in] in the activations' dtype."""
    return nf4.Nf4Linear([weight], None, scratch).dense(dtype)


def _dense(weight: torch.Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _scratched(linear: nf4.Nf4Linear) -> Product:
    def run(x: torch.Tensor) -> torch.Tensor:
        return linear.through_scratch(x, x.new_empty(x.shape[0], linear.out_features))

    return run


def _call(product: Product, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: product(x)


def _bitsandbytes(weight: Nf4Weight, rig: Rig) -> bool:
    """Whether bitsandbytes is there and multiplies on this device."""
    try:
        import bitsandbytes  # noqa: F401

        dense(weight, rig.dtype)
        x = torch.ones(1, weight.in_features, dtype=rig.dtype, device=rig.device)
        nf4.BitsandbytesLinear([weight], None)(x)
    except Exception:  # noqa: BLE001 - whatever keeps it from running, it is no peer here
        return False
    return rig.on_gpu


def measure_lora(rig: Rig, result: Result) -> None:
    """A decoder layer's four sites with deltas over the same without, by rank, rows and blends."""
    gate(check_lora, rig, result)
    layers = 1 if rig.small else 8
    shape = shape_of(rig)
    base, sites = base_of(shape.sites * layers)
    scratch = nf4.Scratch(rig.device)
    linears = [
        nf4.Nf4Linear([nf4_weight(sum(s.out_features), s.in_features, rig)], None, scratch)
        for s in sites
    ]
    arch = None if rig.on_gpu else 80
    entries = 16 if rig.small else 2048
    for rank, rows, distinct, terms in _loads(rig):
        rig.check_time()
        slots = max(distinct, terms)
        tables = publish_adapters(base, (rank,) * slots, rig)
        kernels = DeltaKernels(rig.device, rig.dtype, arch=arch, entries=entries)
        bound = [kernels.bind(site) for site in sites]
        step = kernels.prepare(
            tables,
            StepTerms(
                tuple(
                    RowTerms(1, tuple(((i + j) % slots, 0.5 + j) for j in range(terms)))
                    for i in range(rows)
                )
            ),
        )
        assert step is not None
        inputs = [torch.randn(rows, s.in_features, device=rig.device).to(rig.dtype) for s in sites]

        def plain(inputs: list[torch.Tensor] = inputs) -> None:
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)

        def adapted(
            inputs: list[torch.Tensor] = inputs,
            bound: list = bound,
            step: object = step,
        ) -> None:
            for linear, site, x in zip(linears, bound, inputs, strict=True):
                y = linear(x)
                delta(y, x, site, step)  # pyright: ignore[reportArgumentType]

        without, with_deltas = captured(rig, [plain]), captured(rig, [adapted])
        ratio = with_deltas.median / without.median
        result.add(
            f"deltas r={rank} rows={rows} adapters={distinct} terms={terms}: {ratio:.3f}× base",
            rank=rank,
            rows=rows,
            distinct=distinct,
            terms=terms,
            bucket=step.bucket,
            ratio=round(ratio, 4),
            **without.facts("base"),
            **with_deltas.facts("adapted"),
        )


def _loads(rig: Rig) -> tuple[tuple[int, int, int, int], ...]:
    """(rank, rows, distinct adapters, terms a row)"""
    if rig.small:
        return ((8, 2, 2, 1), (8, 2, 2, 2))
    return (
        (16, 1, 1, 1),
        (16, 8, 8, 1),
        (16, 32, 1, 1),
        (16, 32, 8, 1),
        (16, 32, 32, 1),
        (16, 32, 32, 2),
        (16, 32, 8, 2),
        (8, 32, 32, 1),
        (64, 32, 8, 1),
        (64, 1, 1, 1),
        (16, 64, 64, 1),
    )
