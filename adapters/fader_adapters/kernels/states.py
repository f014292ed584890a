"""Kernels that take rows of a step from slot to slot, as backends have them. Knows no backend."""

from typing import Protocol

import torch
from torch import Tensor

from fader_adapters.kernels.native import ScanForm, StateRows


class Slotted(Protocol):
    """What keeps states, in slots."""

    @property
    def states(self) -> Tensor:
        """[slots, …]"""
        ...

    def grow(self, slots: int) -> None:
        """Have so many slots; those there were keep what they hold."""
        ...


class ConvolutionKernel(Slotted, Protocol):
    """A causal depthwise convolution over a sequence's tokens, and SiLU where it was asked for."""

    def __call__(self, x: Tensor, rows: StateRows) -> Tensor:
        """x [T, channels] of the weight's dtype → [T, channels]."""
        ...


class ScanKernel(Slotted, Protocol):
    """A gated recurrence over a sequence's tokens."""

    form: ScanForm

    def __call__(
        self,
        x: Tensor,
        gates: Tensor,
        rows: StateRows,
        *,
        places: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """x [T, width], q, k and v at these places of a row, gates fp32 [T, decays + heads] →
        [T, heads, values] of `dtype`."""
        ...


class SelectiveKernel(Slotted, Protocol):
    """h ← e^(step·decay)·h + step·x·B, y = Σ h·C (+ skip·x) for each channel of a token."""

    def __call__(
        self, x: Tensor, steps: Tensor, rows: StateRows, *, gate: Tensor | None = None
    ) -> Tensor:
        """x, gate [T, channels], steps [T, channels + 2·keys]: dt, B and C → [T, channels]."""
        ...


class StateMaker(Protocol):
    """Makes those of a backend. Whatever it raises, a model's own code is left."""

    def convolution(
        self, weight: Tensor, bias: Tensor | None, *, slots: int, silu: bool
    ) -> ConvolutionKernel:
        """weight [channels, taps], bias [channels]."""
        ...

    def scan(self, form: ScanForm, *, slots: int, skip: Tensor | None = None) -> ScanKernel:
        """skip [heads]: the result also has skip·v."""
        ...

    def selective(
        self,
        decay: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        *,
        slots: int,
        softplus: bool,
    ) -> SelectiveKernel:
        """decay [channels, keys], bias of steps and skip [channels]."""
        ...
