"""The native RMS norm against transformers' two forms, on every instruction set."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fader_adapters.kernels import native

FLOATS = (torch.float32, torch.bfloat16)


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


GATED = [(inside, sigmoid) for inside in (False, True) for sigmoid in (False, True)]


def gated(x, gate, weight, *, inside, sigmoid, group, eps=1e-5):
    """The formula in fp64."""
    x, gate, weight = x.double(), gate.double(), weight.double()
    opened = gate.sigmoid() * (1.0 if sigmoid else gate)
    x = x * opened if inside else x
    parts = x.unflatten(-1, (-1, group))
    n = parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()
    return weight * n.flatten(-2) * (1.0 if inside else opened)


@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
@pytest.mark.parametrize(("inside", "sigmoid"), GATED)
@pytest.mark.parametrize("group", [32, 96])
def test_gated_norms_are_their_formula_and_a_rows_bits_its_own(
    level, inside, sigmoid, group, dtypes
):
    wide, weight = torch.randn(133, 192).mul(2), torch.rand(96)
    x, gate = wide[:, :96].to(dtypes[0]), wide.to(dtypes[1])[:, 96:]
    form = native.GateForm(inside, sigmoid)
    ours = native.gated_rms_norm(x, gate, weight, form=form, group=group, eps=1e-5)
    tolerance = 2**-8 if dtypes[0] == torch.bfloat16 else 1e-5
    expected = gated(x, gate, weight, inside=inside, sigmoid=sigmoid, group=group)
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=1e-6)
    other = gated(x, gate, weight, inside=not inside, sigmoid=sigmoid, group=group)
    assert not torch.allclose(ours.double(), other, rtol=tolerance, atol=1e-2)
    for m in (0, 7, 132):
        one = slice(m, m + 1)
        again = native.gated_rms_norm(
            x[one].clone(), gate[one].clone(), weight, form=form, group=group, eps=1e-5
        )
        assert torch.equal(again[0], ours[m])


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("group", [24, 40, 64])
def test_groups_that_the_gated_norm_does_not_take_are_refused(group):
    form, x = native.GateForm(False, False), torch.randn(3, 96)
    with pytest.raises(ValueError, match="does not take"):
        native.gated_rms_norm(x, x, torch.rand(96), form=form, group=group, eps=1e-5)
