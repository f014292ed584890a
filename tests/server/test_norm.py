"""Norms are replaced where the kernel reproduces them, and nowhere else."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba.modeling_mamba import MambaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from fader_adapters.kernels import native
from fader_server.model.norm import GATED, TOLERANCE, NativeNorm, replace_gated_norms, replace_norms
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
    assert replace_norms(model, dtype=dtype) == len(norms) > 0
    assert sum(isinstance(m, NativeNorm) for m in model.modules()) == len(norms)


def test_norms_that_are_kept_in_fp32_beside_bf16_stay():
    plain, gated = LlamaRMSNorm(64, eps=1e-5), Qwen3_5RMSNormGated(64, eps=1e-5)
    for dtype, count in ((torch.bfloat16, 0), (torch.float32, 1)):
        assert replace_norms(nn.Sequential(plain), dtype=dtype) == count
        assert replace_gated_norms(nn.Sequential(gated), dtype=dtype) == count


@pytest.mark.parametrize(("kind", "takes"), [(MambaRMSNorm, True), (LlamaRMSNorm, False)])
def test_a_residual_in_fp32_is_taken_where_the_models_own_gives_the_same(kind, takes, monkeypatch):
    if not takes:  # as of one that gives another dtype
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x).bfloat16())
    own = kind(64, eps=1e-5).bfloat16()
    nn.init.normal_(own.weight, 0.9, 0.2)
    model = nn.Sequential(own)
    assert replace_norms(model, dtype=torch.bfloat16) == 1
    x = torch.randn(3, 64)
    if not takes:
        with pytest.raises(TypeError, match="x must be"):
            model(x)
        return
    torch.testing.assert_close(model(x), own(x))
    assert model(x.bfloat16()).dtype == torch.bfloat16


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
    assert replace_norms(model, dtype=torch.float32) == 0
    assert isinstance(model[0], OddRMSNorm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3.5", "zamba2", "kimi-linear"])
def test_gated_norms_are_replaced_by_the_form_that_they_have(family, dtype):
    kinds = {
        "qwen3.5": lambda: Qwen3_5RMSNormGated(64, eps=1e-5),
        "zamba2": lambda: Zamba2RMSNormGated(64, 32, eps=1e-5),
        "kimi-linear": lambda: KimiLinearRMSNormGated(64, eps=1e-5),
    }
    norm = kinds[family]().to(dtype)
    nn.init.normal_(norm.weight, 0.9, 0.2)
    model = nn.Sequential(norm)
    x, gate = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    expected = norm(x, gate)
    assert replace_gated_norms(model, dtype=dtype) == 1
    found = model[0](x, gate)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=GATED * TOLERANCE[dtype], atol=1e-6)


class OddRMSNormGated(nn.Module):
    """Opens by a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gate.tanh()


def test_a_gated_norm_that_computes_something_else_stays():
    model = nn.Sequential(OddRMSNormGated())
    assert replace_gated_norms(model, dtype=torch.float32) == 0
    assert isinstance(model[0], OddRMSNormGated)
