"""Which NF4 kernel runs for which machine and shape, and how. Frozen tables, no tuning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fader_adapters.kernels.cuda.machines import Arch
from fader_adapters.kernels.cuda.shipped import Shipped
from fader_adapters.kernels.nf4 import BLOCK

Method = Literal["triton", "bitsandbytes", "scratch"]

DECODE_ROWS = 64
"""Up to this many rows a row's bits do not depend on the number of rows."""

FUSED_ROWS = 128
"""Beyond this many rows W is dequantised once into a scratch and multiplied by the vendor's GEMM:
there the fused kernel would decode every weight once for each tile of rows."""

SUM_COLUMNS = 1024
DENSE_ROWS = 64
"""Columns of a program of nf4_sum, rows of a program of nf4_dense."""

SMALL_WARPS = 4
"""Warps of those two."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How nf4_gemm runs: rows of x and of W in a tile, warps, and stages of its pipeline."""

    bm: int
    bn: int
    warps: int
    stages: int


LAUNCHES: Mapping[tuple[Arch, int], Launch] = {
    (90, 16): Launch(16, 128, 4, 6),
    (90, 32): Launch(32, 128, 4, 5),
    (90, 64): Launch(64, 128, 4, 4),
    (90, 128): Launch(128, 128, 8, 4),
    (80, 16): Launch(16, 128, 4, 6),
    (80, 32): Launch(32, 128, 4, 5),
    (80, 64): Launch(64, 128, 4, 4),
    (80, 128): Launch(128, 128, 8, 3),
}
"""(arch, most rows) → launch. All tiles of one arch use one matrix instruction, so that their bits
agree; tiles of fewer than 16 rows would fall from wgmma to mma.sync on sm_90."""

MULTIPROCESSORS: Mapping[Arch, int] = {80: 108, 90: 132}
"""Of the largest card, as a constant: a row's bits depend on the split, so the split must not
depend on the card a server happens to run on."""

LEAST_SPLIT_BLOCKS = 8
MOST_SPLITS = 8
TILE_ROWS = 128
"""Of W that a program takes at a time, a block of columns each."""
AT_ONCE = 2
"""Programs that a multiprocessor needs to hide what each of them waits for."""
PLANE_COST = 0.02
"""Of a product, for each plane that is written and read."""

METHODS: Mapping[tuple[Arch, int, int], Method] = {}
"""(arch, n, k) → the method of up to FUSED_ROWS rows, where it is not the default."""


def method(arch: Arch | None, n: int, k: int, rows: int) -> Method:
    """How x [rows, k] is multiplied by W [n, k] in bf16 on `arch`; None: on an unchecked machine.

    bitsandbytes serves every number of rows, as it keeps the weight in another form and chooses
    among its own kernels. It is the default wherever ours were never compiled and checked.
    """
    if arch is None:
        return "bitsandbytes"
    chosen = METHODS.get((arch, n, k), "triton")
    return "scratch" if chosen == "triton" and rows > FUSED_ROWS else chosen


def launch(arch: Arch, rows: int) -> Launch:
    """The tile for this many rows; more rows than the largest tile take several of those."""
    bucket = next((b for b in (16, 32, 64) if rows <= b), 128)
    return LAUNCHES[arch, bucket]


def splits(arch: Arch, n: int, k: int) -> int:
    """Parts that k is cut into, each summed by programs of its own; 1 where n fills the machine.

    The number that leaves the busiest multiprocessor with the least work. Depends on the shape
    only, so that a row's sums are cut alike in every step.
    """
    tiles, most = -(-n // TILE_ROWS), k // BLOCK // LEAST_SPLIT_BLOCKS
    if tiles >= MULTIPROCESSORS[arch] or most < 2:
        return 1

    def work(count: int) -> float:
        programs = -(-count * tiles // MULTIPROCESSORS[arch])
        return max(AT_ONCE, programs) / count * (1 + PLANE_COST * count)

    return min(range(1, min(most, MOST_SPLITS) + 1), key=work)


def split_blocks(arch: Arch, n: int, k: int) -> int:
    """Blocks of columns that one split covers; the last may cover fewer."""
    return -(-(k // BLOCK) // splits(arch, n, k))


def gemm_constants(config: Launch, *, bias: bool, exact: bool) -> dict[str, Any]:
    """The constants of nf4_gemm."""
    return {
        "BM": config.bm,
        "BN": config.bn,
        "HAS_BIAS": bias,
        "EXACT": exact,
        "STAGES": config.stages,
    }


def sum_constants(planes: int, *, bias: bool) -> dict[str, Any]:
    """The constants of nf4_sum."""
    return {"SPLITS": planes, "HAS_BIAS": bias, "BLOCK": SUM_COLUMNS}


def dense_constants() -> dict[str, Any]:
    """The constants of nf4_dense."""
    return {"ROWS": DENSE_ROWS}


def shipped() -> list[Shipped]:
    """Every compilation that Nf4Linear can need in bf16. Imports Triton."""
    from fader_adapters.kernels.cuda import nf4_kernels as kernels

    found = []
    for (arch, _), config in LAUNCHES.items():
        for out, bias in (("fp32", False), ("bf16", False), ("bf16", True)):
            signature = _GEMM | {"out_ptr": f"*{out}:16"}
            constants = gemm_constants(config, bias=bias, exact=False)
            entry = (kernels.nf4_gemm, signature, constants, config.warps, config.stages)
            found.append(Shipped(*entry, archs=(arch,), codes=True))
    for planes in range(2, MOST_SPLITS + 1):
        for bias in (False, True):
            constants = sum_constants(planes, bias=bias)
            found.append(Shipped(kernels.nf4_sum, _SUM, constants, SMALL_WARPS, 1))
    for out in ("bf16", "fp16", "fp32"):
        signature = _DENSE | {"out_ptr": f"*{out}:16"}
        found.append(Shipped(kernels.nf4_dense, signature, dense_constants(), SMALL_WARPS, 1))
    return found


_WEIGHT = {"codes_ptr": "*u8:16", "scales_ptr": "*fp32:16", "table_ptr": "*fp32:16"}
_GEMM = {
    "x_ptr": "*bf16:16",
    **_WEIGHT,
    "bias_ptr": "*bf16:16",
    "rows": "i32",
    "n": "i32:16",
    "blocks": "i32",
    "split_blocks": "i32",
    "x_stride": "i32:16",
    **{f"w{i}": "i32" for i in range(8)},
}
_SUM = {
    "planes_ptr": "*fp32:16",
    "bias_ptr": "*bf16:16",
    "out_ptr": "*bf16:16",
    "rows": "i32",
    "n": "i32:16",
}
_DENSE = {**_WEIGHT, "n": "i32:16", "blocks": "i32", "first_tile": "i32"}
