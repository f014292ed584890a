"""Checkpoints of transformers 4, in which every expert is an NF4 linear of its own."""

import json
import re
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.plan import Form
from fader_adapters.weightspace.terms import Ingredient
from fader_server.errors import ModelUnsupported
from fader_server.model.writing import quantize
from tests.server.parity.test_expert_adapters import ARENA, LIMITS, base_of
from tests.server.parity.test_families import BOUND
from tests.server.parity.test_many_families import asks
from tests.support.peft_adapters import write_adapter
from tests.support.world import Answer, Ask, TinyWorld

CPU = torch.device("cpu")
EXPERT = re.compile(r"\.experts\.\d+\.[^.]+\.weight$")
FAMILIES = [
    "qwen3-moe",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("mixtral", "deepseek-v3", "qwen2-moe")),
]


def written(family: str, folder: Path) -> tuple[Path, Path]:
    """Such a checkpoint, and one with the decoded experts, unquantised."""
    quantize(str(base_of(family, folder)), folder / "packed", device=CPU)
    quantize(str(folder / "base"), folder / "decoded", device=CPU)
    packed, decoded = (load_file(folder / n / "model.safetensors") for n in ("packed", "decoded"))
    own = [key for key in packed if EXPERT.search(key)]
    assert own
    for key in own:
        codes, state = bnb.functional.quantize_4bit(
            packed[key], blocksize=64, quant_type="nf4", compress_statistics=True
        )
        decoded[key] = bnb.functional.dequantize_4bit(codes, state)
        packed[key] = codes
        packed |= {f"{key}.{name}": part for name, part in state.as_dict(packed=True).items()}
    for name, tensors in (("packed", packed), ("decoded", decoded)):
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "packed", folder / "decoded"


def questions() -> list[Ask]:
    return [Ask(ask.prompt, {}, ask.params) for ask in asks(512)[:3]]


def difference(some: list[Answer], others: list[Answer]) -> float:
    """Of the logprobs of prompts, the largest."""
    told = [
        torch.tensor([t.logprob for answer in answers for t in answer.prompt_logprobs])
        for answers in (some, others)
    ]
    return float((told[0] - told[1]).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_served_as_it_decodes(family: str, tmp_path: Path):
    packed, decoded = written(family, tmp_path)
    world = TinyWorld(packed, limits=LIMITS, arena=ARENA)
    stacks = [s for s in world.base.installed.stacks.values() if s.spec.role == "experts"]
    assert all(stack.weight.plain_dtype is None for stack in stacks)
    found = world.run(questions())
    wanted = TinyWorld(decoded, limits=LIMITS, arena=ARENA).run(questions())
    assert difference(found, wanted) <= BOUND[torch.float32]
    plain = TinyWorld(tmp_path / "base", limits=LIMITS, arena=ARENA).run(questions())
    assert difference(found, plain) > 10 * BOUND[torch.float32]


def test_weight_space_reads_them_decoded(tmp_path: Path):
    packed, decoded = written("mixtral", tmp_path)
    one, other = open_base(packed), open_base(decoded)
    stacks = [i for i, item in enumerate(one.spec.linears) if item.role == "experts"]
    assert stacks
    for index in stacks:
        found, wanted = (torch.cat(list(base.panels(index))) for base in (one, other))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_merges_keep_the_form_that_is_asked_for(form: Form, tmp_path: Path):
    packed, decoded = written("mixtral", tmp_path)
    (last,) = [i.path for i in open_base(packed).spec.linears if i.role == "experts"][-1:]
    one = write_adapter(
        tmp_path / "base",
        tmp_path / "one", rank=4, seed=3, scale=0.3, target_modules=[], target_parameters=[last],
    )  # fmt: skip
    told = [
        merge(base, [Ingredient(one)], tmp_path / f"{base.name}-out", form=form)
        for base in (packed, decoded)
    ]
    found, wanted = (open_base(done.directory) for done in told)
    stacks = [i for i, item in enumerate(found.spec.linears) if item.role == "experts"]
    for index in stacks:
        item = found.spec.linears[index]
        assert all(found.is_packed(key) == (form == "nf4") for key in found.keys(item))
        rows, exact = (torch.cat(list(base.panels(index))) for base in (found, wanted))
        if form == "bf16" or item.path != last:
            assert torch.equal(rows, exact)
        else:
            (loss,) = told[0].report["linears"]
            assert float((rows - exact).norm()) == pytest.approx(loss["error_norm"], rel=0.01)
            assert 0 < loss["error_norm"] < loss["delta_norm"]
    names = set(load_file(packed / "model.safetensors"))
    assert (set(load_file(tmp_path / "packed-out/model.safetensors")) == names) == (form == "nf4")


def test_where_one_expert_is_not_packed_the_base_is_refused(tmp_path: Path):
    packed, decoded = written("qwen3-moe", tmp_path)
    tensors, plain = (load_file(f / "model.safetensors") for f in (packed, decoded))
    key = next(key for key in sorted(tensors) if EXPERT.search(key))
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{key}.")}
    tensors[key] = plain[key]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=f"{re.escape(key)} is not"):
        TinyWorld(packed, limits=LIMITS)


def test_a_checkpoint_of_packed_layers_alone_is_read_by_transformers(tmp_path: Path):
    quantize(str(base_of("qwen3-moe", tmp_path)), tmp_path / "nf4", device=CPU)
    world = TinyWorld(tmp_path / "nf4", limits=LIMITS)
    stacks = [s for s in world.base.installed.stacks.values() if s.spec.role == "experts"]
    assert all(stack.weight.plain_dtype == torch.float32 for stack in stacks)
    assert "experts_in_nf4" not in json.loads((tmp_path / "nf4" / "config.json").read_text())
