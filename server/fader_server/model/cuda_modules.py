"""RMS norms on a GPU whose bits do not depend on the number of rows; those of torch do."""

import torch
from torch import nn
from transformers import PreTrainedModel

from fader_adapters.kernels.cuda.norm import rms_norm
from fader_adapters.kernels.cuda.norm_configs import MAX_WIDTH, Form
from fader_server.model.norm import TOLERANCE, replace_modules


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


def use_cuda(model: PreTrainedModel) -> None:
    """Put them where they stand in for the model's own."""
    replace_modules(model, lambda m: _norm(m) if type(m).__name__.endswith("RMSNorm") else None)


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
