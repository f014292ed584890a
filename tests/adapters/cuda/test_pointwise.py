"""Rotary positions and gated activations of the CUDA backend: what the model's own code gives."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda import pointwise
from fader_adapters.kernels.cuda.pointwise_configs import ACTS, Act
from fader_server.model import cuda_modules
from fader_server.model.cuda_modules import CudaGate, CudaRotary
from tests.support.families import COMMON

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")
OWN = {"silu": ACT2FN["silu"], "gelu_tanh": ACT2FN["gelu_pytorch_tanh"]}
TOKENS = [1, 7, 63, 133]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten is NaN."""

    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    monkeypatch.setattr(pointwise, "torch", SimpleNamespace(empty=empty))


def between_nans(*shape: int) -> torch.Tensor:
    """Random values whose neighbours in memory are NaN; strided."""
    wide = torch.full((*shape[:-1], shape[-1] + 32), torch.nan)
    inner = wide[..., 16 : 16 + shape[-1]]
    return inner.copy_(torch.randn(shape))


def given(
    tokens: int, heads: int, kv_heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens + dim)
    q, k = between_nans(tokens, heads, dim), between_nans(tokens, kv_heads, dim)
    return q, k, between_nans(tokens, dim), between_nans(tokens, dim)


def own(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
    """The model's function over [T, heads, dim]."""
    turned = modeling_llama.apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    return [t[0].transpose(0, 1) for t in turned]


@pytest.mark.parametrize("tokens", [*TOKENS[:-1], pytest.param(133, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(4, 2, 16), (7, 1, 48), (3, 3, 80), (9, 2, 128)])
def test_turned_heads_have_the_bits_of_the_models_own(
    tokens: int, shape: tuple[int, int, int]
) -> None:
    if tokens > 7 and shape[2] != 16:
        tokens = 9  # the interpreter takes its time
    inputs = given(tokens, *shape)
    got = pointwise.rotary(*inputs)
    for found, want in zip(got, own(*inputs), strict=True):
        assert torch.equal(found, want)
    q, k, cos, sin = inputs
    other = pointwise.rotary(q, k, sin, cos)[0]
    assert not torch.equal(other, got[0]), "the comparison notices swapped tables"


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    inputs = given(13, 4, 2, 32)
    whole = pointwise.rotary(*inputs)
    gate, up = between_nans(13, 96), between_nans(13, 96)
    active = pointwise.gated(gate, up, "silu")
    for row in (0, 5, 12):
        alone = pointwise.rotary(*(part[row : row + 1] for part in inputs))
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))
        one = slice(row, row + 1)
        assert torch.equal(pointwise.gated(gate[one], up[one], "silu")[0], active[row])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_gated_product_is_the_models_own_to_a_few_units_in_the_last_place(
    act: Act, tokens: int
) -> None:
    width = 1100 if tokens < 60 else 96
    torch.manual_seed(tokens)
    gate, up = between_nans(tokens, width).mul_(4), between_nans(tokens, width)
    got, want = pointwise.gated(gate, up, act), OWN[act](gate) * up
    most = 1e-6 * (gate * up).abs()
    assert ((got - want).abs() <= most).all()
    assert not ((got - 1.00001 * want).abs() <= most).all()


def test_extremes_stay_what_they_are() -> None:
    gate = torch.tensor([[-1e30, -200.0, 0.0, 200.0, torch.inf, torch.nan]])
    got = pointwise.gated(gate, torch.ones_like(gate), "silu")
    torch.testing.assert_close(got, torch.nn.functional.silu(gate), equal_nan=True)


def config_of(**changes: Any) -> transformers.LlamaConfig:
    given: dict[str, Any] = COMMON | {"num_hidden_layers": 2} | changes
    return transformers.LlamaConfig(**given)


def model_of() -> nn.Module:
    torch.manual_seed(0)
    build: Any = transformers.LlamaForCausalLM
    model = build(config_of()).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return model


def test_a_model_with_them_gives_its_own_logits_and_its_class_stays_as_it_was() -> None:
    model, other = model_of(), model_of()
    ids = torch.arange(5)[None]
    with torch.inference_mode():
        want = model(ids).logits
        cuda_modules.use_cuda(model)  # pyright: ignore[reportArgumentType]
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(CudaGate) == 2
        turned = [m for m in model.modules() if "forward" in vars(m)]
        assert [type(m).__name__ for m in turned] == ["LlamaAttention"] * 2
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
        assert not any("forward" in vars(m) for m in other.modules())
        assert not isinstance(modeling_llama.apply_rotary_pos_emb, CudaRotary)
        forward: Any = turned[0].forward
        stand_in = forward.__func__.__globals__["apply_rotary_pos_emb"]
        assert type(stand_in) is CudaRotary
        vars(stand_in)["_own"] = None  # had a step gone the model's way, this would show
        model(ids)


def test_other_formulas_stay() -> None:
    class Odd(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    config = config_of()
    options: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
    assert isinstance(cuda_modules._gate(LlamaMLP(config), **options), CudaGate)
    assert cuda_modules._gate(Odd(config), **options) is None
    relu = config_of(hidden_act="relu")
    assert cuda_modules._gate(LlamaMLP(relu), **options) is None
    interleaved = modeling_cohere.apply_rotary_pos_emb
    assert cuda_modules._rotary(interleaved, **options) is None
    assert cuda_modules._rotary(modeling_llama.apply_rotary_pos_emb, **options) is not None


def test_heads_that_are_turned_in_part_go_the_models_way() -> None:
    calls = []

    def partial(q, k, cos, sin, unsqueeze_dim=1):
        calls.append(cos.shape)
        return q, k

    stand_in = CudaRotary(partial)
    q, k = torch.randn(1, 4, 3, 32), torch.randn(1, 2, 3, 32)
    stand_in(q, k, torch.ones(1, 3, 16), torch.ones(1, 3, 16))
    stand_in(q, k, torch.ones(1, 3, 32), torch.ones(1, 3, 32), unsqueeze_dim=2)
    stand_in(q.repeat(2, 1, 1, 1), k, torch.ones(1, 3, 32), torch.ones(1, 3, 32))
    assert len(calls) == 3
    stand_in(q, k, torch.ones(1, 3, 32), torch.ones(1, 3, 32))
    assert len(calls) == 3
