"""Which launch a stack's deltas take by machine and phase, and every variant of them.

As with other deltas a configuration never depends on the number of rows, so a pair is computed
alike in every step. How many pairs a program takes does, and changes no bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fader_adapters.kernels.cuda.lora_tables import TILE, ExpandConfig, Phase
from fader_adapters.kernels.cuda.machines import Arch
from fader_adapters.kernels.cuda.shipped import Shipped, joined, signature_of

MOST_PAIRS: Mapping[Phase, int] = {"decode": 1, "prefill": 16}
"""Pairs of a program: those of rows of one token have lists and experts of their own."""

BUSY = 64
"""Programs from which on a list is not shared out among several."""

MOST_PARTS = 4

EXACT_BLOCK = 32
"""Columns that float32 operands are multiplied by at a time: more do not fit into registers."""


@dataclass(frozen=True, slots=True)
class ExpertShrink:
    """x·Aᵀ: `splits` planes along the input."""

    block_k: int
    splits: int
    warps: int
    stages: int


SHRINK: Mapping[tuple[Arch, Phase], ExpertShrink] = {
    (80, "decode"): ExpertShrink(128, 4, 4, 3),
    (90, "decode"): ExpertShrink(128, 4, 4, 3),
    (80, "prefill"): ExpertShrink(128, 2, 4, 3),
    (90, "prefill"): ExpertShrink(128, 2, 4, 3),
}
"""One for any width: a split that is left without columns gives zeros."""

EXPAND: Mapping[tuple[Arch, Phase], ExpandConfig] = {
    (80, "decode"): ExpandConfig(32, 4, 3),
    (90, "decode"): ExpandConfig(32, 4, 3),
    (80, "prefill"): ExpandConfig(128, 4, 3),
    # as with other deltas, 64 columns until a GPU run clears 128
    (90, "prefill"): ExpandConfig(64, 4, 3),
}


@dataclass(frozen=True, slots=True)
class ExpertConfigs:
    """What one stack launches in each phase."""

    shrink: Mapping[Phase, ExpertShrink]
    expand: Mapping[Phase, ExpandConfig]


def expert_configs(arch: Arch) -> ExpertConfigs:
    """The tables' choice for a stack."""
    return ExpertConfigs(
        {phase: SHRINK[arch, phase] for phase in TILE},
        {phase: EXPAND[arch, phase] for phase in TILE},
    )


def pairs_of_program(phase: Phase, pairs: int, experts: int) -> int:
    """As many as meet in an expert, more or less; a power of two."""
    meet = max(1, pairs // experts)
    return min(MOST_PAIRS[phase], 1 << (meet.bit_length() - 1))


def parts_of_list(programs: int) -> int:
    """Programs that share a list's entries, where there are few otherwise; a power of two."""
    parts = max(1, min(MOST_PARTS, BUSY // programs))
    return 1 << (parts.bit_length() - 1)


def shrink_constants(config: ExpertShrink, phase: Phase, *, exact: bool) -> dict[str, int | bool]:
    """The constants of `expert_shrink`; exact: operands as float32."""
    return {
        "TILE": TILE[phase].rows,
        "BLOCK_K": EXACT_BLOCK if exact else config.block_k,
        "SPLITS": config.splits,
        "F32": exact,
    }


def expand_constants(
    config: ExpandConfig, phase: Phase, *, splits: int, exact: bool
) -> dict[str, int | bool]:
    """The constants of `expert_expand`; splits: the planes that `expert_shrink` writes."""
    return {
        "TILE": TILE[phase].rows,
        "BLOCK_N": EXACT_BLOCK if exact else config.block_n,
        "SPLITS": splits,
        "F32": exact,
    }


def shipped() -> list[Shipped]:
    """Every variant of a bf16 arena that a table can launch, of bf16 activations and, as some
    routers have them, of float32 ones. Imports triton."""
    from fader_adapters.kernels.cuda.expert_kernels import expert_expand, expert_shrink

    found = []
    for (arch, phase), shrink in SHRINK.items():
        expand = EXPAND[arch, phase]
        for exact in (False, True):
            types = {**_TYPES} | dict.fromkeys("xy", "*fp32:16" if exact else "*bf16:16")
            made = shrink_constants(shrink, phase, exact=exact)
            signature = signature_of(expert_shrink, types, made)
            launch = (shrink.warps, shrink.stages)
            found.append(Shipped(expert_shrink, signature, made, *launch, archs=(arch,)))
            made = expand_constants(expand, phase, splits=shrink.splits, exact=exact)
            signature = signature_of(expert_expand, types, made)
            launch = (expand.warps, expand.stages)
            found.append(Shipped(expert_expand, signature, made, *launch, archs=(arch,)))
    return joined(found)


_TYPES: Mapping[str, str] = (
    dict.fromkeys(("place", "first", "last", "cell", "left", "rank_at"), "*i32:16")
    | dict.fromkeys(("order", "expert", "a_at", "b_at"), "*i64:16")
    | dict.fromkeys(("z", "gamma", "scale_at"), "*fp32:16")
    | dict.fromkeys(("width", "x_stride", "y_stride"), "i32:16")
    | {"arena": "*bf16:16"}
)
