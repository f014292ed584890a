"""Adapters of mixtures' experts and routers against transformers + PEFT, in mixed batches.

PEFT writes them as target_parameters, runs one of them a batch and has no `cat` for them: a blend
is its sum of active adapters there, each at a scale of its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import BackendName
from fader_adapters.kernels.cpu_experts import NativeStack, PanelStack
from fader_adapters.kernels.stack_weights import StackWeight
from fader_server.engine.limits import Limits
from tests.server.parity.test_families import BOUND, check, difference
from tests.server.parity.test_many_families import asks
from tests.support.many_families import MANY, write_many
from tests.support.oracle import Oracle, nf4_oracle
from tests.support.peft_adapters import write_adapter
from tests.support.solo_families import SOLO
from tests.support.world import Ask, TinyWorld, greedy

BY_NAME = ("mixtral", "olmoe", "qwen3-moe")
"""Families whose experts and routers PEFT finds by `all-linear`."""
BY_PARAMETER = (
    "deepseek-v2",
    "deepseek-v3",
    "flint",
    "gpt-oss",
    "granite-hybrid-moe",
    "granite-moe",
    "lfm2-moe",
    "mimo-v2-flash",
    "phi-moe",
    "qwen2-moe",
    "qwen3-next",
    "zaya",
)
QUICK = frozenset({"gpt-oss", "phi-moe"})
ARENA = 1 << 23
RANK = 4
LIMITS = Limits(max_rows=16, max_step_tokens=96, chunk_size=32, max_model_len=512)


class Summed(Oracle):
    """A blend by PEFT's sum of active adapters, their scales multiplied by γ."""

    def _blended(self, blend: Mapping[str, float]) -> str | list[str]:  # type: ignore[override]
        assert isinstance(self._model, PeftModel)
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                for name, scale in module.scaling.items():
                    own = getattr(module, "own_scaling", {}).get(name, scale)
                    module.own_scaling = {**getattr(module, "own_scaling", {}), name: own}
                    module.scaling[name] = own * blend.get(name, 1.0)
        return list(blend)

    def logits(self, tokens, blend):
        if not blend:
            return super().logits(tokens, blend)
        active = self._blended(blend)
        assert isinstance(self._model, PeftModel)
        self._model.base_model.set_adapter(active)
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            return self._model(input_ids=ids, use_cache=False).logits[0].float()


def targets(family: str, world: TinyWorld) -> dict[str, object]:
    """What PEFT is to adapt: attention's linears, experts and routers."""
    if family in BY_NAME:
        return {"target_modules": "all-linear"}
    linears = world.base.installed.spec.linears
    parameters = [item.path for item in linears if item.role == "experts"]
    parameters += [f"{item.path}.weight" for item in linears if item.role == "router"]
    modules = [item.path for item in linears if item.path.endswith("o_proj")]
    return {"target_modules": modules, "target_parameters": parameters}


def written(family: str, folder: Path, world: TinyWorld, base: Path) -> dict[str, Path]:
    return {
        name: write_adapter(
            base, folder / name, rank=rank, seed=rank, scale=0.05, **targets(family, world)
        )
        for name, rank in (("r8", 8), ("r16", 16))
    }


def base_of(family: str, folder: Path) -> Path:
    return write_many(*(MANY[family] if family in MANY else SOLO[family]), folder / "base")


def settings(*backends: BackendName) -> list:
    return [
        pytest.param(
            *(family, backend),
            id=f"{family}-{backend}",
            marks=[] if family in QUICK and backend == "auto" else pytest.mark.slow,
        )
        for family in (*BY_NAME, *BY_PARAMETER)
        for backend in backends
    ]


def opened(
    family: str, folder: Path, *, quantize_experts: bool = False, **options
) -> tuple[TinyWorld, Summed]:
    """A world with two adapters, and PEFT with the same."""
    base = base_of(family, folder)
    world = TinyWorld(
        base, limits=LIMITS, arena=ARENA, quantize_experts=quantize_experts, **options
    )
    given = written(family, folder, world, base)
    for name, path in given.items():
        world.load(name, path)
    oracle = nf4_oracle(base, world.base.dtype, experts=quantize_experts)
    return world, Summed(oracle, world.base.dtype, given)


@pytest.mark.parametrize(("family", "backend"), settings("auto", "reference"))
def test_mixed_batches_equal_peft(family: str, backend: BackendName, tmp_path: Path):
    world, oracle = opened(family, tmp_path, backend=backend)
    roles = {item.role for item in world.base.installed.spec.linears}
    assert "experts" in roles
    questions = asks(world.base.max_positions)
    answers = world.run(questions)
    check(oracle, questions, answers, BOUND[torch.float32])
    other = Ask(questions[1].prompt, {"r8": 0.8}, questions[1].params)
    assert difference(oracle, other, answers[1], 1.0) > 10 * BOUND[torch.float32]


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
@pytest.mark.parametrize(("family", "backend"), settings("auto"))
def test_a_row_has_the_bits_that_it_has_alone(
    family: str, backend: BackendName, dtype: torch.dtype, tmp_path: Path
):
    world, _ = opened(family, tmp_path, backend=backend, dtype=dtype)
    questions = asks(world.base.max_positions)
    together = world.run(questions)
    for ask, answer in zip(questions, together, strict=True):
        (alone,) = world.run([ask])
        assert alone.tokens == answer.tokens
        assert alone.logprobs == answer.logprobs
        assert alone.prompt_logprobs == answer.prompt_logprobs
    changed = Ask(questions[1].prompt, {"r8": 0.95}, questions[1].params)
    assert world.run([changed])[0].logprobs != together[1].logprobs, "the comparison sees nothing"


