"""Launch configurations of the RMS norm kernels; torch-free."""

from typing import Any, Literal

from fader_adapters.kernels.cuda.shipped import Shipped, signature_of

Form = Literal["scale", "about_one"]
"""scale: w·(x̂ in the input's dtype). about_one: (1 + w)·x̂ in fp32, rounded once."""

MAX_WIDTH = 16384
WIDTHS = (64, 128, 256, 1024, 2048, 4096, 8192, MAX_WIDTH)
"""Padded widths that are compiled ahead of time."""


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
    """Every padded width in all forms, in bf16; what a state space gives a gated norm is fp32.
    Imports triton."""
    from fader_adapters.kernels.cuda.norm import gated_norm_kernel, rms_norm_kernel

    signature = {"x": "*bf16:16", "weight": "*bf16:16", "out": "*bf16:16"}
    signature |= {"width": "i32:16", "stride": "i32:16", "eps": "fp32"}
    forms: tuple[Form, ...] = ("scale", "about_one")
    plain = [
        Shipped(rms_norm_kernel, signature, constants(width, form), warps(width), 1)
        for width in WIDTHS
        for form in forms
    ]
    return plain + [
        Shipped(
            gated_norm_kernel,
            signature_of(
                gated_norm_kernel,
                {"x": kind, "out": kind, "gate": "*bf16:16", "weight": "*fp32:16", "eps": "fp32"},
                given := gated_constants(width, inside=inside, sigmoid=sigmoid),
            ),
            given,
            warps(width),
            1,
        )
        for width in WIDTHS
        for kind, inside, sigmoid in (
            ("*bf16:16", False, False),
            ("*bf16:16", False, True),
            ("*fp32:16", True, False),
            ("*fp32:16", False, False),
        )
    ]
