import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

from bench.make_model import DELTA, PRESETS, write_all  # noqa: E402

SHAPE = PRESETS["tiny"]


def make(out: Path, seed: int = 0) -> Path:
    write_all(out, SHAPE, adapters=2, seed=seed, dtype=torch.float32, adapter_dtype=torch.bfloat16)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("model"))


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*.safetensors")}


def test_one_seed_writes_the_same_bytes_and_another_seed_does_not(made, tmp_path):
    assert files(make(tmp_path / "same")) == files(made)
    other = files(make(tmp_path / "other", seed=1))
    assert other.keys() == files(made).keys()
    assert all(other[name] != data for name, data in files(made).items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_base_and_adapters_load_in_the_usual_tools(made):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        made / "base", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        base = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, made / "adapters" / "a01")
        assert adapted.peft_config["default"].r == 16
        assert (adapted(ids).logits - base).abs().max() > 1e-3
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        ratio = layer.get_delta_weight("default").norm() / layer.base_layer.weight.norm()
    assert float(ratio) == pytest.approx(DELTA, rel=0.15)


def test_tokenizer_has_every_id_and_each_shows_as_text(made):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "base")
    assert len(tokenizer) == SHAPE.vocab
    padded = [tokenizer.decode([number]) for number in range(SHAPE.vocab - 20, SHAPE.vocab)]
    assert all(text.strip() for text in padded)
    text = "Olá, wörld! 你好"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert json.loads((made / "base" / "config.json").read_text())["vocab_size"] == SHAPE.vocab
