"""What a server can compile, as the ahead-of-time test builds it."""

from typing import Any, NamedTuple

ARCHS = (80, 90)
"""Architectures of which every table has rows."""


class Shipped(NamedTuple):
    """One compiled variant of a Triton kernel.

    signature is {argument: type}, ":16" marking multiples of 16; the constants may stand in it as
    "constexpr".
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[int, ...] = ARCHS
