"""Bases whose sequences keep states of their own, with two adapters, and what their answers are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fader_adapters.kernels.backend import BackendName
from fader_server.core import Plan
from fader_server.engine.limits import Limits
from tests.server.parity.test_many_families import adapters, asks
from tests.support.many_families import write_many
from tests.support.solo_families import BY_KEY, SOLO
from tests.support.world import Answer, TinyWorld

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
