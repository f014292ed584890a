"""Launch configurations of convolutions and recurrences over a sequence's tokens; torch-free."""

from collections.abc import Iterator
from typing import Any

from fader_adapters.kernels.cuda.shipped import Shipped, signature_of

MOST_KEYS = 256
"""Of a head: its block of the state stays in one warp's registers."""
VALUES = 8
"""Of a head, in one program: as many columns of the state, 32 bytes of each of its rows."""
CHANNELS = 256
"""Of a convolution, in one program."""
TOKENS = 8
"""Of a row, that one program of a convolution computes where there are that many."""
SCAN_WARPS = 1
"""A sum over keys is one warp's, without a barrier."""
CONV_WARPS = 2

_KEYS = ((64, 64), (96, 192), (128, 64), (128, 128), (256, 64), (256, 128))
"""Keys and values of a head that are compiled ahead of time."""
_TAPS = ((3, False, False), (4, True, False), (4, True, True))
"""The same of convolutions: taps, whether SiLU follows, whether there is a bias."""


def padded(size: int) -> int:
    """The power of two that holds them."""
    return max(2, 1 << (size - 1).bit_length())


def parts(rows: int, tokens: int) -> int:
    """Programs that share the tokens of a row, of a step of so many; any number is right."""
    return max(1, -(-(tokens - rows + 1) // TOKENS))


def conv_constants(taps: int, *, silu: bool, biased: bool) -> dict[str, Any]:
    """The compile-time arguments of conv_kernel."""
    return {"TAPS": taps, "SILU": silu, "BIASED": biased, "BLOCK": CHANNELS}


def scan_constants(
    keys: int, values: int, *, delta: bool, unit: bool, by_key: bool, skips: bool
) -> dict[str, Any]:
    """Those of scan_kernel."""
    sizes = {"KEYS": keys, "VALUES": values, "KEYS_PAD": padded(keys), "BLOCK": VALUES}
    return sizes | {"DELTA": delta, "UNIT": unit, "BY_KEY": by_key, "SKIPS": skips}


def shipped() -> Iterator[Shipped]:
    """Delta rules, those that decay by key and state spaces, in bf16. Imports triton."""
    from fader_adapters.kernels.cuda.states_kernels import conv_kernel, scan_kernel

    slots = dict.fromkeys(("start", "came_from", "to"), "*i32")
    wide = dict.fromkeys(("weight", "bias", "gates", "skip"), "*fp32")
    for taps, silu, biased in _TAPS:
        constants = conv_constants(taps, silu=silu, biased=biased)
        types = slots | wide | dict.fromkeys(("x", "states", "out"), "*bf16")
        signature = signature_of(conv_kernel, types, constants)
        yield Shipped(conv_kernel, signature, constants, CONV_WARPS, 1)
    types = slots | wide | {"x": "*bf16", "states": "*fp32"}
    for keys, values in _KEYS:
        for delta, by_key in ((True, False), (True, True), (False, False)):
            constants = scan_constants(
                keys, values, delta=delta, unit=delta, by_key=by_key, skips=not delta
            )
            given = types | {"out": "*bf16" if delta else "*fp32"}
            signature = signature_of(scan_kernel, given, constants)
            yield Shipped(scan_kernel, signature, constants, SCAN_WARPS, 1)
