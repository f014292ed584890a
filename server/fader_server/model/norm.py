"""Replaces RMS norms by the native kernel where it gives what the model's own gives, and gated ones
by a backend's.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fader_adapters.kernels.native import GateForm, Tape, gated_rms_norm, rms_norm

TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
"""Relative: one unit in the last place of bf16, for sums taken in another order."""
GATED = 2
"""Times as much for gated norms: some models round three times where the kernel rounds once."""


class NativeNorm(nn.Module):
    """Stands where a model's RMS norm stood: x [..., k] → [..., k]."""

    def __init__(
        self, weight: nn.Parameter, *, eps: float, about_one: bool, tape: Tape | None = None
    ) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._about_one = about_one
        self._tape = tape
        self.wide: torch.Tensor | None = None
        """The weight in fp32, for residuals of such, where a model keeps them so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        other = self.wide is not None and x.dtype == torch.float32
        weight = self.wide if other else self.weight.data
        assert weight is not None
        y = rms_norm(rows, weight, eps=self._eps, about_one=self._about_one, tape=self._tape)
        return y.view(x.shape)


GatedKernel = Callable[..., torch.Tensor]
"""A backend's: as native's gated_rms_norm without a tape."""


class GatedNorm(nn.Module):
    """Stands where a model's gated RMS norm stood: x, gate [..., k] → [..., k]."""

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        form: GateForm,
        group: int,
        eps: float,
        kernel: GatedKernel,
    ) -> None:
        super().__init__()
        self.weight = weight
        self._wide = weight.data.float()
        self._form, self._group, self._eps = form, group, eps
        self._kernel = kernel

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        rows, gates = (t.reshape(-1, t.shape[-1]) for t in (x, gate))
        y = self._kernel(
            rows, gates, self._wide, form=self._form, group=self._group, eps=self._eps
        )  # fmt: skip
        return y.view(x.shape)


def replace_gated_norms(
    model: nn.Module,
    *,
    dtype: torch.dtype,
    tape: Tape | None = None,
    kernel: GatedKernel | None = None,
) -> int:
    """Replace every gated RMS norm that one of the kernel's forms reproduces; returns how many.

    `dtype`: of the activations; a norm whose weight is of another stays. `kernel`: None is the
    native one, with its tape.
    """
    kernel = kernel or partial(gated_rms_norm, tape=tape)
    return _replace(model, "RMSNormGated", dtype, lambda m: _gated(m, kernel))


def replace_norms(model: nn.Module, *, dtype: torch.dtype, tape: Tape | None = None) -> int:
    """Replace every RMS norm that one of the kernel's forms reproduces; returns how many.

    What a norm computes is found by asking it, not by its name: its own output on a random input
    decides, and one that neither form reproduces stays, as one whose weight is of another dtype
    than the activations.
    """
    return _replace(model, "RMSNorm", dtype, lambda m: _native(m, tape))


def _replace(
    model: nn.Module,
    name: str,
    dtype: torch.dtype,
    stand_in: Callable[[nn.Module], nn.Module | None],
) -> int:
    def of_dtype(module: nn.Module) -> nn.Module | None:
        other = getattr(getattr(module, "weight", None), "dtype", None) != dtype
        return None if other or not type(module).__name__.endswith(name) else stand_in(module)

    return replace_modules(model, of_dtype)


def replace_modules(model: nn.Module, stand_in: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put `stand_in(module)` in the place of every module it gives one for; returns how many."""
    replaced = 0
    for path, module in list(model.named_modules()):
        native = stand_in(module)
        if native is not None:
            model.set_submodule(path, native)
            replaced += 1
    return replaced


def _gated(module: nn.Module, kernel: GatedKernel) -> GatedNorm | None:
    """Asked in fp32 and in the weight's dtype: what is normalised may be of either."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    width = weight.shape[0]
    group = getattr(module, "group_size", width // getattr(module, "n_groups", 1))
    if weight.dtype not in TOLERANCE or group % 16 or width % group:
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate = (
        torch.randn(4, width, generator=generator).mul_(3.0).to(weight.device) for _ in range(2)
    )
    with torch.inference_mode():
        for form in (
            GateForm(inside, sigmoid) for inside in (True, False) for sigmoid in (False, True)
        ):
            found = GatedNorm(weight, form=form, group=group, eps=eps, kernel=kernel)
            if all(
                _same(module, found, x.to(dtype), gate.to(weight.dtype))
                for dtype in {torch.float32, weight.dtype}
            ):
                return found
    return None


def _same(module: nn.Module, native: nn.Module, x: torch.Tensor, gate: torch.Tensor) -> bool:
    expected, found = module(x, gate), native(x, gate)
    return expected.dtype == found.dtype and torch.allclose(
        found, expected, rtol=GATED * TOLERANCE[gate.dtype], atol=1e-6
    )


def _native(module: nn.Module, tape: Tape | None) -> NativeNorm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).mul_(3.0).to(weight.dtype)
    with torch.inference_mode():
        expected = module(x)
        for about_one in (False, True):
            native = NativeNorm(weight, eps=eps, about_one=about_one, tape=tape)
            if torch.allclose(native(x), expected, rtol=TOLERANCE[x.dtype], atol=1e-6):
                _widen(native, module, x.float())
                return native
    return None


def _widen(native: NativeNorm, module: nn.Module, x: torch.Tensor) -> None:
    """Let it take fp32, too, where that gives what the model's own gives."""
    if native.weight.dtype == x.dtype:
        return
    native.wide = native.weight.data.float()
    expected, found = module(x), native(x)
    tolerance = TOLERANCE[found.dtype]
    if expected.dtype != found.dtype or not torch.allclose(found, expected, tolerance, 1e-6):
        native.wide = None
