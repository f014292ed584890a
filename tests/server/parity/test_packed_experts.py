"""Bases whose experts are held in NF4 as well, against transformers + PEFT over experts that
bitsandbytes packed and decoded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fader_adapters import layers
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import BackendName
from fader_adapters.kernels.cpu_experts import PanelStack
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight
from fader_server.errors import ConfigInvalid, ModelUnsupported
from fader_server.model.fidelity import measure
from fader_server.model.probe import ProbeModel
from fader_server.model.writing import quantize
from tests.server.parity.test_expert_adapters import (
    ARENA,
    BY_NAME,
    BY_PARAMETER,
    LIMITS,
    base_of,
    opened,
)
from tests.server.parity.test_expert_lanes import BLEND, bits
from tests.server.parity.test_expert_lanes import asks as blended
from tests.server.parity.test_families import BOUND, check, difference, prompts
from tests.server.parity.test_many_families import asks
from tests.support.lanes import changes_of, merge, publish, weights_hash
from tests.support.many_families import MANY, write_many
from tests.support.oracle import Oracle, nf4_oracle
from tests.support.world import Ask, TinyWorld

CPU = torch.device("cpu")
QUICK = frozenset({"gpt-oss", "qwen3-moe"})
"""Transposed, interleaved and with biases, and plain."""


def families(*backends: BackendName, quick: frozenset[str] = QUICK) -> list:
    return [
        pytest.param(
            *(family, backend),
            id=f"{family}-{backend}",
            marks=[] if family in quick and backend == "auto" else pytest.mark.slow,
        )
        for family in (*BY_NAME, *BY_PARAMETER)
        for backend in backends
    ]


def stacks(world: TinyWorld) -> list:
    return [s.weight for s in world.base.installed.stacks.values() if s.spec.role == "experts"]


@pytest.mark.parametrize(("family", "backend"), families("auto", "reference"))
def test_mixed_batches_equal_peft(family: str, backend: BackendName, tmp_path: Path):
    world, oracle = opened(family, tmp_path, backend=backend, quantize_experts=True)
    assert all(weight.plain_dtype is None for weight in stacks(world))
    questions = asks(world.base.max_positions)
    answers = world.run(questions)
    check(oracle, questions, answers, BOUND[torch.float32])
    plain = Oracle(tmp_path / "base", torch.float32, {})
    of_base = next(i for i, ask in enumerate(questions) if not ask.blend)
    far = difference(plain, questions[of_base], answers[of_base], 10.0)
    assert far > 10 * BOUND[torch.float32], "nothing was packed"


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
@pytest.mark.parametrize(("family", "backend"), families("auto", quick=frozenset({"qwen3-moe"})))
def test_a_row_has_the_bits_that_it_has_alone(
    family: str, backend: BackendName, dtype: torch.dtype, tmp_path: Path
):
    world, _ = opened(family, tmp_path, backend=backend, dtype=dtype, quantize_experts=True)
    questions = asks(world.base.max_positions)
    together = bits(world.run(questions))
    for _ in range(2):  # recorded, then run
        assert bits(world.run(questions)) == together
    for ask, answer in zip(questions, together, strict=True):
        assert bits(world.run([ask])) == [answer]
    changed = Ask(questions[1].prompt, {"r8": 0.95}, questions[1].params)
    assert bits(world.run([changed])) != [together[1]], "the comparison sees nothing"


@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
def test_steps_over_packed_experts_are_recorded_and_trusted(tmp_path: Path):
    world, _ = opened("qwen3-moe", tmp_path, dtype=torch.bfloat16, quantize_experts=True)
    for _ in range(3):
        world.run(blended({}, {"r8": 1.0}, BLEND))
    replays = world.runner._replays
    assert replays is not None
    assert replays.decode._trusted
    assert replays.prefill._enabled


@pytest.mark.parametrize("family", [pytest.param("gpt-oss", marks=pytest.mark.slow), "qwen3-moe"])
def test_lanes_keep_the_form_of_the_base(family: str, tmp_path: Path):
    world, oracle = opened(family, tmp_path, quantize_experts=True)
    before = weights_hash(world.base.installed)
    exact = merge(world, BLEND, form="bf16")
    packed = merge(world, BLEND, form="nf4")
    experts = [
        index for index, s in world.base.installed.stacks.items() if s.spec.role == "experts"
    ]
    for index in experts:
        assert exact.weights.stacks[index].plain_dtype == torch.float32
        assert packed.weights.stacks[index].plain_dtype is None
        base = world.base.installed.stacks[index].weight
        assert packed.weights.stacks[index].nbytes == base.nbytes
    publish(world, exact)
    mixed = blended(BLEND)
    answers = world.run(mixed)
    assert all(row.lane is not None for plan in world.plans for row in plan.rows)
    check(oracle, mixed, answers, BOUND[torch.float32])
    probe = ProbeModel(world.base, lambda: None)
    changes, tokens = changes_of(world, BLEND), prompts(6)[5]
    told = measure(probe, tokens, changes, packed)
    assert measure(probe, tokens, changes, exact).kl < told.kl < told.base_kl
    small = {name: weight / 5 for name, weight in BLEND.items()}
    for rounding, survive in (("keep", True), ("plain", False)):
        losses = merge(world, small, form="nf4", rounding=rounding).losses
        parts = [loss.survival for loss in losses if ".experts." in loss.path]
        assert parts
        assert all((part > 0.4) == survive for part in parts), "what is left of the delta"
    assert weights_hash(world.base.installed) == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_of_packed_experts_is_the_same_base(dtype: str, tmp_path: Path):
    base = base_of("gpt-oss", tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    stored = json.loads((base / "config.json").read_text()) | {"dtype": dtype}
    (base / "config.json").write_text(json.dumps(stored))
    quantize(str(base), tmp_path / "packed", device=CPU, experts=True)
    mixed = asks(512)[:3]
    plain = [Ask(ask.prompt, {}, ask.params) for ask in mixed]
    worlds = [
        TinyWorld(base, limits=LIMITS, quantize_experts=True),
        TinyWorld(tmp_path / "packed", limits=LIMITS, quantize_experts=True),
        TinyWorld(tmp_path / "packed", limits=LIMITS),
    ]
    first, *others = [(w.base.installed.spec.weights, bits(w.run(plain))) for w in worlds]
    assert others == [first, first]
    assert TinyWorld(base, limits=LIMITS).base.installed.spec.weights != first[0]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    assert config["quantization_config"]["experts_in_nf4"] is True
    sizes = [
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (base, tmp_path / "packed")
    ]
    assert sizes[1] < (0.5 if dtype == "float32" else 0.8) * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "granite-moe", "qwen3-next"])
def test_families_stored_by_expert_come_back_too(family: str, tmp_path: Path):
    base = base_of(family, tmp_path)
    quantize(str(base), tmp_path / "packed", device=CPU, experts=True)
    one = TinyWorld(base, limits=LIMITS, quantize_experts=True)
    two = TinyWorld(tmp_path / "packed", limits=LIMITS)
    assert one.base.installed.spec.weights == two.base.installed.spec.weights
    mixed = [Ask(ask.prompt, {}, ask.params) for ask in asks(512)[:3]]
    assert bits(one.run(mixed)) == bits(two.run(mixed))


def test_what_is_quantised_but_for_its_experts_is_refused(tmp_path: Path):
    quantize(str(base_of("qwen3-moe", tmp_path)), tmp_path / "nf4", device=CPU)
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert "experts_in_nf4" not in config["quantization_config"]
    with pytest.raises(ConfigInvalid, match="fader quantize --experts"):
        TinyWorld(tmp_path / "nf4", quantize_experts=True)


def test_widths_that_blocks_would_straddle_stay_as_they_are(tmp_path: Path):
    kind, settings = MANY["mixtral"]
    base = write_many(kind, {**settings, "intermediate_size": 80}, tmp_path / "base")
    world = TinyWorld(base, limits=LIMITS, arena=ARENA, quantize_experts=True)
    assert {type(weight) for weight in stacks(world)} == {PanelStack, StackWeight} or (
        {type(weight) for weight in stacks(world)} == {Nf4Stack, StackWeight}
    )
    assert [weight.plain_dtype for weight in stacks(world)[:2]] == [None, torch.float32]
    mixed = [Ask(ask.prompt, {}, ask.params) for ask in asks(512)[:3]]
    answers = world.run(mixed)
    model = nf4_oracle(base, torch.float32, experts=True)
    check(Oracle(model, torch.float32, {}), mixed, answers, BOUND[torch.float32])


def test_values_that_are_not_finite_are_refused(tmp_path: Path):
    base = base_of("qwen3-moe", tmp_path)
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "experts.3" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match="finite"):
        TinyWorld(base, quantize_experts=True)


def test_experts_that_compute_otherwise_are_not_served_packed(tmp_path: Path, monkeypatch):
    base = base_of("qwen3-moe", tmp_path)
    paths = {f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down")}
    monkeypatch.setattr(layers, "unproven", lambda model, spec: paths)
    with pytest.raises(ModelUnsupported, match=f"{min(paths)} is in NF4"):
        TinyWorld(base, quantize_experts=True)
    TinyWorld(base)


def test_a_base_without_experts_says_that_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = write_many("llama", {}, tmp_path / "base")
    TinyWorld(base, quantize_experts=True)
    quantize(str(base), tmp_path / "nf4", device=CPU, experts=True)
    assert caplog.text.count("no experts that could be held in NF4") == 2
    assert "experts_in_nf4" not in (tmp_path / "nf4" / "config.json").read_text()
