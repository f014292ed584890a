"""Which launch experts in NF4 take by machine, dtype and number of pairs. A frozen table, no
tuning; what it was chosen by is arithmetic, not a measurement."""

from collections.abc import Mapping
from typing import Any

from fader_adapters.kernels.cuda import nf4_configs as linears
from fader_adapters.kernels.cuda.machines import ARCHS, Arch
from fader_adapters.kernels.cuda.nf4_configs import Launch
from fader_adapters.kernels.cuda.shipped import Shipped, joined, signature_of

NARROW: Mapping[Arch, Launch] = {90: Launch(16, 64, 4, 6), 80: Launch(16, 64, 4, 6)}
"""For few pairs, whose tiles of 128 rows of W would leave multiprocessors idle: by half of them."""

ROOM = 2
"""A tile holds so many times the pairs that meet in an expert on the average: a second tile of one
expert decodes its weights again."""

EXACT: Mapping[int, Launch] = {4: Launch(16, 64, 4, 2), 2: Launch(32, 64, 4, 3)}
"""Bytes of an element of x → the launch of dtypes and machines without one above."""


def launch(arch: Arch, pairs: int, experts: int, n: int) -> Launch:
    """The tile of `pairs` pairs over `experts` matrices [n, k] in bf16: one of linears'. These have
    one matrix instruction and one order of sums for all of an arch, so that a pair's bits are the
    same whichever is taken."""
    config = linears.launch(arch, -(-ROOM * pairs // experts))
    programs = most_tiles(pairs, experts, config.bm) * -(-n // config.bn)
    few = config.bm == 16 and programs < linears.AT_ONCE * linears.MULTIPROCESSORS[arch]
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

    found = []

    def add(config: Launch, dtype: str, *archs: Arch, exact: bool) -> None:
        for bias in (False, True):
            made = constants(config, bias=bias, exact=exact)
            types = {**_TYPES} | dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), f"*{dtype}:16")
            signature = signature_of(nf4_experts, types, made)
            sizes = (config.warps, config.stages)
            entry = (nf4_experts, signature, made, *sizes)
            found.append(Shipped(*entry, archs=archs, codes=not exact))

    for (arch, _), config in linears.LAUNCHES.items():
        add(config, "bf16", arch, exact=False)
    for arch, config in NARROW.items():
        add(config, "bf16", arch, exact=False)
    for size, dtype in ((2, "bf16"), (2, "fp16"), (4, "fp32")):
        add(EXACT[size], dtype, *ARCHS, exact=True)
    return joined(found)


_TYPES: Mapping[str, str] = {
    "codes_ptr": "*u8:16",
    "scales_ptr": "*fp32:16",
    "table_ptr": "*fp32:16",
    "ends_ptr": "*i32:16",
    "n": "i32:16",
    "x_stride": "i32:16",
}
