"""Which launch experts in NF4 take by machine, dtype and number of pairs. A frozen table, no
tuning; what it was chosen by is arithmetic, not a measurement."""

from collections.abc import Mapping
from typing import Any

from fader_adapters.kernels.cuda.nf4_configs import MULTIPROCESSORS, Launch
from fader_adapters.kernels.cuda.shipped import Shipped, joined, signature_of

LAUNCHES: Mapping[tuple[int, int], Launch] = {
    (90, 16): Launch(16, 128, 4, 6),
    (90, 32): Launch(32, 128, 4, 5),
    (90, 64): Launch(64, 128, 4, 4),
    (90, 128): Launch(128, 128, 8, 4),
    (80, 16): Launch(16, 128, 4, 6),
    (80, 32): Launch(32, 128, 4, 5),
    (80, 64): Launch(64, 128, 4, 4),
    (80, 128): Launch(128, 128, 8, 3),
}
"""(arch, most pairs of a tile) → launch, as of linears. One matrix instruction and one order of
sums for all of one arch, so that a pair's bits are the same whichever is taken."""

NARROW: Mapping[int, Launch] = {90: Launch(16, 64, 4, 6), 80: Launch(16, 64, 4, 6)}
"""For few pairs, whose tiles of 128 rows of W would leave multiprocessors idle: by half of them."""
AT_ONCE = 2
"""Programs that a multiprocessor needs to hide what each of them waits for."""

ROOM = 2
"""A tile holds so many times the pairs that meet in an expert on the average: a second tile of one
expert decodes its weights again."""

EXACT: Mapping[int, Launch] = {4: Launch(16, 64, 4, 2), 2: Launch(32, 64, 4, 3)}
"""Bytes of an element of x → the launch of dtypes and machines without one above."""


def launch(arch: int, pairs: int, experts: int, n: int) -> Launch:
    """The tile of `pairs` pairs over `experts` matrices [n, k] in bf16."""
    meet = ROOM * pairs / experts
    config = LAUNCHES[arch, next((b for b in (16, 32, 64) if meet <= b), 128)]
    programs = most_tiles(pairs, experts, config.bm) * -(-n // config.bn)
    few = config.bm == 16 and programs < AT_ONCE * MULTIPROCESSORS[arch]
    return NARROW[arch] if few else config


def most_tiles(pairs: int, experts: int, bm: int) -> int:
    """Tiles of bm pairs that there can be, wherever the pairs go: each expert with any begins one,
    and the last one of each may be all but empty."""
    return (pairs + min(pairs, experts) * (bm - 1)) // bm


def constants(config: Launch, *, bias: bool, exact: bool) -> dict[str, Any]:
    """The constants of nf4_experts."""
    return {
        "BM": config.bm,
        "BN": config.bn,
        "HAS_BIAS": bias,
        "EXACT": exact,
        "STAGES": config.stages,
    }


def shipped() -> list[Shipped]:
    """Every compilation that CudaNf4Stack can need on sm_80 and sm_90. Imports Triton."""
    from fader_adapters.kernels.cuda.nf4_expert_kernels import nf4_experts

    ours = [(config, "bf16", (arch,)) for (arch, _), config in LAUNCHES.items()]
    ours += [(config, "bf16", (arch,)) for arch, config in NARROW.items()]
    others = [(EXACT[2], "bf16"), (EXACT[2], "fp16"), (EXACT[4], "fp32")]
    found = []
    for config, dtype, archs in ours + [(*other, (80, 90)) for other in others]:
        exact = (config, dtype) in others
        for bias in (False, True):
            made = constants(config, bias=bias, exact=exact)
            types = {**_TYPES} | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}:16")
            signature = signature_of(nf4_experts, types, made)
            sizes = (config.warps, config.stages)
            found.append(Shipped(nf4_experts, signature, made, *sizes, archs=archs))
    return joined(found)


_TYPES: Mapping[str, str] = {
    "codes_ptr": "*u8:16",
    "scales_ptr": "*fp32:16",
    "table_ptr": "*fp32:16",
    "ends_ptr": "*i32:16",
    "n": "i32:16",
    "x_stride": "i32:16",
}
