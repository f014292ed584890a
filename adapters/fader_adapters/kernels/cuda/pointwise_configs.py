"""Launch configurations of the rotary and gate kernels; torch-free."""

from typing import Any, Literal

from fader_adapters.kernels.cuda.shipped import Shipped

Act = Literal["silu", "gelu_tanh"]
ACTS: tuple[Act, ...] = ("silu", "gelu_tanh")

WARPS = 4
COLUMNS = 1024
"""Of a program of gated_kernel."""
VALUES = 1024
"""Pairs of values that a program of rotary_kernel turns, at least one head."""
DIMS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
"""Head sizes that are compiled ahead of time."""


def rotary_constants(dim: int) -> dict[str, Any]:
    """The compile-time arguments of rotary_kernel."""
    half = 1 << (dim // 2 - 1).bit_length()
    return {"DIM": dim, "HALF_PAD": half, "HEADS": max(1, VALUES // half // 4)}


def gated_constants(act: Act) -> dict[str, Any]:
    """The compile-time arguments of gated_kernel."""
    return {"GELU": act == "gelu_tanh", "BLOCK": COLUMNS}


def shipped() -> list[Shipped]:
    """Every head size and activation, in bf16. Imports triton."""
    from fader_adapters.kernels.cuda import pointwise

    turned: dict[str, str] = dict.fromkeys(("q", "k", "cos", "sin", "q_out", "k_out"), "*bf16:16")
    turned |= dict.fromkeys(("q_token", "q_head", "k_token", "k_head"), "i32:16")
    turned |= {"cos_token": "i32:16", "sin_token": "i32:16", "heads": "i32", "kv_heads": "i32"}
    gates: dict[str, str] = dict.fromkeys(("gate", "up", "out"), "*bf16:16")
    gates |= dict.fromkeys(("width", "gate_row", "up_row"), "i32:16")
    rotaries = [
        Shipped(pointwise.rotary_kernel, turned, rotary_constants(dim), WARPS, 1) for dim in DIMS
    ]
    return rotaries + [
        Shipped(pointwise.gated_kernel, gates, gated_constants(act), WARPS, 1) for act in ACTS
    ]
