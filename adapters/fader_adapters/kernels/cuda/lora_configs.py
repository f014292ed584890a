"""Launch configurations of the delta kernels: small frozen tables, no tuning at run time.

A configuration depends on the architecture, the phase and the site's shape, never on the number of
rows, so a decode row is computed alike in every step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from fader_adapters.kernels.cuda.tiles import LANES, TileShape

Phase = Literal["decode", "prefill"]
Arch = Literal[80, 90]
T = TypeVar("T")

DECODE_TILE = TileShape(rows=LANES, group=2)
PREFILL_TILE = TileShape(rows=64, group=4)
TILE: Mapping[Phase, TileShape] = {"decode": DECODE_TILE, "prefill": PREFILL_TILE}

RESOLVE_BLOCK = 128
"""Entries a program of `resolve` looks up."""


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
        (16384, ExpandConfig(128, 4, 4)),
        (8192, ExpandConfig(64, 4, 4)),
        (0, ExpandConfig(32, 4, 4)),
    ),
    (90, "decode"): (
        (16384, ExpandConfig(128, 4, 4)),
        (8192, ExpandConfig(64, 4, 4)),
        (0, ExpandConfig(32, 4, 4)),
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


class Shipped(NamedTuple):
    """One compiled variant: what the ahead-of-time test builds."""

    kernel: Any
    signature: dict[str, str]
    """Type of every argument by name; "constexpr" for those in `constexprs`."""
    constexprs: dict[str, int | bool]
    num_warps: int
    num_stages: int


def shipped() -> list[Shipped]:
    """Every bf16 variant that a table can launch, each once. Imports triton."""
    from fader_adapters.kernels.cuda import lora_kernels as kernels

    found = [_shipped(kernels.resolve, _RESOLVE, {"BLOCK": RESOLVE_BLOCK}, 4, 2)]
    for arch, phase in SHRINK:
        rows = TILE[phase].rows
        shrinks = {config for _, config in SHRINK[arch, phase]}
        for shrink in shrinks:
            shape = {"ROWS": rows, "GROUP": TILE[phase].group, "BLOCK_K": shrink.block_k}
            shape |= {"SPLITS": shrink.splits, "F32": False}
            found.append(_shipped(kernels.shrink, _SHRINK, shape, shrink.warps, shrink.stages))
        for splits in {config.splits for config in shrinks}:
            for expand in {config for _, config in EXPAND[arch, phase]}:
                shape = {"ROWS": rows, "BLOCK_N": expand.block_n, "SPLITS": splits}
                shape |= {"LANES": LANES, "F32": False}
                found.append(_shipped(kernels.expand, _EXPAND, shape, expand.warps, expand.stages))
    return _unique(found)


_PHASE = dict.fromkeys(("header", "tokens", "first", "last", "cell"), "*i32")
_RESOLVE = (
    dict.fromkeys(("slot", "chunk", "rank", "in_features", "out_features", "left"), "*i32")
    | dict.fromkeys(("a_offset", "b_offset", "a_at", "b_at"), "*i64")
    | dict.fromkeys(("scale", "scale_at"), "*fp32")
)
_SHRINK = _PHASE | {"x": "*bf16", "arena": "*bf16", "z": "*fp32", "a_at": "*i64", "left": "*i32"}
_EXPAND = (
    _PHASE
    | {"y": "*bf16", "arena": "*bf16", "z": "*fp32", "gamma": "*fp32"}
    | {"b_at": "*i64", "left": "*i32", "scale_at": "*fp32"}
)


def _shipped(
    kernel: Any,  # noqa: ANN401
    pointers: Mapping[Any, str],
    constexprs: dict[str, int | bool],
    warps: int,
    stages: int,
) -> Shipped:
    names: Iterable[str] = kernel.arg_names
    signature = {
        name: "constexpr" if name in constexprs else pointers.get(name, "i32") for name in names
    }
    return Shipped(kernel, signature, constexprs, warps, stages)


def _unique(found: list[Shipped]) -> list[Shipped]:
    return list(
        {
            (s.kernel.__name__, *s.constexprs.items(), s.num_warps, s.num_stages): s for s in found
        }.values()
    )
