"""Checkpoints whose experts are in NF4, where they are not served: verified, inspected, merged."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.make_model import write_tokenizer
from fader_adapters.errors import CheckpointInvalid
from fader_adapters.inspection import Inspector
from fader_adapters.layers import Installed
from fader_adapters.source import LocalSources
from fader_adapters.stacks import absmax_of
from fader_adapters.weightspace.base import Base, open_base
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from fader_server.model.writing import quantize
from fader_server.peft_side import nf4_model
from fader_server.verification import verify
from tests.adapters.weightspace import models
from tests.server.parity.test_expert_adapters import ARENA, LIMITS, Summed, base_of, written
from tests.server.parity.test_expert_lanes import BLEND
from tests.support.families import VOCAB
from tests.support.peft_adapters import write_adapter
from tests.support.world import TinyWorld

FAMILIES = [
    "gpt-oss",
    *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen3-moe", "mixtral")),
]


class Made:
    """A mixture with packed experts, two adapters of them, and PEFT over the decoded base."""

    def __init__(self, family: str, folder: Path) -> None:
        self.plain = plain = base_of(family, folder)
        self.base = folder / "packed"
        quantize(str(plain), self.base, device=torch.device("cpu"), experts=True)
        write_tokenizer(self.base, VOCAB)
        self.world = TinyWorld(self.base, limits=LIMITS, arena=ARENA)
        self.adapters = written(family, folder, self.world, plain)
        self.stacks = [
            item for item in self.world.base.installed.spec.linears if item.role == "experts"
        ]

    def blend(self, **changed: float) -> list[Ingredient]:
        terms = {**BLEND, **changed}
        return [Ingredient(self.adapters[name], gamma) for name, gamma in terms.items()]

    def peft(self, blend: dict[str, float]) -> torch.Tensor:
        model = nf4_model(str(self.base), torch.float32)
        return Summed(model, torch.float32, self.adapters).logits(models.IDS[0].tolist(), blend)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_verify_compares_with_peft_over_the_decoded_experts(made: Made, tmp_path: Path):
    one = write_adapter(made.plain, tmp_path / "one", rank=4, target_modules=["o_proj"], seed=1)
    found = verify(str(made.base), {"one": one}, dtype=torch.float32, tokens=4)
    assert found.ok
    assert all(finding.difference < 1e-4 for finding in found.findings)


def test_inspection_measures_against_what_is_served(made: Made):
    raw = LocalSources(()).fetch_trusted(made.adapters["r8"])

    def norms(weights: Base | Installed) -> dict[str, float | None]:
        inspector = Inspector(weights.spec, dtype=torch.float32, weights=weights)
        return {kind.kind: kind.base_norm for kind in inspector.health(inspector.read(raw)).kinds}

    found = norms(open_base(made.base))
    assert found == pytest.approx(norms(made.world.base.installed), rel=1e-5)
    plain = norms(open_base(made.plain))
    assert abs(plain["down_proj"] - found["down_proj"]) > 1e-4 * found["down_proj"]


def test_a_merge_in_bf16_is_read_by_transformers(made: Made, tmp_path: Path):
    merge(made.base, made.blend(), tmp_path / "out", form="bf16")
    model = models.load(tmp_path / "out", dtype=torch.float32)
    found, wanted = models.logits(model), made.peft(BLEND)
    plain, other = made.peft({}), made.peft({**BLEND, "r8": 0.5})
    assert (found - wanted).abs().max() < 0.1 * (plain - wanted).abs().max()
    assert (found - wanted).norm() < 0.5 * (found - other).norm()


def test_a_merge_in_nf4_packs_again_what_changed(made: Made, tmp_path: Path):
    last = made.stacks[-1].path
    one = write_adapter(
        made.plain,
        tmp_path / "one", rank=4, seed=3, scale=0.3, target_modules=[], target_parameters=[last],
    )  # fmt: skip
    done = merge(made.base, [Ingredient(one)], tmp_path / "out", form="nf4")
    before, after = (load_file(p / "model.safetensors") for p in (made.base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {last, absmax_of(last)}
    (told,) = done.report["linears"]
    assert told["path"] == last
    assert 0 < told["relative_error"] < 1
    merged = TinyWorld(tmp_path / "out", limits=LIMITS).base.installed
    index = merged.spec.index_of[last]
    rows = torch.cat(list(merged.panels(index)))
    given = torch.cat(list(made.world.base.installed.panels(index)))
    error = told["relative_error"] * told["delta_norm"]
    assert float((rows - given).norm()) == pytest.approx(told["delta_norm"], abs=error)


def test_scales_of_another_shape_are_refused(made: Made, tmp_path: Path):
    last = absmax_of(made.stacks[-1].path)

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[last] = tensors[last][:, 1:].contiguous()

    damaged = models.rewrite(made.base, tmp_path / "damaged", cut)
    with pytest.raises(CheckpointInvalid, match="expected NF4 of"):
        merge(damaged, made.blend(), tmp_path / "out", form="bf16")
