"""A mixture published in MXFP4, served as it is: base, adapters of attention and of experts, and a
blend, each as from the weights that the codes stand for."""

from pathlib import Path

import pytest
import torch
import transformers

from fader_server.cli import main
from tests.server.served_world import Said, served
from tests.server.tool_worlds import TEMPLATES, hf
from tests.support.peft_adapters import write_adapter
from tests.support.published import mxfp4, publish

BLEND = [{"name": "attention", "weight": 0.7}, {"name": "experts", "weight": -0.4}]
EXPERTS = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Codes, weights and a root of adapters."""
    folder, tokenizer = tmp_path_factory.mktemp("published"), hf(TEMPLATES["hermes"])
    torch.manual_seed(5)
    config = transformers.GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=512, initializer_range=0.05,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default"},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.GptOssForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    coded, plain = publish(folder / "base", folder, mxfp4(), torch.bfloat16)
    root = folder / "adapters"
    for name, targets in (
        ("attention", {"target_modules": ["q_proj", "o_proj"]}),
        ("experts", {"target_modules": [], "target_parameters": EXPERTS}),
    ):
        write_adapter(plain, root / name, rank=4, seed=len(name), scale=0.5, **targets)
    return coded, plain, root


async def _answers(base: Path, root: Path, experts: str) -> list[Said]:
    adapters = [f"{name}={root / name}" for name in ("attention", "experts")]
    flags: dict[str, str | list[str]] = {
        "model": str(base),
        "served_model_name": "base",
        "adapter": adapters,
        "quantize_experts": experts,
    }
    async with served(root, **flags) as world:
        return [
            await world.said("base"),
            await world.said("attention"),
            await world.said("experts"),
            await world.said("base", adapters=BLEND),
        ]


@pytest.mark.parametrize("experts", ["false", "true"])
async def test_codes_answer_as_their_weights(experts: str, folders: tuple[Path, Path, Path]):
    coded, plain, root = folders
    mine, theirs = [await _answers(base, root, experts) for base in (coded, plain)]
    assert mine == theirs  # every logprob, and the fingerprints of weights and blends
    assert len({said.scored for said in mine}) == 4


def test_fader_is_peft_over_what_the_codes_stand_for(folders, capsys):
    coded, _, root = folders
    adapters = [str(root / name) for name in ("attention", "experts")]
    options = ["--base", str(coded), "--dtype", "float32", "--tokens", "4"]
    assert main(["verify", *adapters, *options]) == 0
    told = capsys.readouterr().out
    assert "attention" in told
    assert "experts" in told
