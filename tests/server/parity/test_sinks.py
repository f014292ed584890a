"""Bases whose heads have a sink: every way a step runs takes it in, and would be noticed not to."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fader_adapters.kernels import native
from fader_adapters.kernels.backend import choose
from fader_server.engine.limits import Limits
from fader_server.errors import ModelUnsupported
from fader_server.model import attention
from fader_server.model.attention import AttentionParams, Probe, StepAttention, fader_attention
from fader_server.model.loader import load_base
from fader_server.model.rehearsal import rehearse
from fader_server.model.sizes import SIZES
from tests.server.parity.test_families import BOUND, check, difference
from tests.server.parity.test_many_families import adapters
from tests.support.lanes import merge, publish
from tests.support.many_families import MANY, write_many
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.replays import BLENDS, answered, opened
from tests.support.world import CPU, Ask, TinyWorld, greedy

RECORDED = "granite-swa"
"""No mixture, so its steps are recorded."""
LIMITS = Limits(max_rows=8, max_step_tokens=64, chunk_size=32, max_model_len=512)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_many(*MANY[RECORDED], tmp_path_factory.mktemp("sinks") / "base")


Run = Callable[..., torch.Tensor]


def without_sinks(run: Run) -> Run:
    def ignoring(
        own: StepAttention, module: nn.Module, *given: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        assert params.sinks is not None
        return run(own, module, *given, replace(params, sinks=None))

    return lambda own, module, q, k, v, params: ignoring(own, module, q, k, v, params=params)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sinks_that_are_ignored_are_noticed(
    source: Path, backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Ask(list(range(5, 60)), {}, greedy(4, prompt_logprobs=0))
    oracle = Oracle(source, torch.float32, {})
    world = TinyWorld(source, backend=backend, limits=LIMITS)
    check(oracle, [ask], world.run([ask]), BOUND[torch.float32])
    monkeypatch.setattr(StepAttention, "run", without_sinks(StepAttention.run))
    (answer,) = TinyWorld(source, backend=backend, limits=LIMITS).run([ask])
    assert difference(oracle, ask, answer, 10.0) > 100 * BOUND[torch.float32]


def test_a_rehearsal_that_ignores_them_fails(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32
    base = load_base(str(source), dtype=dtype, device=CPU, backend=choose(CPU, dtype))
    rehearse(base.model, "base", dtype=dtype)
    monkeypatch.setattr(Probe, "run", without_sinks(Probe.run))
    with pytest.raises(ModelUnsupported, match="does not give in a shared batch"):
        rehearse(base.model, "base", dtype=dtype)


def serve(world: TinyWorld) -> list:
    """Prompts until their steps are trusted, then some together; decode steps of one and of three
    rows, twice each."""
    answers = []
    for turn in range(len(SIZES) + 3):
        ask = Ask(list(range(60 + turn, 90 + 4 * turn)), BLENDS[turn % 2], greedy(4, logprobs=2))
        answers += answered(world, [ask])
    for turn in range(3):
        asks = [
            Ask(list(range(5 + turn, 30 + 20 * i)), blend, greedy(5, logprobs=2))
            for i, blend in enumerate(BLENDS[:3])
        ]
        answers += answered(world, asks)
    return answers


@pytest.mark.skipif(not native.available(), reason=native.reason() or "built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_give_the_bits_of_the_models_code(
    source: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in "ab"]
    written = source, [write_adapter(source, f, rank=8, seed=i) for i, f in enumerate(folders)]
    world = opened(written, dtype)
    replayed = serve(world)
    replays = world.runner._replays
    assert {1, 3} <= set(replays.decode._trusted)
    assert 6 in replays.prefill._trusted
    assert replayed == serve(opened(written, dtype, replays=False))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_merged_lane_has_the_sinks_of_its_base(source: Path, backend, tmp_path: Path) -> None:
    world = TinyWorld(source, backend=backend, limits=LIMITS)
    given = adapters(source, tmp_path, world)
    for name, path in given.items():
        world.load(name, path)
    oracle, blend = Oracle(source, torch.float32, given), {"r8": 0.7, "r16": -0.4}
    publish(world, merge(world, blend, form="bf16"))
    asks = [
        Ask(list(range(9 + n, 30 + 13 * n)), blend, greedy(6, prompt_logprobs=0)) for n in range(4)
    ]
    check(oracle, asks, world.run(asks), BOUND[torch.float32])
    assert all(row.lane is not None for plan in world.plans for row in plan.rows)


def test_parameters_are_equal_where_the_sinks_are_one_tensor() -> None:
    sinks = torch.zeros(4)
    params = AttentionParams(1.0, None, None, sinks)
    assert params == AttentionParams(1.0, None, None, sinks)
    assert params != AttentionParams(1.0, None, None, sinks.clone())
    assert params != AttentionParams(1.0, 4, None, sinks)
    assert params != (1.0, None, None, sinks)
    assert hash(params) == hash(AttentionParams(1.0, None, None, sinks))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"s_aux": torch.zeros(2)}, r"sinks of shape \[2\]"),
        ({"s_aux": torch.zeros(4), "head_gate": torch.zeros(4)}, "attends with head_gate, unknown"),
    ],
)
def test_what_is_no_sink_of_each_head_is_refused(given: dict, reason: str) -> None:
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with pytest.raises(ModelUnsupported, match=reason):
        fader_attention(nn.Identity(), q, k, k, None, fader_step=attention.Probe((3,)), **given)
