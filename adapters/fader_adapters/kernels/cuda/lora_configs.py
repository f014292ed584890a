"""Launch configurations of the delta kernels: small frozen tables, no tuning at run time.

A configuration depends on the architecture, the phase and the site's shape, never on the number of
rows, so a decode row is computed alike in every step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from fader_adapters.kernels.cuda.shipped import Shipped
from fader_adapters.kernels.cuda.tiles import LANES, TileShape

Phase = Literal["decode", "prefill"]
Arch = Literal[80, 90]
T = TypeVar("T")

DECODE_TILE = TileShape(rows=LANES, group=2)
PREFILL_TILE = TileShape(rows=64, group=4)
TILE: Mapping[Phase, TileShape] = {"decode": DECODE_TILE, "prefill": PREFILL_TILE}

RESOLVE_BLOCK = 128
"""Entries a program of `resolve` looks up."""

RESOLVE_WARPS, RESOLVE_STAGES = 4, 2

VECTOR_COLUMNS: Mapping[Phase, int] = {"decode": 128, "prefill": 64}
"""Columns of a program of `vectors`."""

VECTORS_WARPS, VECTORS_STAGES = 4, 1

PICK_PROGRAMS, PICK_WARPS = 64, 4


@dataclass(frozen=True, slots=True)
class ShrinkConfig:
    """x·Aᵀ: `splits` planes along the input, at most `programs` programs a plane and member."""

    block_k: int
    splits: int
    programs: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """z·B: blocks of `block_n` columns."""

    block_n: int
    warps: int
    stages: int


SHRINK: Mapping[tuple[Arch, Phase], tuple[tuple[int, ShrinkConfig], ...]] = {
    (80, "decode"): (
        (8192, ShrinkConfig(128, 8, 32, 4, 4)),
        (1024, ShrinkConfig(128, 4, 32, 4, 4)),
        (0, ShrinkConfig(64, 1, 32, 4, 3)),
    ),
    (90, "decode"): (
        (8192, ShrinkConfig(128, 8, 32, 4, 4)),
        (1024, ShrinkConfig(128, 4, 32, 4, 4)),
        (0, ShrinkConfig(64, 1, 32, 4, 3)),
    ),
    (80, "prefill"): (
        (2048, ShrinkConfig(64, 4, 128, 4, 3)),
        (0, ShrinkConfig(64, 1, 256, 4, 3)),
    ),
    (90, "prefill"): (
        (2048, ShrinkConfig(128, 4, 128, 4, 3)),
        (0, ShrinkConfig(64, 1, 256, 4, 3)),
    ),
}
"""Rows of (least input width, configuration), widest first."""

EXPAND: Mapping[tuple[Arch, Phase], tuple[tuple[int, ExpandConfig], ...]] = {
    (80, "decode"): (
        (16384, ExpandConfig(128, 4, 5)),
        (8192, ExpandConfig(64, 4, 6)),
        (0, ExpandConfig(32, 4, 6)),
    ),
    (90, "decode"): (
        (16384, ExpandConfig(128, 4, 5)),
        (8192, ExpandConfig(64, 4, 6)),
        (0, ExpandConfig(32, 4, 6)),
    ),
    (80, "prefill"): ((0, ExpandConfig(128, 4, 3)),),
    # 64 columns until a GPU run clears 128 (wrong code was seen there elsewhere, vLLM #48590)
    (90, "prefill"): ((0, ExpandConfig(64, 4, 3)),),
}
"""Rows of (least output width of the site, configuration), widest first."""


def _choose(table: Sequence[tuple[int, T]], width: int) -> T:
    return next(config for least, config in table if width >= least)


@dataclass(frozen=True, slots=True)
class SiteConfigs:
    """What one site launches in each phase."""

    shrink: Mapping[Phase, ShrinkConfig]
    expand: Mapping[Phase, ExpandConfig]


def site_configs(arch: Arch, in_features: int, out_features: int) -> SiteConfigs:
    """The tables' choice for a site; `out_features` is the sum over its members."""
    return SiteConfigs(
        {phase: _choose(SHRINK[arch, phase], in_features) for phase in TILE},
        {phase: _choose(EXPAND[arch, phase], out_features) for phase in TILE},
    )


