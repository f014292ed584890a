"""Figures of the copy bandwidth and of NF4 products, by rows, against their peers."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from bench.gpu.parity import check_nf4, demand, limit
from bench.gpu.section import ParityFailed, Result, Rig, gate
from bench.gpu.shapes import LLAMA_8B, SITE_NAMES, SMALL, SPLIT, Shape
from bench.gpu.timing import Times, bandwidth, captured, turns
from bench.gpu.weights import nf4_weight, rms
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.nf4 import Nf4Weight, dense

Product = Callable[[torch.Tensor], torch.Tensor]


def shape_of(rig: Rig) -> Shape:
    if not rig.small:
        return LLAMA_8B
    return SPLIT if rig.on_gpu else SMALL


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
