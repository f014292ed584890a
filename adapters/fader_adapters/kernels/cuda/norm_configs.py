"""Launch configurations of the RMS norm kernels; torch-free."""

from collections.abc import Iterator
from typing import Any, Literal

from fader_adapters.kernels.cuda.shipped import Shipped, signature_of

Form = Literal["scale", "about_one"]
"""scale: w·(x̂ in the input's dtype). about_one: (1 + w)·x̂ in fp32, rounded once."""

MAX_WIDTH = 16384
WIDTHS = (64, 128, 256, 1024, 2048, 4096, 8192, MAX_WIDTH)
"""Padded widths that are compiled ahead of time."""
HEAD = 256
"""Up to which a gated norm is of a head, and from which on of a group of heads."""


def padded(width: int) -> int:
    """The power of two that holds a row."""
    return max(16, 1 << (width - 1).bit_length())


def warps(width: int) -> int:
    """About 8 values a thread and more for the widest."""
    return min(16, max(1, padded(width) // 512))


def constants(width: int, form: Form) -> dict[str, Any]:
    """The compile-time arguments of rms_norm."""
    return {"BLOCK": padded(width), "ABOUT_ONE": form == "about_one"}


def gated_constants(group: int, *, inside: bool, sigmoid: bool) -> dict[str, Any]:
    """Those of a gated norm."""
    return {"BLOCK": padded(group), "INSIDE": inside, "SIGMOID": sigmoid}


def shipped() -> list[Shipped]:
    """Every padded width in both forms, in bf16, and gated norms. Imports triton."""
    from fader_adapters.kernels.cuda.norm import rms_norm_kernel

    signature = {"x": "*bf16:16", "weight": "*bf16:16", "out": "*bf16:16"}
    signature |= {"width": "i32:16", "stride": "i32:16", "eps": "fp32"}
    forms: tuple[Form, ...] = ("scale", "about_one")
    plain = [
        Shipped(rms_norm_kernel, signature, constants(width, form), warps(width), 1)
        for width in WIDTHS
        for form in forms
    ]
    return [*plain, *_gated()]


def _gated() -> Iterator[Shipped]:
    """Of heads in bf16, as delta rules leave them, and of the fp32 of state spaces."""
    from fader_adapters.kernels.cuda.norm import gated_norm_kernel

    heads = [(w, "*bf16", False, sigmoid) for w in WIDTHS if w <= HEAD for sigmoid in (False, True)]
    spaces = [(w, "*fp32", inside, False) for w in WIDTHS if w >= HEAD for inside in (False, True)]
    for width, kind, inside, sigmoid in (*heads, *spaces):
        given = gated_constants(width, inside=inside, sigmoid=sigmoid)
        types = {"x": kind, "out": kind, "gate": "*bf16", "weight": "*fp32", "eps": "fp32"}
        signature = signature_of(gated_norm_kernel, types, given)
        yield Shipped(gated_norm_kernel, signature, given, warps(width), 1)
