"""NF4 weights in bitsandbytes' file format: a handful of tensors a weight. Knows no models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.kernels import native, nf4

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

STATE = "quant_state.bitsandbytes__nf4"
COMPONENTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
"""What may stand beside a packed weight, each after the weight's key and a dot."""
OTHER_STATE = "quant_state.bitsandbytes__fp4"


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [out, in] as a checkpoint holds it."""

    packed: torch.Tensor
    """uint8 [out·in/2, 1]"""
    state: "QuantState"

    @property
    def dtype(self) -> torch.dtype:
        """What it decodes to."""
        assert self.state.dtype is not None
        return self.state.dtype

    @property
    def weight(self) -> nf4.Nf4Weight:
        """For reading. Raises BaseUnsupported."""
        return nf4.from_state(self.packed, self.state)

    def tensors(self, key: str) -> dict[str, torch.Tensor]:
        """What to write for the weight called `key`."""
        parts = self.state.as_dict(packed=True)
        return {key: self.packed} | {f"{key}.{name}": part for name, part in parts.items()}


def load(packed: torch.Tensor, components: Mapping[str, torch.Tensor], *, key: str) -> Packed:
    """Put a weight of a file together. Raises CheckpointInvalid."""
    from bitsandbytes.functional import QuantState

    try:
        state = QuantState.from_dict(dict(components), torch.device("cpu"))
    except (KeyError, ValueError, TypeError, AssertionError) as error:
        raise CheckpointInvalid(f"{key!r}: its quantisation state is not whole: {error}") from None
    if state.shape is None or packed.dtype != torch.uint8:
        raise CheckpointInvalid(f"{key!r}: expected packed bytes and their shape")
    return Packed(packed, state)


def quantise(weight: torch.Tensor, *, dtype: torch.dtype, nested: bool) -> Packed:
    """`weight` [out, in], fp32, in NF4, to the bytes bitsandbytes would make of it.

    dtype   what the reader is told to decode to
    nested  double quantisation of absmax
    Raises BaseUnsupported (width), CheckpointInvalid (NaN or Inf).
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit

    nf4.check_width(weight.shape[1])
    require_finite(weight)
    weight = weight.contiguous()
    if not native.available():
        packed, state = quantize_4bit(
            weight, blocksize=nf4.BLOCK, compress_statistics=nested, quant_type="nf4"
        )
        state.dtype = dtype
        return Packed(packed, state)
    done = native.quantise_nf4(weight, nested=nested)
    second = done.nested
    state = QuantState(
        absmax=done.absmax if second is None else second.codes,
        shape=weight.shape,
        code=get_4bit_type("nf4", device="cpu"),
        blocksize=nf4.BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=None if second is None else torch.tensor(second.offset),
        state2=None
        if second is None
        else QuantState(
            absmax=second.absmax,
            blocksize=native.NESTED_BLOCK,
            code=second.map,
            dtype=torch.float32,
        ),
    )
    return Packed(done.packed, state)


def require_finite(weight: torch.Tensor) -> None:
    """Raise CheckpointInvalid when there is NaN or Inf inside; a pass without a second tensor."""
    low, high = torch.aminmax(weight)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointInvalid("the weight has NaN or infinite values")


def refuse_others(key: str, names: Mapping[str, object]) -> None:
    """Raise BaseUnsupported when `key` is a 4-bit weight that is not NF4."""
    if f"{key}.{OTHER_STATE}" in names:
        raise BaseUnsupported(f"{key!r} is in FP4, not NF4; start from the unquantised model")