def arch_of(major: int, minor: int) -> Arch:
    """The table for a compute capability; newer ones use the newest table."""
    return 90 if (major, minor) >= (9, 0) else 80


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


def vectors_constants(phase: Phase, *, bias: bool) -> dict[str, int | bool]:
    """The constants of `vectors`; bias: whether the base has one."""
    rows = TILE[phase].rows
    columns = VECTOR_COLUMNS[phase]
    return {"ROWS": rows, "BLOCK_N": columns, "LANES": LANES, "HAS_BIAS": bias}


def pick_constants(phase: Phase) -> dict[str, int | bool]:
    """The constants of `pick`."""
    return {"ROWS": TILE[phase].rows, "GROUP": TILE[phase].group}


def unsplit(configs: SiteConfigs) -> SiteConfigs:
    """The same with one plane of `shrink`, as `pick` writes."""
    shrink: dict[Phase, ShrinkConfig] = {
        phase: replace(config, splits=1) for phase, config in configs.shrink.items()
    }
    return SiteConfigs(shrink, configs.expand)


def shipped() -> list[Shipped]:
    """Every bf16 variant that a table can launch, each once. Imports triton."""
    from fader_adapters.kernels.cuda import lora_kernels as kernels
    from fader_adapters.kernels.cuda.lora_lookup import pick
    from fader_adapters.kernels.cuda.lora_vectors import vectors

    both: tuple[Arch, ...] = (80, 90)
    block: dict[str, int | bool] = {"BLOCK": RESOLVE_BLOCK}
    signature = _signature(kernels.resolve, _RESOLVE, block)
    found = [Shipped(kernels.resolve, signature, block, RESOLVE_WARPS, RESOLVE_STAGES, both)]
    launch = (VECTORS_WARPS, VECTORS_STAGES)
    for phase in TILE:
        constants = pick_constants(phase)
        signature = _signature(pick, _SHRINK | {"ids": "*i64:16"}, constants)
        found.append(Shipped(pick, signature, constants, PICK_WARPS, 1, archs=both))
        for bias in (False, True):
            constants = vectors_constants(phase, bias=bias)
            signature = _signature(vectors, _VECTORS, constants)
            found.append(Shipped(vectors, signature, constants, *launch, archs=both))
    for arch, phase in SHRINK:
        shrinks = dict.fromkeys(config for _, config in SHRINK[arch, phase])
        for shrink in shrinks:
            constants = shrink_constants(shrink, phase, exact=False)
            signature = _signature(kernels.shrink, _SHRINK, constants)
            launch = (shrink.warps, shrink.stages)
            found.append(Shipped(kernels.shrink, signature, constants, *launch, archs=(arch,)))
        for splits in dict.fromkeys(config.splits for config in shrinks):
            for _, expand in EXPAND[arch, phase]:
                constants = expand_constants(expand, phase, splits=splits, exact=False)
                signature = _signature(kernels.expand, _EXPAND, constants)
                launch = (expand.warps, expand.stages)
                found.append(Shipped(kernels.expand, signature, constants, *launch, archs=(arch,)))
    return _joined(found)


_PHASE = dict.fromkeys(("tokens", "first", "last", "cell", "header"), "*i32:16")
_RESOLVE = (
    dict.fromkeys(("slot", "chunk", "rank", "in_features", "out_features", "left"), "*i32:16")
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

_VECTORS = _EXPAND | {"own": "*bf16:16"} | dict.fromkeys(("gain_at", "bias_at"), "*i64:16")


def _signature(
    kernel: Any,  # noqa: ANN401
    types: Mapping[Any, str],
    constants: Mapping[str, int | bool],
) -> dict[str, str]:
    names: Iterable[str] = kernel.arg_names
    return {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}


def _joined(found: Iterable[Shipped]) -> list[Shipped]:
    """Each variant once, with every architecture that launches it."""
    joined: dict[object, Shipped] = {}
    for entry in found:
        key = (entry.kernel.__name__, *entry.constexprs.items(), *entry[3:5])
        before = joined.get(key)
        archs = entry.archs if before is None else (*before.archs, *entry.archs)
        joined[key] = entry._replace(archs=archs)
    return list(joined.values())
