"""`attach` on an ordinary transformers model, compared with PEFT."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from fader_adapters import attach
from fader_adapters.errors import AdapterNotFound, BaseUnsupported, BlendInvalid
from tests.support.composites import write_composite
from tests.support.families import VOCAB, outside, write_family
from tests.support.peft_adapters import write_adapter


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(request.param, tmp_path_factory.mktemp("attach") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    return {
        "one": write_adapter(base, base.parent / "one", rank=4, seed=1),
        "two": write_adapter(base, base.parent / "two", rank=16, seed=2),
    }


def _model(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def _ids(rows: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, 12), generator=torch.Generator().manual_seed(3))


def _logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_row_of_a_batch_runs_its_own_adapter_or_blend(base, adapters, backend):
    ids = _ids(4)
    lora = attach(model := _model(base), arena_bytes=1 << 22, backend=backend)
    for name, path in adapters.items():
        lora.load(name, path)
    with lora.rows([None, "one", "two", {"one": 0.5, "two": -0.25}]):
        ours = _logits(model, ids)
    peft = PeftModel.from_pretrained(_model(base), adapters["one"], adapter_name="one")
    peft.load_adapter(adapters["two"], adapter_name="two")
    peft.add_weighted_adapter(["one", "two"], [0.5, -0.25], "both", combination_type="cat")
    peft.eval()
    for row, name in enumerate([None, "one", "two", "both"]):
        if name is None:
            with peft.disable_adapter():
                theirs = _logits(peft, ids[:1])
        else:
            peft.set_adapter(name)
            theirs = _logits(peft, ids[row : row + 1])
        torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=1e-4)
    assert (ours[1] - _logits(model, ids[1:2])[0]).abs().max() > 1e-2


def test_generate_runs_under_the_rows_and_detach_restores_the_model(base, adapters):
    ids = _ids(2)
    model = _model(base)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    lora = attach(model, arena_bytes=1 << 22)
    lora.load("one", adapters["one"])
    with lora.rows([None, "one"]):
        mixed = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(mixed[0], plain[0])
    assert not torch.equal(mixed[1], plain[1])
    lora.detach()
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
    assert "site" not in repr(model).lower()


def test_after_rows_inside_of_rows_the_outer_ones_hold_again(base, adapters):
    ids = _ids(2)
    lora = attach(model := _model(base), arena_bytes=1 << 22)
    for name, path in adapters.items():
        lora.load(name, path)
    plain = _logits(model, ids)
    with lora.rows(["one", "two"]):
        outer = _logits(model, ids)
        with lora.rows(["two", None]):
            assert not torch.equal(_logits(model, ids), outer)
        with pytest.raises(AdapterNotFound), lora.rows(["missing", None]):
            pass
        assert torch.equal(_logits(model, ids), outer)
    assert torch.equal(_logits(model, ids), plain)
    assert lora._store.leases == lora._pool.pins == 0


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_base_that_is_refused_is_left_as_it_was(tmp_path: Path, backend):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = write_family("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config).eval()
    before = dict(model.named_modules())
    path = [path for path, module in before.items() if isinstance(module, Linear4bit)][-1]
    state = before[path].weight.quant_state
    state.quant_type = "fp4"
    with pytest.raises(BaseUnsupported, match=f"{path}: expected NF4 weights, found fp4"):
        attach(model, arena_bytes=1 << 22, backend=backend)
    after = dict(model.named_modules())
    assert list(after) == list(before)
    assert all(after[path] is module for path, module in before.items())
    state.quant_type = "nf4"
    lora = attach(model, arena_bytes=1 << 22, backend=backend)
    lora.detach()
    lora.detach()
    assert all(model.get_submodule(path) is module for path, module in before.items())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_forward_outside_of_no_grad_computes_without_gradients(base, adapters, backend):
    ids = _ids(2)
    lora = attach(model := _model(base), arena_bytes=1 << 22, backend=backend)
    lora.load("one", adapters["one"])
    with lora.rows([None, "one"]):
        plainly = model(input_ids=ids).logits
        assert torch.equal(plainly, _logits(model, ids))
    assert not plainly.requires_grad
    assert not model(input_ids=ids).logits.requires_grad
    lora.detach()
    assert model(input_ids=ids).logits.requires_grad


@pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied weights
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dora_of_linears_head_and_embedding_equals_peft(base, backend):
    family = _model(base).config.model_type
    path = write_adapter(
        base,
        base.parent / f"ends-{backend}",
        rank=4,
        seed=5,
        use_dora=True,
        target_modules=outside(family),
    )
    lora = attach(model := _model(base), arena_bytes=1 << 22, backend=backend)
    lora.load("ends", path)
    ids = _ids(2)
    with lora.rows([None, "ends"]):
        ours = _logits(model, ids)
    peft = PeftModel.from_pretrained(_model(base), path).eval()
    torch.testing.assert_close(ours[1], _logits(peft, ids[1:])[0], rtol=0, atol=1e-4)
    with peft.disable_adapter():
        plain = _logits(peft, ids)
    torch.testing.assert_close(ours[0], plain[0], rtol=0, atol=1e-4)
    assert (ours[1] - plain[1]).abs().max() > 1e-2
    lora.detach()
    assert "site" not in repr(model).lower()


@pytest.mark.filterwarnings("ignore")  # PEFT's advice on tied weights
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ends_that_were_trained_whole_equal_peft(base, backend):
    table, head, inside = outside(_model(base).config.model_type)
    config = {"target_modules": [inside], "modules_to_save": [table, head]}
    path = write_adapter(base, base.parent / f"whole-{backend}", rank=4, seed=6, **config)
    lora = attach(model := _model(base), arena_bytes=1 << 22, backend=backend)
    lora.load("whole", path)
    ids = _ids(3)
    with lora.rows([None, "whole", {"whole": 0.5}]):
        ours = _logits(model, ids)
    peft = PeftModel.from_pretrained(_model(base), path).eval()
    torch.testing.assert_close(ours[1], _logits(peft, ids[1:2])[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[0], _logits(_model(base), ids)[0], rtol=0, atol=1e-4)
    assert (ours[1:] - _logits(_model(base), ids[1:])).abs().amax((1, 2)).min() > 0.1


def test_unknown_names_and_wrong_batches_are_refused_and_nothing_stays_held(base, adapters):
    lora = attach(model := _model(base), arena_bytes=1 << 22)
    lora.load("one", adapters["one"])
    with pytest.raises(AdapterNotFound, match="missing"), lora.rows(["one", "missing"]):
        pass
    with lora.rows(["one"]), pytest.raises(BlendInvalid, match="3 rows"):
        model(input_ids=_ids(3))
    lora.unload("one")
    assert lora._store.leases == lora._store.versions == lora._pool.pins == 0


def test_text_of_a_model_that_sees_runs_under_adapters_and_pictures_under_none(tmp_path: Path):
    base = write_composite("llava", tmp_path / "base")
    tone = write_adapter(base, tmp_path / "tone", rank=4, seed=1)
    read = AutoModelForImageTextToText.from_pretrained
    lora = attach(model := read(base).eval(), arena_bytes=1 << 22)
    lora.load("tone", tone)
    ids = _ids(2)
    with lora.rows([None, "tone"]):
        ours = _logits(model, ids)
    peft = PeftModel.from_pretrained(read(base), tone).eval()
    torch.testing.assert_close(ours[1:], _logits(peft, ids[1:]), atol=1e-4, rtol=1e-4)
    assert (ours[:1] - _logits(peft, ids[:1])).abs().max() > 1e-2
    model.config.image_token_index = 511  # inside the tiny vocabulary
    asked = {
        "input_ids": torch.cat([torch.full((1, 4), 511), ids[:1]], dim=1),
        "pixel_values": torch.randn(1, 3, 28, 28),
    }
    with torch.inference_mode():
        with lora.rows([None]):
            seen = model(**asked).logits
        with lora.rows(["tone"]), pytest.raises(BaseUnsupported, match="given 5 of 16 tokens"):
            model(**asked)
        lora.detach()
        torch.testing.assert_close(seen, model(**asked).logits, atol=1e-4, rtol=1e-4)
