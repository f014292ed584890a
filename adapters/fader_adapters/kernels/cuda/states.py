"""States that sequences leave behind on a GPU: what the native kernels' Convolution and Scan do, by
Triton's. Knows slots and rows; no models, no requests."""

from typing import Any

import torch
from torch import Tensor

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels.cuda import states_configs as configs
from fader_adapters.kernels.cuda.states_kernels import conv_kernel, scan_kernel
from fader_adapters.kernels.native import ScanForm, StateRows
from fader_adapters.kernels.states import SelectiveKernel

_conv: Any = conv_kernel
_scan: Any = scan_kernel


class _Slotted:
    """What keeps states [slots, …]."""

    states: Tensor

    def grow(self, slots: int) -> None:
        """Have so many slots; those there were keep what they hold, and move: whatever was captured
        before is of no use any more."""
        grown = self.states.new_empty(slots, *self.states.shape[1:])
        grown[: len(self.states)] = self.states
        self.states = grown


class CudaConvolution(_Slotted):
    """A causal depthwise convolution over a sequence's tokens."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, slots: int, silu: bool) -> None:
        """weight [channels, taps] and bias [channels] are copied; states are of the weight's dtype.
        Raises: ValueError."""
        self.channels, self.taps = weight.shape
        if self.taps < 2:
            raise ValueError(f"a convolution of one tap keeps nothing, got {list(weight.shape)}")
        self.states = weight.new_empty(slots, self.taps - 1, self.channels)
        self._weight = weight.t().float().contiguous()
        self._bias = self._weight if bias is None else bias.float()
        self._constants = configs.conv_constants(self.taps, silu=silu, biased=bias is not None)

    def __call__(self, x: Tensor, rows: StateRows) -> Tensor:
        """x [T, channels] of the weight's dtype, rows may be strided → [T, channels]: the sum over
        the last tokens of a sequence in fp32, rounded, then SiLU of that where it was asked for.
        Tokens of no row are zeros; a slot below 0 is none, also to leave a state in.
        """
        tokens, count = len(x), len(rows.to)
        assert x.shape[1] == self.channels
        assert x.dtype == self.states.dtype
        assert x.stride(1) == 1
        out = _fresh((tokens, self.channels), rows, x, x.dtype)
        grid = (-(-self.channels // configs.CHANNELS), configs.parts(count, tokens), count)
        _conv[grid](
            x, self._weight, self._bias, self.states, out, rows.start, rows.came_from, rows.to,
            x.stride(0), self.channels,
            **self._constants, num_warps=configs.CONV_WARPS, num_stages=1,
        )  # fmt: skip
        return out


class CudaScan(_Slotted):
    """A gated recurrence over a sequence's tokens: S ← e^g·S + k·uᵀ, y = Sᵀ·q."""

    def __init__(
        self, form: ScanForm, *, slots: int, device: torch.device, skip: Tensor | None = None
    ) -> None:
        """skip [heads]: y also has skip·v; copied. Raises: KernelUnavailable."""
        if form.heads % form.groups or not 0 < form.keys <= configs.MOST_KEYS:
            raise KernelUnavailable(
                f"keys must be at most {configs.MOST_KEYS} and groups divide the heads, got {form}"
            )
        self.form = form
        self.states = torch.empty(slots, form.heads, form.keys, form.values, device=device)
        self._skip = self.states if skip is None else skip.float()
        self._constants = configs.scan_constants(
            form.keys, form.values,
            delta=form.delta, unit=form.unit, by_key=form.by_key, skips=skip is not None,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        gates: Tensor,
        rows: StateRows,
        *,
        places: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """[T, heads, values] of `dtype`: with d = e^g and S the sequence's state, u = β·(v −
        (d·S)ᵀ·k), or β·v without `delta`; S ← d·S + k·uᵀ; y = Sᵀ·q (+ skip·v); in fp32. Tokens of
        no row are zeros; a slot below 0 is none, also to leave a state in.

        x       [T, width], rows may be strided: q, k and v begin at these `places` of a row
        gates   fp32 [T, decays + heads]: g of every head, then β of every head
        """
        form, tokens, count = self.form, len(x), len(rows.to)
        assert x.stride(1) == 1
        assert gates.shape == (tokens, form.decays + form.heads)
        assert gates.is_contiguous()
        out = _fresh((tokens, form.heads, form.values), rows, x, dtype)
        grid = (-(-form.values // configs.VALUES), form.heads, count)
        _scan[grid](
            x, gates, self._skip, self.states, out, rows.start, rows.came_from, rows.to,
            x.stride(0), *places, form.heads, form.heads // form.groups,
            **self._constants, num_warps=configs.SCAN_WARPS, num_stages=1,
        )  # fmt: skip
        return out


class CudaStates:
    """Makes them; see kernels/states.py."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def convolution(
        self, weight: Tensor, bias: Tensor | None, *, slots: int, silu: bool
    ) -> CudaConvolution:
        return CudaConvolution(weight, bias, slots=slots, silu=silu)

    def scan(self, form: ScanForm, *, slots: int, skip: Tensor | None = None) -> CudaScan:
        return CudaScan(form, slots=slots, skip=skip, device=self._device)

    def selective(
        self,
        decay: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        *,
        slots: int,
        softplus: bool,
    ) -> SelectiveKernel:
        raise KernelUnavailable("there is no selective scan in Triton yet")


def _fresh(shape: tuple[int, ...], rows: StateRows, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of one token each have all tokens; among others there may be padding."""
    make = torch.empty if shape[0] == len(rows.to) else torch.zeros
    return make(shape, dtype=dtype, device=x.device)
