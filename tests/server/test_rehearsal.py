"""What a base does outside its attention is found before it serves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fader_adapters.kernels.backend import BackendName, choose
from fader_server.errors import ModelUnsupported
from fader_server.model.loader import LoadedBase, load_base
from fader_server.model.rehearsal import rehearse
from tests.support.families import write_family
from tests.support.many_families import LATENT, MANY, MOE, write_many
from tests.support.solo_families import SOLO

CPU = torch.device("cpu")


def load(
    source: Path, dtype: torch.dtype = torch.float32, backend: BackendName = "auto"
) -> LoadedBase:
    return load_base(str(source), dtype=dtype, device=CPU, backend=choose(CPU, dtype, backend))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("rehearsal") / "llama")


def shifted(hidden: torch.Tensor) -> torch.Tensor:
    """A convolution over the step's tokens: each hears the one before it."""
    return hidden + torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)


def counted(hidden: torch.Tensor) -> torch.Tensor:
    """Positions of the model's own counting."""
    place = torch.arange(hidden.shape[1], dtype=hidden.dtype).view(1, -1, 1)
    return hidden * (1 + 0.3 * place)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [None, shifted, counted])
def test_a_base_that_mixes_tokens_or_counts_them_outside_its_attention_is_refused(
    llama: Path, dtype: torch.dtype, fault: Callable[[torch.Tensor], torch.Tensor] | None
):
    model = load(llama, dtype).model
    if fault is None:
        rehearse(model, "llama", dtype=dtype)
        return
    inner = model.get_submodule("model.layers.1.input_layernorm")
    inner.register_forward_hook(lambda _, args, out: fault(out))
    with pytest.raises(ModelUnsupported, match="llama: LlamaForCausalLM does not give in a shared"):
        rehearse(model, "llama", dtype=dtype)


def test_the_rehearsal_leaves_the_model_as_the_engine_runs_it(llama: Path):
    model = load(llama).model
    assert model.config._attn_implementation == "fader_paged"
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("modernbert-decoder", {}, "lm_head.dense is given 4 of a step's 11 tokens"),
        ("phimoe", {**MOE, "sliding_window": 24}, "masks all but 24 keys and tells its attention"),
        ("zaya", {"num_experts_per_tok": 1}, "v_proj_delayed is given 1 of a step's 11 tokens"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "1 of 2 layers attend"),
        ("bloom", {}, "does not go through transformers' AttentionInterface"),
        ("glm_moe_dsa", {**MOE, **LATENT}, "index_topk is set"),
    ],
)
def test_families_that_would_answer_wrongly_together_run_alone_and_say_why(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    model_type: str,
    changes: dict[str, Any],
    reason: str,
):
    """On a backend that has no kernels for states."""
    loaded = load(write_many(model_type, changes, tmp_path / "base"), backend="reference")
    assert loaded.solo is not None
    assert reason in caplog.text
    row_by_row = "1 layers run row by row" if loaded.layers else "one by one between their linears"
    assert row_by_row in caplog.text


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bert", {}, "is not causal; a token's logits depend on those behind it"),
        ("roberta", {"is_decoder": True}, "nor does it give in pieces what it gives at once"),
        ("mamba", {"time_step_rank": 64}, "reads a linear's weight by itself .*mixer.dt_proj's"),
    ],
)
def test_families_that_would_answer_wrongly_are_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], reason: str
):
    base = write_many(model_type, changes, tmp_path / "base")
    with pytest.raises(ModelUnsupported, match=reason) as caught:
        load(base)
    assert "\n" not in str(caught.value)


def test_a_linear_that_the_model_reads_and_a_checkpoint_holds_packed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Transformers cannot run it either."""
    base = write_many(*SOLO["mamba"], tmp_path / "base")
    load(base)
    monkeypatch.setattr("fader_adapters.describe.read_by_itself", lambda model: frozenset())
    with pytest.raises(ModelUnsupported, match="reads a linear's weight by itself"):
        load(base)


def test_a_longrope_base_ends_at_its_original_length_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert load(write_many(*MANY["phi3-longrope"], tmp_path / "long")).max_positions == 128
    assert "sequences end at 128 tokens, not 512" in caplog.text
    assert load(write_many(*MANY["llama-yarn"], tmp_path / "yarn")).max_positions == 512
