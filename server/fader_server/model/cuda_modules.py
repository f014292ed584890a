"""Norms and the output layer on a GPU, so that a row's bits do not depend on its company.

torch's own reductions and the vendor's GEMM cut their sums by the number of rows.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.cuda.norm import rms_norm
from fader_adapters.kernels.cuda.norm_configs import MAX_WIDTH, Form
from fader_adapters.kernels.dense import DenseLinear
from fader_adapters.layers import Installed
from fader_server.model.norm import TOLERANCE, replace_modules

ROWS = 64
"""Rows of one product of the output layer, whatever a step holds."""


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


class FixedRows:
    """The output layer's weight [vocab, hidden], always multiplied by as many rows at a time."""

    def __init__(self, inner: DenseLinear) -> None:
        self._inner = inner
        self.bias = inner.bias
        self.out_features, self.in_features = inner.out_features, inner.in_features
        self.dense, self.rows = inner.dense, inner.rows

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -count % ROWS))
        parts = [self._inner(part) for part in padded.split(ROWS)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[:count]


def use_cuda(model: PreTrainedModel, installed: Installed, backend: Backend) -> None:
    """Put both where they stand in for the model's own."""
    replace_modules(model, lambda m: _norm(m) if type(m).__name__.endswith("RMSNorm") else None)
    head = installed.head
    if head is not None and isinstance(head.kernel.base, DenseLinear):
        head.kernel = backend.bind(head.spec, FixedRows(head.kernel.base))


def _norm(module: nn.Module) -> CudaNorm | None:
    """As with the native norms, the module's own output on a random input decides on the form."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.dtype not in TOLERANCE or weight.shape[0] > MAX_WIDTH:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, weight.shape[0], generator=generator).mul_(3.0).to(weight)
    forms: tuple[Form, ...] = ("scale", "about_one")
    with torch.inference_mode():
        expected = module(x)
        for form in forms:
            found = CudaNorm(weight, eps=eps, form=form)
            if torch.allclose(found(x), expected, rtol=TOLERANCE[x.dtype], atol=1e-6):
                return found
    return None
