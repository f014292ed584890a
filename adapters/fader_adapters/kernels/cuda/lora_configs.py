"""The compile-time arguments of the delta kernels, and every variant that can be launched."""

from collections.abc import Mapping

from fader_adapters.kernels.cuda import nf4_configs
from fader_adapters.kernels.cuda.lora_tables import (
    EXPAND,
    JOIN,
    SHRINK,
    TILE,
    ExpandConfig,
    Phase,
    ShrinkConfig,
    site_configs,
)
from fader_adapters.kernels.cuda.machines import ARCHS, Arch
from fader_adapters.kernels.cuda.shipped import Shipped, joined, signature_of
from fader_adapters.kernels.cuda.tiles import LANES
from fader_adapters.kernels.nf4 import BLOCK

RESOLVE_BLOCK = 128
"""Entries a program of `resolve` looks up."""

RESOLVE_WARPS, RESOLVE_STAGES = 4, 2

VECTOR_COLUMNS: Mapping[Phase, int] = {"decode": 64, "prefill": 32}
"""Columns of a program of `vectors`."""

VECTORS_WARPS, VECTORS_STAGES = 4, 1

PICK_PROGRAMS, PICK_WARPS = 64, 4


def shrink_constants(config: ShrinkConfig, phase: Phase, *, exact: bool) -> dict[str, int | bool]:
    """The constants of `shrink`; exact: float32 operands, multiplied as such."""
    tile = TILE[phase]
    return {
        "ROWS": tile.rows,
        "GROUP": tile.group,
        "BLOCK_K": config.block_k,
        "SPLITS": config.splits,
        "F32": exact,
    }


def expand_constants(
    config: ExpandConfig, phase: Phase, *, splits: int, exact: bool
) -> dict[str, int | bool]:
    """The constants of `expand`; splits: the planes that the site's `shrink` writes."""
    return {
        "ROWS": TILE[phase].rows,
        "BLOCK_N": config.block_n,
        "SPLITS": splits,
        "LANES": LANES,
        "F32": exact,
    }


def join_constants(*, planes: int, splits: int, bias: bool, exact: bool) -> dict[str, int | bool]:
    """The constants of `join`; planes: of the base's product; bias: whether the base has one."""
    own = expand_constants(JOIN, "decode", splits=splits, exact=exact)
    return own | {"PLANES": planes, "HAS_BIAS": bias}


def vectors_constants(phase: Phase, *, bias: bool) -> dict[str, int | bool]:
    """The constants of `vectors`; bias: whether the result holds the base's."""
    return {
        "ROWS": TILE[phase].rows,
        "BLOCK_N": VECTOR_COLUMNS[phase],
        "LANES": LANES,
        "HAS_BIAS": bias,
    }


def pick_constants(phase: Phase) -> dict[str, int | bool]:
    """The constants of `pick`."""
    return {"ROWS": TILE[phase].rows, "GROUP": TILE[phase].group}


