"""RMS norms and the output layer of the CUDA backend: the model's own results, bits of a row."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda.dense import FixedRows
from fader_adapters.kernels.cuda.nf4 import Scratch
from fader_adapters.kernels.cuda.norm import gated_rms_norm
from fader_adapters.kernels.dense import DenseLinear
from fader_server.model import cuda_modules
from fader_server.model.cuda_modules import CudaNorm
from fader_server.model.norm import GatedNorm, replace_gated_norms

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")


def norm_of(kind: type[nn.Module], width: int) -> nn.Module:
    torch.manual_seed(width)
    norm = kind(width, eps=1e-6)
    norm.weight.data.copy_(torch.randn(width))
    return norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("width", [64, 200, 1536])
def test_a_norm_gives_what_the_models_own_gives(kind: type[nn.Module], width: int) -> None:
    own = norm_of(kind, width)
    found = cuda_modules._norm(own, torch.float32)
    assert isinstance(found, CudaNorm)
    x = torch.randn(2, 3, width) * 5
    torch.testing.assert_close(found(x), own(x), rtol=1e-5, atol=1e-6)
    wider = torch.randn(6, width + 16)[:, :width]
    torch.testing.assert_close(found(wider), own(wider), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 63])
@pytest.mark.parametrize(
    "own",
    [
        Qwen3_5RMSNormGated(64, eps=1e-5),
        Zamba2RMSNormGated(192, 96, eps=1e-5),
        KimiLinearRMSNormGated(64, eps=1e-5),
    ],
    ids=["behind a gate", "groups within one", "a sigmoid"],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_gated_norm_gives_what_the_models_own_gives(own: nn.Module, rows: int) -> None:
    width = own.weight.shape[0]  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    nn.init.normal_(own.get_parameter("weight"), 0.9, 0.2)
    model = nn.Sequential(own)
    assert replace_gated_norms(model, dtype=torch.float32, kernel=gated_rms_norm) == 1
    found = model[0]
    assert isinstance(found, GatedNorm)
    wide = torch.full((2, rows, width + 32), torch.nan)
    x, gate = wide[..., 16 : 16 + width].copy_(torch.randn(2, rows, width) * 5)
    y = found(x, gate)
    torch.testing.assert_close(y, own(x, gate), rtol=1e-5, atol=1e-6)
    assert torch.equal(found(x[-1:], gate[-1:]), y[-1:])
    assert not torch.allclose(found(x, gate.flip(-1)), y)


def test_a_norm_of_another_formula_stays() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    assert cuda_modules._norm(norm_of(OddRMSNorm, 64), torch.float32) is None


class Shifted(LlamaRMSNorm):
    """In bf16, of which Triton's interpreter has none: what it gives is the kernel's, too, but for
    what is done to it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.weight.data = self.weight.data.bfloat16()


def turned(y: torch.Tensor) -> torch.Tensor:
    """One value in twenty is two roundings off, the others are as they were."""
    flat = y.clone().view(torch.int16).view(-1)
    flat[::20] += 2
    return flat.view(torch.bfloat16).view(y.shape)


@pytest.mark.parametrize(
    ("kernel", "taken"),
    [
        (turned, True),
        (lambda y: y * 1.01, False),
        (lambda y: torch.where(y == y.max(), y * 1.05, y), False),
    ],
    ids=["a rounding turned", "all values off", "one value off"],
)
def test_a_norm_may_round_the_other_way_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[[torch.Tensor], torch.Tensor], taken: bool
) -> None:
    own = Shifted(256, eps=1e-6)
    monkeypatch.setattr(cuda_modules, "rms_norm", lambda rows, *_, **__: kernel(own(rows)))
    assert (cuda_modules._norm(own, torch.bfloat16) is not None) is taken
    assert cuda_modules._norm(own, torch.float32) is None, "activations of another dtype"


def test_norms_that_stay_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    class Model(nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def __init__(self, kind: type[nn.Module]) -> None:
            super().__init__()
            self.first, self.second = norm_of(kind, 64), norm_of(kind, 64)

        def get_input_embeddings(self) -> None: ...

    cuda_modules.use_cuda(Model(LlamaRMSNorm))  # pyright: ignore[reportArgumentType]
    assert not caplog.messages
    cuda_modules.use_cuda(Model(OddRMSNorm))  # pyright: ignore[reportArgumentType]
    assert len(caplog.messages) == 1
    assert "OddRMSNorm" in caplog.text


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 130])
def test_rows_of_the_head_do_not_depend_on_their_number(rows: int) -> None:
    torch.manual_seed(0)
    inner = DenseLinear(torch.randn(96, 64), torch.randn(96))
    scratch = Scratch(torch.device("cpu"))
    found = FixedRows(inner, inner.weight, scratch)
    x = torch.randn(130, 64)
    assert torch.equal(found(x), inner(x))
    for scratch.way in ("fused", "pieces"):
        whole = found(x)
        torch.testing.assert_close(whole, inner(x))
        assert torch.equal(found(x[:rows]), whole[:rows])
        assert found(x[:0]).shape == (0, 96)
    assert torch.equal(found.rows(3, 9), inner.weight[3:9])
