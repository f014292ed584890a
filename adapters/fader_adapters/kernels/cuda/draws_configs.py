"""Launch configurations of the kernels that draw; torch-free."""

from typing import Any

from fader_adapters.kernels.cuda.shipped import Shipped, signature_of

TOP_SHIFT = 44
"""Of the first digit of an edge: masses are at most 2^44."""
PARTS = 32
"""Programs of a row."""
WARPS = 4

_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

NARROW: dict[str, Any] = {"PARTS": PARTS, "BLOCK": 256}
"""The compile-time arguments of narrow_kernel."""
RACE: dict[str, Any] = {
    **dict(zip(("STEP", "FIRST", "SECOND"), (c - 2**64 for c in _SPLITMIX), strict=True)),
    "PARTS": PARTS,
    "BLOCK": 512,
}
"""Those of race_kernel; SplitMix64's constants as the signed numbers that they are there."""


def shipped() -> list[Shipped]:
    """Imports triton."""
    from fader_adapters.kernels.cuda import draws

    whole = dict.fromkeys(("mass", "need", "starts", "sums", "keys", "place"), "*i64:16")
    whole |= {"x": "*fp32:16", "heat": "*fp32:16", "best": "*fp64:16"}
    return [
        Shipped(kernel, signature_of(kernel, whole, constants), constants, WARPS, 1)
        for kernel, constants in ((draws.narrow_kernel, NARROW), (draws.race_kernel, RACE))
    ]
