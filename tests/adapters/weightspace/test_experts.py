"""Mixtures on disk: experts under one key or each under its own, read, inspected and merged."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from fader_adapters.errors import AdapterInvalid, CheckpointInvalid
from fader_adapters.inspection import Inspector
from fader_adapters.source import LocalSources
from fader_adapters.weightspace.alone import own_linears
from fader_adapters.weightspace.base import open_base
from fader_adapters.weightspace.compress import compress
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import write_adapter

BLEND = {"one": 0.7, "two": -0.4}
FAMILIES = [
    "gpt-oss",
    "mixtral",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek-v3", "qwen3-moe")),
]
"""One tensor [experts, in, out]; every expert by itself under older names; the same, newer."""


class Made:
    """A mixture and two adapters of its experts."""

    def __init__(self, family: str, folder: Path) -> None:
        self.base = write_many(*MANY[family], folder / "base")
        self.opened = open_base(self.base)
        linears = self.opened.spec.linears
        parameters = [item.path for item in linears if item.role == "experts"]
        parameters += [f"{item.path}.weight" for item in linears if item.role == "router"]
        targets = {"target_modules": ["o_proj"], "target_parameters": parameters}
        self.adapters = {
            name: write_adapter(
                self.base, folder / name, rank=4, seed=seed, scale=0.3, **targets
            )
            for seed, name in enumerate(BLEND)
        }  # fmt: skip
        self.stacks = [i for i, item in enumerate(linears) if item.role == "experts"]

    @property
    def blend(self) -> list[Ingredient]:
        return [Ingredient(self.adapters[name], gamma) for name, gamma in BLEND.items()]

    def peft(self, **changed: float) -> torch.nn.Module:
        """PEFT's merge of one adapter after the other, in fp32."""
        model = models.load(self.base, dtype=torch.float32)
        for name, gamma in {**BLEND, **changed}.items():
            adapted = PeftModel.from_pretrained(model, self.adapters[name])
            for module in adapted.modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= gamma
            model = adapted.merge_and_unload()
        return model


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


def test_panels_are_the_rows_of_one_expert_after_the_other(made: Made):
    model = models.load(made.base, dtype=torch.float32)
    assert made.stacks
    for index in made.stacks:
        linear = made.opened.spec.linears[index]
        own = model.get_parameter(linear.path)
        own = own.mT if linear.conv1d else own
        found = torch.cat(list(made.opened.panels(index)))
        assert torch.equal(found, own.reshape(-1, linear.in_features))


@pytest.mark.parametrize("form", ["bf16", "nf4"])
def test_a_merge_is_pefts_rounded_once(made: Made, form: str, tmp_path: Path):
    done = merge(made.base, made.blend, tmp_path / "out", form=form)  # type: ignore[arg-type]
    mine = models.load(tmp_path / "out").state_dict()
    theirs, other = made.peft().state_dict(), made.peft(one=0.72).state_dict()
    base = models.load(made.base).state_dict()
    told = {loss["path"]: loss for loss in done.report["linears"]}
    for linear in made.opened.spec.linears:
        if linear.role not in ("experts", "router"):
            continue
        name = linear.path if linear.role == "experts" else f"{linear.path}.weight"
        dtype = torch.bfloat16 if form == "bf16" else base[name].dtype
        rounded = mine[name].to(dtype)  # transformers may hold a router in fp32, whatever is stored
        assert torch.equal(rounded.float(), mine[name].float())
        bound = 2**-8 if form == "bf16" else 1e-5
        torch.testing.assert_close(mine[name].float(), theirs[name], rtol=bound, atol=1e-5)
        assert (mine[name].float() - other[name]).abs().max() > 1e-3
        change = float((theirs[name] - base[name].float()).norm())
        assert told[linear.path]["delta_norm"] == pytest.approx(change, rel=1e-3)
    if form == "bf16":
        found = models.logits(models.load(tmp_path / "out", dtype=torch.float32))
        wanted, plain = models.logits(made.peft()), models.logits(models.load(made.base))
        assert (found - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()


def test_other_experts_tensors_are_copied_as_they_are(made: Made, tmp_path: Path):
    layers = [made.opened.spec.linears[i] for i in made.stacks]
    last = layers[-1].path
    one = write_adapter(
        made.base, tmp_path / "one", rank=4, seed=3, target_modules=[], target_parameters=[last]
    )
    done = merge(made.base, [Ingredient(one)], tmp_path / "out", form="nf4")
    assert [loss["path"] for loss in done.report["linears"]] == [last]
    mine, base = (models.load(p).state_dict() for p in (tmp_path / "out", made.base))
    for linear in layers:
        same = torch.equal(mine[linear.path], base[linear.path])
        assert same == (linear.path != last)


@pytest.mark.parametrize("what", ["experts", "router"])
def test_a_tied_mixture_stays_tied_when_its_ends_are_left_alone(tmp_path: Path, what: str):
    kind, changes = MANY["mixtral"]
    base = write_many(kind, {**changes, "tie_word_embeddings": True}, tmp_path / "base")
    linear = next(item for item in open_base(base).spec.linears if item.role == what)
    parameter = linear.path if what == "experts" else f"{linear.path}.weight"
    one = write_adapter(
        base, tmp_path / "one", rank=2, seed=1, target_modules=[], target_parameters=[parameter]
    )
    merge(base, [Ingredient(one)], tmp_path / "out", form="bf16")
    mine = models.load(tmp_path / "out")
    assert mine.config.tie_word_embeddings
    assert mine.lm_head.weight is mine.get_input_embeddings().weight


def test_an_adapter_of_experts_is_read_without_its_base(made: Made):
    raw = LocalSources(()).fetch_trusted(made.adapters["one"])
    alone = Inspector(own_linears(raw), dtype=torch.float32)
    with_base = Inspector(made.opened.spec, dtype=torch.float32, weights=made.opened)
    found, wanted = (i.health(i.read(raw)) for i in (alone, with_base))
    assert found.report.matched == wanted.report.matched
    for one, other in zip(found.kinds, wanted.kinds, strict=True):
        assert (one.kind, one.modules, one.ranks) == (other.kind, other.modules, other.ranks)
        assert one.delta_norm == pytest.approx(other.delta_norm, rel=1e-5)
        assert other.relative_norm


def test_experts_are_not_compressed(made: Made, tmp_path: Path):
    with pytest.raises(AdapterInvalid, match="experts, expected linears alone"):
        compress(made.blend, tmp_path / "out", rank=4)
    with pytest.raises(AdapterInvalid, match="expected linears alone"):
        compress(made.blend, tmp_path / "out", rank=4, base=made.opened.spec)


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path):
    made = Made("mixtral", tmp_path)
    gone = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    damaged = models.rewrite(made.base, tmp_path / "damaged", lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointInvalid, match=r"no tensor for .*1\.mlp\.experts\.gate_up_proj"):
        merge(damaged, made.blend, tmp_path / "out", form="bf16")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))
    one = write_adapter(made.base, tmp_path / "one", rank=4, seed=3, target_modules=["o_proj"])
    done = merge(damaged, [Ingredient(one)], tmp_path / "linears", form="bf16")
    assert {loss["path"].rpartition(".")[2] for loss in done.report["linears"]} == {"o_proj"}
