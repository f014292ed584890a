"""Bases whose sequences keep states of their own, with two adapters, and what their answers are."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fader_adapters.kernels.backend import BackendName
from fader_server.core import Plan
from fader_server.engine.limits import Limits
from fader_server.model.probe import ProbeModel
from fader_server.model.views import BaseView
from tests.server.parity.test_families import BOUND, difference
from tests.server.parity.test_many_families import adapters, asks
from tests.support.lanes import merge, publish
from tests.support.many_families import write_many
from tests.support.oracle import Oracle
from tests.support.solo_families import BY_KEY, SOLO
from tests.support.world import Answer, Ask, TinyWorld, greedy

LIMITS = Limits(max_rows=8, max_step_tokens=40, chunk_size=32, max_model_len=512)
"""Small, so that prompts come in chunks and wait for each other."""


@dataclass
class Setting:
    """A base with states of its own and two adapters, on one backend."""

    base: Path
    adapters: dict[str, Path]
    backend: BackendName

    @classmethod
    def of(cls, family: str, folder: Path, backend: BackendName = "auto") -> "Setting":
        base = write_many(*(SOLO | BY_KEY)[family], folder / "base")
        return cls(base, adapters(base, folder, TinyWorld(base)), backend)

    def world(self, **options: Any) -> TinyWorld:
        world = TinyWorld(self.base, backend=self.backend, **options)
        for name, path in self.adapters.items():
            world.load(name, path)
        return world


def bits(answers: list[Answer]) -> list[tuple[list[int], list[float], list[float]]]:
    """All that may differ of answers without an error."""
    assert not any(answer.error for answer in answers)
    return [
        (a.tokens, [t.logprob for t in a.logprobs], [t.logprob for t in a.prompt_logprobs])
        for a in answers
    ]


def same_bits_alone(setting: Setting, dtype: torch.dtype) -> None:
    """Every question has the bits in company that it has alone."""
    questions = asks(512)
    together = setting.world(limits=LIMITS, dtype=dtype)
    alone = setting.world(limits=LIMITS, dtype=dtype)
    given = bits(together.run(questions))
    assert max(len(plan.rows) for plan in together.plans) > 2
    assert given == [bits(alone.run([ask]))[0] for ask in questions]


class Twice:
    """A runner that computes every step twice and gives the second results."""

    def __init__(self, world: TinyWorld) -> None:
        self._run = world.runner.run

    def __call__(self, plan: Plan) -> object:
        self._run(plan)
        return self._run(plan)


def sent_back(setting: Setting) -> TinyWorld:
    """Who is sent back goes on with the same bits; the world where some were."""
    questions = [replace(ask, params=greedy(40)) for ask in asks(512)[1::2]]
    roomy, narrow = setting.world(limits=LIMITS), setting.world(limits=LIMITS, blocks=32)
    expected = bits(roomy.run(questions))
    assert bits(narrow.run(questions)) == expected
    assert narrow.scheduler.preemptions
    assert not roomy.scheduler.preemptions
    return narrow


def a_forgotten_state_shows(setting: Setting, ask: Ask, forget: Callable[[], None]) -> None:
    """Parity is no accident of small states. forget: from now on no state is what it was."""
    oracle = Oracle(setting.base, torch.float32, setting.adapters)
    (right,) = setting.world().run([ask])
    assert difference(oracle, ask, right, 1.0) <= BOUND[torch.float32]
    world = setting.world()
    forget()
    (wrong,) = world.run([ask])
    assert difference(oracle, ask, wrong, 100.0) > 10 * BOUND[torch.float32]


def nothing_is_found(setting: Setting) -> None:
    """No request goes on with what another has computed."""
    world, ask = setting.world(), asks(512)[0]
    first, again = world.run([ask])[0], world.run([ask])[0]
    assert bits([first]) == bits([again])
    assert first.cached == again.cached == world.blocks.cached == 0


def a_half_computed_step_runs_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step fails once at the last linears, then runs: no bit is another."""
    questions = asks(512)[:4]
    expected = bits(setting.world(limits=LIMITS).run(questions))
    world = setting.world(limits=LIMITS)
    world.runner._replays = None
    run, last = world.runner.run, world.base.installed.sites[-1]

    def once_more(plan: Plan) -> object:
        with monkeypatch.context() as broken:
            broken.setattr(last, "output", lambda member, x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(plan)
        return run(plan)

    monkeypatch.setattr(world.runner, "run", once_more)
    assert bits(world.run(questions)) == expected


def a_lane_equals_peft(setting: Setting, *, rounds: int) -> None:
    """Each round of the same questions, in a merged lane."""
    world = setting.world()
    blend = {"r8": 0.7, "r16": -0.4}
    questions = [ask for ask in asks(512) if ask.blend == blend]
    oracle = Oracle(setting.base, torch.float32, setting.adapters)
    publish(world, merge(world, blend, form="bf16"))
    for _ in range(rounds):
        answers = world.run(questions)
        assert all(row.lane is not None for plan in world.plans for row in plan.rows)
        for ask, answer in zip(questions, answers, strict=True):
            assert difference(oracle, ask, answer, 1.0) <= BOUND[torch.float32]


def a_merge_is_measured(setting: Setting) -> None:
    """By a text through a copy of the model, chunk by chunk, while steps may run."""
    world, tokens = setting.world(), asks(512)[2].prompt
    probe = ProbeModel(world.base, lambda: None)
    logits = torch.cat([views[0] for views in probe.logits(tokens, [BaseView()])])
    expected = Oracle(setting.base, torch.float32, {}).logits(tokens, {})
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    ask = asks(512)[0]
    assert bits(world.run([ask])) == bits(setting.world().run([ask])), "the copy left it alone"
