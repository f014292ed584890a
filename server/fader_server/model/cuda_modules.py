"""Modules of a model on a GPU by fewer kernels: norms, gated ones too, rotary positions, gated
activations.

Their bits do not depend on the number of rows, which those of torch's norms do. What a module
computes is found by asking it: its own output on a random input decides.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.describe import activation_dtype
from fader_adapters.kernels.cuda.norm import gated_rms_norm, rms_norm
from fader_adapters.kernels.cuda.norm_configs import MAX_WIDTH, Form
from fader_adapters.kernels.cuda.pointwise import gated, rotary
from fader_adapters.kernels.cuda.pointwise_configs import ACTS, Act
from fader_server.model.norm import TOLERANCE, replace_gated_norms, replace_modules
from fader_server.model.twin import calls, with_functions, written

log = logging.getLogger(__name__)

ROTARY = "apply_rotary_pos_emb"
"""transformers' name for it in every family that turns halves of a head."""
GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(q, k, cos, sin) → q and k turned"""


class CudaNorm(nn.Module):
    """Stands where a model's RMS norm stood: x [..., k] → [..., k]."""

    def __init__(self, weight: nn.Parameter, *, eps: float, form: Form) -> None:
        super().__init__()
        self.weight = weight
        self._eps = eps
        self._form: Form = form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return rms_norm(rows, self.weight.data, eps=self._eps, form=self._form).view(x.shape)


class CudaGate(nn.Module):
    """Stands where a model's gated feed-forward stood: down(act(gate(x))·up(x))."""

    def __init__(self, own: nn.Module, act: Act) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            getattr(own, name) for name in GATED
        )
        self._act: Act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        width = gate.shape[-1]
        made = gated(gate.reshape(-1, width), up.reshape(-1, width), self._act)
        return self.down_proj(made.view(gate.shape))


class CudaRotary:
    """Stands where a model's function stood; what the kernel does not take goes the model's way."""

    def __init__(self, own: Rotary) -> None:
        self._own = own

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q, k [1, heads, T, dim] and cos, sin [1, T, dim] → q, k turned, heads behind tokens."""
        plain = not args and not kwargs and q.dim() == 4 and cos.dim() == 3
        if not plain or q.shape[0] != 1 or cos.shape != (1, *q.shape[2:]):
            return self._own(q, k, cos, sin, *args, **kwargs)
        given = (q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0], sin[0])
        if any(t.stride(-1) != 1 or t.dtype != q.dtype for t in given) or q.shape[-1] % 2:
            return self._own(q, k, cos, sin)
        turned = rotary(*given)
        return turned[0].transpose(0, 1)[None], turned[1].transpose(0, 1)[None]


def use_cuda(model: PreTrainedModel) -> None:
    """Put them where they stand in for the model's own; which norms stay is told once."""
    dtype, device = activation_dtype(model), model.device
    kept: set[str] = set()

    def norm(module: nn.Module) -> CudaNorm | None:
        kind = type(module).__name__
        if not kind.endswith("RMSNorm"):
            return None
        found = _norm(module, dtype)
        if found is None:
            kept.add(kind)
        return found

    replace_modules(model, norm)
    replace_gated_norms(model, dtype=dtype, kernel=gated_rms_norm)
    if kept:
        log.warning(
            "norms whose values the kernel does not give run as the model has them, slower: %s",
            ", ".join(sorted(kept)),
        )
    replace_modules(model, lambda m: _gate(m, dtype=dtype, device=device))
    found: dict[Rotary, CudaRotary | None] = {}
    for module in model.modules():
        own = _rotary_of(module)
        if own is None:
            continue
        if own not in found:
            found[own] = _rotary(own, dtype=dtype, device=device)
        stand_in = found[own]
        forward = None if stand_in is None else with_functions(module, {ROTARY: stand_in})
        if forward is not None:
            module.forward = forward


def _norm(module: nn.Module, dtype: torch.dtype) -> CudaNorm | None:
    """As with the native norms, the module's own output on a random input decides on the form, and
    one whose weight is of another dtype than the activations stays."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in TOLERANCE or weight.dtype != dtype or weight.shape[0] > MAX_WIDTH:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).mul_(3.0).to(weight)
    forms: tuple[Form, ...] = ("scale", "about_one")
    with torch.inference_mode():
        expected = module(x)
        for form in forms:
            found = CudaNorm(weight, eps=eps, form=form)
            if _alike(found(x), expected):
                return found
    return None


def _alike(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to roundings: models round in the middle, too, and a sum taken in another order may turn
    either rounding of a value, but of few of them and to either side."""
    most = TOLERANCE[expected.dtype]
    error, size = (found - expected).float().norm(), expected.float().norm()
    return torch.allclose(found, expected, rtol=2 * most, atol=1e-6) and bool(
        error <= most / 2 * size
    )


def _gate(module: nn.Module, *, dtype: torch.dtype, device: torch.device) -> CudaGate | None:
    """The activation that reproduces the module's own output on random rows."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in GATED):
        return None
    own: Any = module
    width = getattr(own.gate_proj, "in_features", None)
    if not isinstance(width, int) or dtype not in TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator).mul_(3.0).to(device, dtype)
    with torch.inference_mode():
        expected = module(x).float()
        for act in ACTS:
            found = CudaGate(module, act)
            error = (found(x).float() - expected).norm() / expected.norm()
            if error <= TOLERANCE[x.dtype]:
                return found
    return None


def _rotary_of(module: nn.Module) -> Rotary | None:
    """The function that the module's forward turns its queries and keys with."""
    own = written(module)
    return own.__globals__.get(ROTARY) if own is not None and calls(module, ROTARY) else None


def _rotary(own: Rotary, *, dtype: torch.dtype, device: torch.device) -> CudaRotary | None:
    if dtype not in TOLERANCE:
        return None
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 3, 5, 64), (1, 2, 5, 64), (1, 5, 64), (1, 5, 64))
    given = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    found = CudaRotary(own)
    with torch.inference_mode():
        try:
            expected = own(*given)
        except (TypeError, ValueError, RuntimeError):  # of another signature: it stays
            return None
        pairs = zip(found(*given), expected, strict=True)
        same = all(torch.allclose(a, b, rtol=TOLERANCE[dtype], atol=1e-6) for a, b in pairs)
    return found if same else None
