"""Norms are replaced where the kernel reproduces them, and nowhere else."""

import pytest
import torch
import transformers
from torch import nn

from fader_adapters.kernels import native
from fader_server.model.norm import NativeNorm, replace_norms
from tests.support.families import CONFIGS

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi3"])
def test_every_norm_of_a_family_is_replaced(family, dtype):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 0.9, 0.2)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert replace_norms(model) == len(norms) > 0
    assert sum(isinstance(m, NativeNorm) for m in model.modules()) == len(norms)


class OddRMSNorm(nn.Module):
    """Divides by the largest value: a name is not a promise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.abs().amax(-1, keepdim=True) * self.weight


def test_a_norm_that_computes_something_else_stays():
    model = nn.Sequential(OddRMSNorm(), nn.LayerNorm(64))
    assert replace_norms(model) == 0
    assert isinstance(model[0], OddRMSNorm)
