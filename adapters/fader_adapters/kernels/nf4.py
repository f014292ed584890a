"""NF4 weights as bitsandbytes stores them, and the one function that reads them densely.

bitsandbytes is imported by what needs it: its layout is known without it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fader_adapters.errors import BaseUnsupported

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Params4bit

BLOCK = 64
"""Weights that share one absmax."""


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A weight W [out_features, in_features] in NF4: w = code[nibble] · absmax[block].

    packed  uint8 [out·in/2]   row-major, the high nibble is the even element
    absmax  float32 [out·in/64]  double quantisation already undone
    Source of the layout: bitsandbytes' 4-bit quantisation.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    out_features: int
    in_features: int

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    def rows(self, start: int, stop: int) -> "Nf4Weight":
        """Rows start..stop as a view."""
        k = self.in_features
        return Nf4Weight(
            self.packed[start * k // 2 : stop * k // 2],
            self.absmax[start * k // BLOCK : stop * k // BLOCK],
            stop - start,
            k,
        )


def from_bitsandbytes(weight: "Params4bit") -> Nf4Weight:
    """Take over a Linear4bit's weight before its first forward; the packed bytes are not copied.

    bitsandbytes ≥ 0.50 repacks `weight.data` in place on some CPUs at the first eval forward, after
    which the bytes mean something else; `packing_format_for_cpu` tells. Raises BaseUnsupported.
    """
    return from_state(weight.data, check_bitsandbytes(weight))


def check_bitsandbytes(weight: "Params4bit") -> "QuantState":
    """The state of a weight that `from_bitsandbytes` takes over. Raises BaseUnsupported."""
    state = weight.quant_state
    if state is None:
        raise BaseUnsupported("expected NF4 weights, found none that are quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise BaseUnsupported("the weight was repacked by a forward pass; load it afresh")
    _check_state(state)
    return state


def from_state(packed: torch.Tensor, state: "QuantState") -> Nf4Weight:
    """The same from the bytes and the quantisation state of a file. Raises BaseUnsupported."""
    out_features, in_features = _check_state(state)
    absmax = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        assert state.offset is not None
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return Nf4Weight(
        packed.reshape(-1).view(torch.uint8),
        absmax.to(torch.float32).reshape(-1).contiguous(),
        out_features,
        in_features,
    )


def _check_state(state: "QuantState") -> tuple[int, int]:
    """(out, in) of a weight in NF4 as it is read here. Raises BaseUnsupported."""
    if state.quant_type != "nf4":
        raise BaseUnsupported(f"expected NF4 weights, found {state.quant_type}; quantise with nf4")
    if state.blocksize != BLOCK:
        raise BaseUnsupported(
            f"NF4 blocks of {state.blocksize} weights, Fader reads blocks of {BLOCK}; "
            "quantise the original again with `fader quantize`"
        )
    assert state.shape is not None
    out_features, in_features = state.shape
    check_width(in_features)
    return out_features, in_features


def codes() -> torch.Tensor:
    """The 16 levels in ascending order, fp32."""
    from bitsandbytes.functional import get_4bit_type

    return get_4bit_type("nf4", device="cpu").float()


def check_width(in_features: int) -> None:
    """Raise BaseUnsupported when a row's blocks would straddle rows."""
    if in_features % BLOCK:
        raise BaseUnsupported(
            f"the input width {in_features} is not a multiple of {BLOCK}, "
            "so NF4 blocks would straddle rows; this base cannot be served in NF4"
        )


def dense(weight: Nf4Weight, dtype: torch.dtype) -> torch.Tensor:
    """W [out, in] in `dtype`: code · absmax in fp32, rounded once."""
    import bitsandbytes  # noqa: F401 - registers its operators

    return torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.packed,
        weight.absmax,
        BLOCK,
        "nf4",
        [weight.out_features, weight.in_features],
        dtype,
    )


def filled(parts: Iterable[Nf4Weight], shape: tuple[int, int]) -> Nf4Weight:
    """One weight [out, in] from its rows, some at a time; each part is done with before the next
    is asked for."""
    (out, width), at = shape, 0
    whole = None
    for part in parts:
        if whole is None:
            packed = part.packed.new_empty(out * width // 2)
            whole = Nf4Weight(packed, part.absmax.new_empty(out * width // BLOCK), out, width)
        there = whole.rows(at, at + part.out_features)
        there.packed.copy_(part.packed)
        there.absmax.copy_(part.absmax)
        at += part.out_features
    assert whole is not None
    assert at == out
    return whole


def stack(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """One weight whose rows are those of `weights` in order; all must share in_features."""
    if len(weights) == 1:
        return weights[0]
    return filled(weights, (sum(w.out_features for w in weights), weights[0].in_features))
