"""The native RMS norm against transformers' two forms, on every instruction set."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fader_adapters.kernels import native


def _norm(kind: type, width: int, dtype: torch.dtype) -> torch.nn.Module:
    norm = kind(width, eps=1e-5)
    torch.nn.init.normal_(norm.weight, 0.8, 0.3)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [32, 100, 512, 2048])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
def test_every_form_equals_transformers(level, kind, width, dtype):
    norm = _norm(kind, width, dtype)
    x = torch.randn(9, width).mul(4).to(dtype)
    ours = native.rms_norm(x, norm.weight.data, eps=1e-5, about_one=kind is Gemma2RMSNorm)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours, norm(x).detach(), rtol=tolerance, atol=1e-6)
    other = native.rms_norm(x, norm.weight.data, eps=1e-5, about_one=kind is LlamaRMSNorm)
    assert not torch.allclose(other, norm(x), rtol=tolerance, atol=1e-6), "the forms differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other_nor_on_their_stride(level, dtype):
    weight = torch.rand(64).to(dtype)
    wide = torch.randn(133, 192).to(dtype)
    x = wide[:, 64:128]
    together = native.rms_norm(x, weight, eps=1e-6)
    for m in (0, 7, 132):
        assert torch.equal(native.rms_norm(x[m : m + 1].clone(), weight, eps=1e-6)[0], together[m])
    wide[5] = float("nan")
    again = native.rms_norm(x, weight, eps=1e-6)
    assert torch.equal(again[6:], together[6:])
    assert again[5].isnan().all()


@pytest.mark.usefixtures("built")
def test_wrong_arguments_are_named():
    x, weight = torch.randn(3, 64), torch.rand(64)
    with pytest.raises(TypeError, match="x must be"):
        native.rms_norm(x.bfloat16(), weight, eps=1e-6)
    with pytest.raises(ValueError, match="x must have shape"):
        native.rms_norm(x, weight[:32], eps=1e-6)
