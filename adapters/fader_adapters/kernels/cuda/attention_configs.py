"""Tile sizes of the attention kernels by architecture and head size. Torch-free, no tuning at run
time; the numbers are starting points until a GPU has measured them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from fader_adapters.kernels.cuda.machines import ARCHS, Arch
from fader_adapters.kernels.cuda.shipped import Shipped

MAX_DIM: Final = 256
MAX_GROUP: Final = 64
"""Query heads a KV head: they share one prefill tile."""
NO_WINDOW: Final = 1 << 30
REDUCE_TILE: Final = 16
"""Splits the reduce kernel joins at once."""
REDUCE_WARPS: Final = 4
WRITE_BLOCK: Final = 1024
WRITE_WARPS: Final = 4
DECODE_PROGRAMS: Final = 4096
"""A decode grid stops growing here: its programs then take several splits each."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """block_m: lines of a tile, queries times heads (decode: 0, from the group); block_n: keys."""

    block_m: int
    block_n: int
    warps: int
    stages: int


_DECODE: Final = {  # (arch, padded head size)
    (80, 16): TileConfig(0, 64, 4, 4),
    (80, 32): TileConfig(0, 64, 4, 4),
    (80, 64): TileConfig(0, 64, 4, 4),
    (80, 128): TileConfig(0, 64, 4, 3),
    (80, 256): TileConfig(0, 32, 4, 3),
    (90, 16): TileConfig(0, 64, 4, 4),
    (90, 32): TileConfig(0, 64, 4, 4),
    (90, 64): TileConfig(0, 64, 4, 4),
    (90, 128): TileConfig(0, 64, 4, 3),
    (90, 256): TileConfig(0, 32, 4, 3),
}
_PREFILL: Final = {  # (arch, padded head size)
    (80, 16): TileConfig(64, 64, 4, 3),
    (80, 32): TileConfig(64, 64, 4, 3),
    (80, 64): TileConfig(128, 64, 8, 3),
    (80, 128): TileConfig(128, 64, 8, 3),
    (80, 256): TileConfig(64, 32, 8, 3),
    (90, 16): TileConfig(64, 64, 4, 3),
    (90, 32): TileConfig(64, 64, 4, 3),
    (90, 64): TileConfig(128, 64, 8, 3),
    (90, 128): TileConfig(128, 64, 8, 3),
    (90, 256): TileConfig(64, 32, 8, 3),
}
_PREFILL_SMALL: Final = TileConfig(64, 32, 8, 2)
"""Head sizes above 128 on machines that are not roomy: a stage less than the table's, which takes
1 KiB too much there. Half the keys at three stages would fit, too, and multiply most of a product
twice."""
_PREFILL_NARROW: Final = TileConfig(128, 32, 8, 3)
"""Head sizes 80 to 112 and capped 128: their masks and tanh take registers, which the wider tile
would spill on sm_80.
"""


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, at least `least`: what a tensor-core tile takes."""
    return max(least, 1 << (size - 1).bit_length())


def decode_config(arch: Arch, dim: int) -> TileConfig:
    """dim 16..256."""
    return _DECODE[arch, padded(dim)]


def prefill_config(arch: Arch, dim: int, capped: bool, *, roomy: bool = True) -> TileConfig:
    """As decode_config; capped: whether scores pass through tanh; roomy: see machines."""
    if padded(dim) > 128 and not roomy:
        return _PREFILL_SMALL
    narrow = padded(dim) == 128 and (dim < 128 or capped)
    return _PREFILL_NARROW if narrow else _PREFILL[arch, padded(dim)]


def least_split(dim: int) -> int:
    """Keys of a short row's split: about 64 KiB of bf16 keys and values a KV head."""
    return 128 if padded(dim) >= 128 else 256


