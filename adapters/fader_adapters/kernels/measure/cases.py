"""What is timed: the NF4 GEMM and sites of adapters, weights streamed from DRAM, and the rest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import modules
from torch import Tensor

from fader_adapters.kernels import native
from fader_adapters.kernels.measure import weights
from fader_adapters.kernels.measure.limits import Limits
from fader_adapters.kernels.measure.timing import Call, Timing, interleave


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. Shapes are (n, k) of weights, contexts and queries are tokens."""

    shapes: tuple[tuple[int, int], ...] = ((2048, 2048), (5632, 2048), (4096, 4096))
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 128)
    sites: tuple[tuple[int, int], ...] = ((2048, 2048), (4096, 4096))
    head: tuple[int, int] = (32000, 2048)
    attention: tuple[tuple[int, int, int], ...] = ((1, 1, 2048), (8, 1, 512), (1, 256, 256))
    """(rows, queries a row, context)"""
    quantise: tuple[int, int] = (2048, 2048)
    streamed: int = 192 << 20
    """Bytes of weights to cycle through, so that they come from DRAM."""


def gemm(sizes: Sizes, repeats: int, limits: Limits) -> Iterator[Timing]:
    """Base GEMM: native, torch bf16, bitsandbytes' packed path where the machine has it, limits."""
    for n, k in sizes.shapes:
        weight, packed, absmax = weights.quantised(n, k)
        workspace = native.Workspace()
        made = weights.copies(weight, sizes.streamed)
        sites = cycle([native.Site(one, workspace=workspace) for one in made])
        count = max(2, sizes.streamed // (2 * n * k))
        wide = cycle([torch.randn(n, k).bfloat16() for _ in range(count)])
        peer = None
        if native.best_isa() == "avx512_bf16" and n % 32 == 0:
            dense = native.dequantise_nf4(packed, absmax, (n, k))
            peer = _bitsandbytes(dense, len(made))
        for rows in sizes.rows:
            x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n, dtype=torch.bfloat16)
            methods: dict[str, Call] = {
                "native": lambda x=x, out=out, sites=sites: next(sites)(x, out=out),
                "torch bf16": lambda x=x, wide=wide: torch.mm(x, next(wide).T),
            }
            if peer is not None:
                methods["bitsandbytes"] = peer(x)
            case = f"gemm {n}x{k} M={rows}"
            yield from interleave(case, methods | limits.methods, repeats)


def _bitsandbytes(weight: Tensor, count: int) -> Callable[[Tensor], Call]:
    """bitsandbytes' packed CPU path on `count` Linear4bit of its own."""
    params: Any = modules.Params4bit  # its keywords pass through __new__
    n, k = weight.shape
    layers = []
    for _ in range(count):
        layer = modules.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
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
            call()  # the first call of a layer repacks it
        return call

    return bind


def sites(sizes: Sizes, repeats: int) -> Iterator[Timing]:
    """A site with r = 16 adapters on 8 rows: none, 8 distinct ones, two terms a row."""
    one = [[(i, 1.0)] for i in range(8)]
    two = [[(i, 1.0), ((i + 3) % 8, 0.5)] for i in range(8)]
    for n, k in sizes.sites:
        weight, _, _ = weights.quantised(n, k)
        workspace = native.Workspace()
        tables = weights.adapters(8, 16, n, k)
        made = weights.copies(weight, sizes.streamed)
        turn = cycle([native.Site(one, tables, workspace=workspace) for one in made])
        x, out = torch.randn(8, k).bfloat16(), torch.empty(8, n, dtype=torch.bfloat16)
        steps = {
            "base": None,
            "8 adapters": weights.step(one, slots=8),
            "8 adapters, 2 terms": weights.step(two, slots=8),
        }
        methods: dict[str, Call] = {
            name: lambda x=x, out=out, step=step, turn=turn: next(turn)(x, step, out=out)
            for name, step in steps.items()
        }
        yield from interleave(f"site {n}x{k} r=16 M=8", methods, repeats)


def rest(sizes: Sizes, repeats: int) -> Iterator[Timing]:
    """Output layer, attention, quantiser."""
    n, k = sizes.head
    head = torch.randn(n, k).bfloat16()
    packed = native.Site(native.PlainPanels.pack(head, store=native.PanelStore()))
    for rows in (1, 8, 16):
        x = torch.randn(rows, k).bfloat16()
        methods: dict[str, Call] = {
            "native": lambda x=x: packed(x),
            "torch bf16": lambda x=x: torch.mm(x, head.T),
        }
        yield from interleave(f"lm_head {n}x{k} M={rows}", methods, repeats)
    for rows, queries, context in sizes.attention:
        (keys, values), tables = weights.cache(rows, context, kv_heads=4, dim=64)
        layer = native.PagedAttention(keys, values, heads=32, scale=0.125)
        q = torch.randn(rows * queries, 32, 64).bfloat16()
        where = {
            "q_start": torch.arange(rows + 1, dtype=torch.int32) * queries,
            "context": torch.full((rows,), context, dtype=torch.int32),
            "block_tables": tables,
        }
        methods = {"native": lambda layer=layer, q=q, where=where: layer(q, **where)}
        case = f"attention 32/4x64 rows={rows} queries={queries} context={context}"
        yield from interleave(case, methods, repeats)
    weight = torch.randn(*sizes.quantise).bfloat16()
    methods = {
        "native": lambda: native.quantise_nf4(weight),
        "bitsandbytes": lambda: bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64),
    }
    yield from interleave("quantise {}x{}".format(*sizes.quantise), methods, repeats)
