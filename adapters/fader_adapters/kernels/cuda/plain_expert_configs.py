"""Which launch unquantised experts take by dtype and number of pairs. A frozen table, no tuning;
what it was chosen by is arithmetic, not a measurement."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fader_adapters.kernels.cuda.nf4_expert_configs import ROOM
from fader_adapters.kernels.cuda.shipped import Shipped, signature_of


class Launch(NamedTuple):
    """How plain_experts runs: pairs, rows and columns of W in a tile; warps; stages."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


LAUNCHES: Mapping[int, Launch] = {
    16: Launch(16, 64, 64, 4, 4),
    32: Launch(32, 64, 64, 4, 4),
    64: Launch(64, 64, 64, 4, 3),
    128: Launch(128, 64, 64, 8, 3),
}
"""Most pairs of an expert → the launch of two-byte dtypes."""

EXACT = Launch(16, 64, 32, 4, 2)
"""Of fp32, whose products no matrix unit computes."""


def launch(pairs: int, experts: int, itemsize: int) -> Launch:
    """The tile of `pairs` pairs over `experts` matrices."""
    if itemsize == 4:
        return EXACT
    meet = -(-ROOM * pairs // experts)
    return LAUNCHES[next((most for most in LAUNCHES if meet <= most), max(LAUNCHES))]


def constants(config: Launch, *, bias: bool) -> dict[str, Any]:
    """The constants of plain_experts."""
    return {
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "HAS_BIAS": bias,
        "STAGES": config.stages,
    }


def shipped() -> list[Shipped]:
    """Every compilation that CudaStackWeight can need. Imports Triton."""
    from fader_adapters.kernels.cuda.plain_expert_kernels import plain_experts

    found = []
    for config in (*LAUNCHES.values(), EXACT):
        for dtype in ("fp32",) if config is EXACT else ("bf16", "fp16"):
            for bias in (False, True):
                for flat in ("w_column", "w_row"):  # whichever of W's axes lies flat
                    made = constants(config, bias=bias)
                    names = ("x_ptr", "w_ptr", "bias_ptr", "out_ptr")
                    types = {**dict.fromkeys(names, f"*{dtype}:16"), **_TYPES}
                    signature = signature_of(plain_experts, types, made) | {flat: "constexpr"}
                    launched = (config.warps, config.stages)
                    found.append(Shipped(plain_experts, signature, made | {flat: 1}, *launched))
    return found


_TYPES: Mapping[str, str] = {
    "ends_ptr": "*i32:16",
    "n": "i32:16",
    "k": "i32:16",
    "x_stride": "i32:16",
    "w_expert": "i32:16",
    "w_row": "i32:16",
    "w_column": "i32:16",
}