def shipped() -> list[Shipped]:
    """Every bf16 variant that a table can launch, each once. Imports triton."""
    from fader_adapters.kernels.cuda import lora_expand as expands
    from fader_adapters.kernels.cuda import lora_kernels as kernels
    from fader_adapters.kernels.cuda.lora_lookup import pick
    from fader_adapters.kernels.cuda.lora_vectors import vectors

    block: dict[str, int | bool] = {"BLOCK": RESOLVE_BLOCK}
    signature = signature_of(kernels.resolve, _RESOLVE, block)
    found = [Shipped(kernels.resolve, signature, block, RESOLVE_WARPS, RESOLVE_STAGES)]
    launch = (VECTORS_WARPS, VECTORS_STAGES)
    for phase in TILE:
        constants = pick_constants(phase)
        signature = signature_of(pick, _SHRINK | {"ids": "*i64:16"}, constants)
        found.append(Shipped(pick, signature, constants, PICK_WARPS, 1))
        for bias in (False, True):
            constants = vectors_constants(phase, bias=bias)
            signature = signature_of(vectors, _VECTORS, constants)
            found.append(Shipped(vectors, signature, constants, *launch))
    constants = vectors_constants("decode", bias=False)
    signature = signature_of(vectors, _VECTORS | {"y": "*fp32:16"}, constants)
    found.append(Shipped(vectors, signature, constants, *launch))
    for arch, phase in SHRINK:
        shrinks = dict.fromkeys(config for _, config in SHRINK[arch, phase])
        for shrink in shrinks:
            constants = shrink_constants(shrink, phase, exact=False)
            signature = signature_of(kernels.shrink, _SHRINK, constants)
            launch = (shrink.warps, shrink.stages)
            found.append(Shipped(kernels.shrink, signature, constants, *launch, archs=(arch,)))
        for splits in dict.fromkeys(config.splits for config in shrinks):
            for _, expand in EXPAND[arch, phase]:
                constants = expand_constants(expand, phase, splits=splits, exact=False)
                signature = signature_of(expands.expand, _EXPAND, constants)
                launch = (expand.warps, expand.stages)
                found.append(Shipped(expands.expand, signature, constants, *launch, archs=(arch,)))
    for arch in ARCHS:
        for planes, splits in _joins(arch):
            for bias in (False, True):
                constants = join_constants(planes=planes, splits=splits, bias=bias, exact=False)
                signature = signature_of(expands.join, _JOIN, constants)
                launch = (JOIN.warps, JOIN.stages)
                found.append(Shipped(expands.join, signature, constants, *launch, archs=(arch,)))
    return joined(found)


def _joins(arch: Arch) -> list[tuple[int, int]]:
    """(planes of the product, of `shrink`) that some shape leads to: widths that lie between two of
    these are cut like one of them."""
    seen = set()
    for blocks in (8, 16, 24, 32, 40, 48, 56, 64, 128):
        for tiles in range(1, nf4_configs.MULTIPROCESSORS[arch] + 1):
            n, k = tiles * nf4_configs.TILE_ROWS, blocks * BLOCK
            planes = -(-blocks // nf4_configs.split_blocks(arch, n, k))
            seen.add((planes, site_configs(arch, k, n).shrink["decode"].splits))
    return sorted(entry for entry in seen if entry[0] > 1)


_PHASE = dict.fromkeys(("tokens", "first", "last", "cell", "header"), "*i32:16")
_RESOLVE = (
    dict.fromkeys(
        ("slot", "chunk", "rank", "in_features", "out_features", "left", "rank_at"), "*i32:16"
    )
    | dict.fromkeys(
        (f"{what}_{where}" for what in ("a", "b", "gain", "bias") for where in ("offset", "at")),
        "*i64:16",
    )
    | dict.fromkeys(("scale", "scale_at"), "*fp32:16")
)
_SHRINK = _PHASE | {
    "x": "*bf16:16",
    "arena": "*bf16:16",
    "z": "*fp32:16",
    "a_at": "*i64:16",
    "left": "*i32:16",
    "width": "i32:16",
    "x_stride": "i32:16",
}
_EXPAND = _PHASE | {
    "y": "*bf16:16",
    "arena": "*bf16:16",
    "z": "*fp32:16",
    "gamma": "*fp32:16",
    "b_at": "*i64:16",
    "left": "*i32:16",
    "scale_at": "*fp32:16",
    "y_stride": "i32:16",
    **dict.fromkeys(("width_0", "width_1", "width_2", "width_3"), "i32:16"),
}

_JOIN = _EXPAND | {
    "out": "*bf16:16",
    "planes": "*fp32:16",
    "own": "*bf16:16",
    "columns": "i32:16",
}
_VECTORS = _EXPAND | {"own": "*bf16:16"} | dict.fromkeys(("gain_at", "bias_at"), "*i64:16")