def max_splits(kv_heads: int) -> int:
    """Splits of a long row: one row fills a large GPU, with no more partial sums than that."""
    return min(128, max(32, padded(512 // kv_heads)))


def split_keys(keys: int, *, dim: int, kv_heads: int) -> tuple[int, int]:
    """(keys a split, splits) of a decode row that sees `keys` keys; the kernels' own formula.

    A function of the row and the layer alone: neither the step nor the grid shows in the bits.
    """
    split, most = least_split(dim), max_splits(kv_heads)
    length = split * max(-(-keys // (split * most)), 1)
    return length, max(-(-keys // length), 1)


def most_splits(keys: int, *, dim: int, kv_heads: int) -> int:
    """The largest number of splits of any row that sees up to `keys` keys."""
    return min(max(-(-keys // least_split(dim)), 1), max_splits(kv_heads))


_COMMON: Final = {
    "q": "*bf16",
    "k_cache": "*bf16",
    "v_cache": "*bf16",
    "sinks": "*fp32",
    "out": "*bf16",
    "planes": "*fp32",
    "stats": "*fp32",
    "cu_tokens": "*i32",
    "contexts": "*i32",
    "tables": "*i32",
    "k": "*bf16",
    "v": "*bf16",
    "slots": "*i64",
    "scale": "fp32",
    "softcap": "fp32",
}
_SHAPES: Final = (  # kv_heads, group, head size, capped; the one that takes most is first
    (8, 2, 256, True),
    (4, 4, 16, False),
    (8, 4, 32, False),
    (4, 7, 48, False),
    (8, 4, 64, False),
    (8, 4, 64, True),
    (8, 2, 80, True),
    (4, 4, 192, True),
    (32, 1, 80, False),
    (32, 1, 96, False),
    (8, 4, 128, False),
    (4, 8, 128, False),
    (8, 3, 128, True),
    (8, 2, 192, False),
    (1, 4, 256, False),
)
_SINKS: Final = ((8, 8, 64, False), (8, 4, 128, False), (8, 2, 80, False))
"""The same, of layers with sinks."""


def shipped(page: int = 16) -> list[Shipped]:
    """Every tile configuration on typical head shapes, for ahead-of-time compilation."""
    found: dict[str, Shipped] = {}
    for arch in ARCHS:
        for entry in _entries(arch, page):
            found.setdefault(repr((entry.kernel.__name__, *entry[2:])), entry)
    return list(found.values())


def _entries(arch: Arch, page: int) -> Iterator[Shipped]:
    from fader_adapters.kernels.cuda import attention_kernels as kernels
    from fader_adapters.kernels.cuda.attention_prefill import prefill_kernel

    for place, shape in enumerate((*_SHAPES, *_SINKS)):
        kv_heads, group, dim, capped = shape
        none = {"sinks": None} if place < len(_SHAPES) else {}
        decode = decode_constants(arch, kv_heads, group, dim, page, capped) | none
        config = decode_config(arch, dim)
        yield _entry(kernels.decode_kernel, decode, config.warps, config.stages)
        both = [prefill_config(arch, dim, capped, roomy=roomy) for roomy in (True, False)]
        for config, roomy in zip(both, (True, False), strict=True):
            prefill = prefill_constants(config, kv_heads, group, dim, page, capped) | none
            entry = _entry(prefill_kernel, prefill, config.warps, config.stages)
            yield entry if both[0] == both[1] else entry._replace(roomy=roomy)
        reduce = reduce_constants(kv_heads, group, dim) | none
        yield _entry(kernels.reduce_kernel, reduce, REDUCE_WARPS, 1)
    write = {"KV_HEADS": 8, "DIM": 128, "BLOCK": WRITE_BLOCK}
    yield _entry(kernels.write_kernel, write, WRITE_WARPS, 1)


def _entry(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> Shipped:  # noqa: ANN401
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: _COMMON.get(name, "i32") for name in names}
    return Shipped(kernel, signature, constants, warps, stages)


def decode_constants(
    arch: Arch, kv_heads: int, group: int, dim: int, page: int, capped: bool
) -> dict[str, Any]:
    """The compile-time arguments of decode_kernel."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "GROUP_PAD": padded(group),
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "PAGE": page,
        "BLOCK_N": decode_config(arch, dim).block_n,
        "SPLIT": least_split(dim),
        "MAX_SPLITS": max_splits(kv_heads),
        "CAPPED": capped,
    }


def prefill_constants(
    config: TileConfig, kv_heads: int, group: int, dim: int, page: int, capped: bool
) -> dict[str, Any]:
    """The compile-time arguments of prefill_kernel."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "PAGE": page,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CAPPED": capped,
    }


def reduce_constants(kv_heads: int, group: int, dim: int) -> dict[str, Any]:
    """The compile-time arguments of reduce_kernel."""
    return {
        "HEADS": kv_heads * group,
        "DIM": dim,
        "DIM_PAD": padded(dim),
        "SPLIT": least_split(dim),
        "MAX_SPLITS": max_splits(kv_heads),
        "TILE": REDUCE_TILE,
    }
