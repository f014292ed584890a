"""Which launch a delta takes by machine, phase and shape: small frozen tables, no tuning.

A configuration depends on the architecture, the phase and the site's shape, never on the number of
rows, so a decode row is computed alike in every step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from fader_adapters.kernels.cuda.machines import Arch
from fader_adapters.kernels.cuda.tiles import LANES, TileShape

Phase = Literal["decode", "prefill"]
T = TypeVar("T")

DECODE_TILE = TileShape(rows=LANES, group=2, most=2048)
PREFILL_TILE = TileShape(rows=64, group=4, most=1024)
"""At most 64 MiB of scratch at the widest site, and as much at experts of which 8 are chosen. A
step with more is computed piece by piece, with the same bits: counted in a start's plan instead,
its worst case (512 tokens, 8 terms of rank 512 in every row) would take a GiB from every server's
cache. A list of more entries than that in one tile, of more than 32 such terms in a prompt, takes
scratch of its own length.
"""
TILE: Mapping[Phase, TileShape] = {"decode": DECODE_TILE, "prefill": PREFILL_TILE}


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


JOIN = ExpandConfig(32, 4, 4)
"""Of the kernel that also sums the base's planes, at any width: what it holds of those leaves no
registers for more columns."""


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


def unsplit(configs: SiteConfigs) -> SiteConfigs:
    """The same with one plane of `shrink`, as `pick` writes."""
    shrink: dict[Phase, ShrinkConfig] = {
        phase: replace(config, splits=1) for phase, config in configs.shrink.items()
    }
    return SiteConfigs(shrink, configs.expand)