def write_older(
    world: TinyWorld, target: Path, *, mixture: str, names: tuple[str, str, str]
) -> Path:
    """An adapter as it was made where experts were modules: `mixture`.experts.N.`names`."""
    g = torch.Generator().manual_seed(3)
    gate, up, down = names
    tensors: dict[str, torch.Tensor] = {}

    def add(path: str, width: int, out: int) -> None:
        key = f"base_model.model.{path.replace('.mlp.', f'.{mixture}.')}"
        tensors[f"{key}.lora_A.weight"] = 0.1 * torch.randn(RANK, width, generator=g)
        tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(out, RANK, generator=g)

    for item in world.base.installed.spec.linears:
        parent, _, name = item.path.rpartition(".")
        if item.role == "experts":
            parts = {"gate_up_proj": (gate, up), "down_proj": (down,)}[name]
            for expert in range(item.experts):
                for part, rows in zip(parts, item.parts, strict=True):
                    add(f"{parent}.{expert}.{part}", item.in_features, rows)
        elif name == "q_proj" or item.role == "router":
            add(item.path, item.in_features, item.out_features)
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    config = LoraConfig(
        r=RANK, lora_alpha=3 * RANK, target_modules=["gate", "q_proj", *names],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("family", "mixture", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        pytest.param(
            *("qwen3-moe", "mlp", ("gate_proj", "up_proj", "down_proj")), marks=pytest.mark.slow
        ),
    ],
)
def test_experts_that_were_modules_equal_peft(family, mixture, names, tmp_path: Path):
    base = base_of(family, tmp_path)
    world = TinyWorld(base, limits=LIMITS, arena=ARENA)
    given = {
        "old": write_older(world, tmp_path / "old", mixture=mixture, names=names),
        "r8": write_adapter(base, tmp_path / "r8", rank=8, seed=8, target_modules="all-linear"),
    }
    for name, path in given.items():
        world.load(name, path)
    blends = [{"old": 1.0}, {"r8": 1.0}, {}, {"old": 0.5, "r8": -0.5}]
    mixed = [replace(ask, blend=blends[i % 4]) for i, ask in enumerate(asks(512))]
    answers = world.run(mixed)
    check(Summed(base, torch.float32, given), mixed, answers, BOUND[torch.float32])
    other = Ask(mixed[0].prompt, {"old": 0.8}, mixed[0].params)
    oracle = Summed(base, torch.float32, {"old": given["old"]})
    assert difference(oracle, other, answers[0], 1.0) > 10 * BOUND[torch.float32]


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_experts_of_widths_that_panels_do_not_hold(dtype: torch.dtype, tmp_path: Path):
    kind, settings = MANY["mixtral"]
    base = write_many(kind, {**settings, "intermediate_size": 80}, tmp_path / "base")
    world = TinyWorld(base, dtype=dtype, limits=LIMITS, arena=ARENA)
    kinds = {type(s.weight) for s in world.base.installed.stacks.values() if s.spec.experts > 1}
    assert kinds == {PanelStack, StackWeight}
    given = written("mixtral", tmp_path, world, base)
    for name, path in given.items():
        world.load(name, path)
    mixed = asks(512)
    answers = world.run(mixed)
    if dtype == torch.float32:
        check(Summed(base, dtype, given), mixed, answers, BOUND[dtype])
    for ask, answer in zip(mixed, answers, strict=True):
        assert world.run([ask])[0].logprobs == answer.logprobs
    other = replace(mixed[1], blend={"r8": 0.9})
    assert world.run([other])[0].logprobs != answers[1].logprobs


@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3-moe", torch.bfloat16),
        pytest.param("mixtral", torch.float32, marks=pytest.mark.slow),
        pytest.param("gpt-oss", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_recorded_steps_add_the_deltas_of_the_step_that_runs(
    family, dtype, tmp_path: Path, monkeypatch
):
    world, _ = opened(family, tmp_path, dtype=dtype)
    plain = TinyWorld(tmp_path / "base", dtype=dtype, limits=LIMITS, arena=ARENA)
    plain.runner._replays = None
    for name in ("r8", "r16"):
        plain.load(name, tmp_path / name)
    blends = [{"r8": 1.0}, {}, {"r16": 1.0}, {"r8": 0.7, "r16": -0.4}]

    def questions(turn: int) -> list[Ask]:
        lengths = (20, 7, 33, 12)
        return [
            Ask([5 + turn + i * k % 90 for k in range(length)], blends[(i + turn) % 4], greedy(6))
            for i, length in enumerate(lengths)
        ]

    def answered(under: TinyWorld, turn: int) -> list[object]:
        answers = under.run(questions(turn))
        assert not any(answer.error for answer in answers)
        return [(answer.tokens, answer.logprobs) for answer in answers]

    for turn in range(6):  # recorded, proven, run
        assert answered(world, turn) == answered(plain, turn)
    replays = world.runner._replays
    assert 4 in replays.decode._trusted
    if dtype == torch.bfloat16:
        assert replays.prefill._enabled
    right = answered(plain, 6)
    assert answered(world, 6) == right
    monkeypatch.setattr(NativeStack, "__call__", lambda self, y, x, routing, step: y)
    assert answered(world, 6) != right, "what runs inside a record sees the step"
