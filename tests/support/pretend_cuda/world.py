"""A TinyWorld on the pretended device: what a GPU's server runs, on the test's own thread."""

import time
from pathlib import Path

import torch

from fader_server.core import Plan, TokenEvent
from fader_server.engine.limits import Limits
from fader_server.engine.stats import Unobserved
from fader_server.engine.stepper import Stepper
from fader_server.model.kernels import choose_attention, choose_distributions
from fader_server.model.launching import LaunchedStep, LaunchingRunner
from fader_server.model.runner import ModelRunner
from fader_server.model.sampler import Sampler
from tests.support.world import Answer, TinyWorld, _note

CUDA = torch.device("cuda", 0)
LIMITS = Limits(max_rows=4, max_step_tokens=48, chunk_size=16, max_model_len=64)


class PretendWorld(TinyWorld):
    """Graphs are captured at its birth; adapters go through pinned memory and a side stream."""

    def __init__(
        self, source: Path, *, limits: Limits = LIMITS, blocks: int = 40, arena: int = 1 << 18
    ) -> None:
        self.led = 0
        """Steps that began before the tokens of the step in front were known."""
        super().__init__(source, limits=limits, blocks=blocks, device=CUDA, arena=arena)
        self._answers: dict[str, Answer] = {}
        self.stepper = Stepper(
            self.scheduler,
            self.runner,
            self.pool.upload,
            deliver=self._deliver,
            clock=time.monotonic,
            observer=Unobserved(),
            copies=self.pool,
        )

    def step(self, answers: dict[str, Answer]) -> bool:
        self._answers = answers
        return self.stepper.turn()

    def _runner(self, limits: Limits) -> ModelRunner:
        runner = LaunchingRunner(
            self.base,
            cache=self.cache,
            tables=self.tables,
            attention=choose_attention(
                self.base,
                block_size=16,
                max_rows=limits.max_rows,
                max_context=limits.max_model_len,
                max_tokens=limits.max_step_tokens,
            ),
            sampler=Sampler(choose_distributions(self.base)),
        )
        launch, go_on = runner.launch, runner.go_on

        def noted(plan: Plan) -> LaunchedStep:
            self.plans.append(plan)
            return launch(plan)

        def went_on(plan: Plan, tokens: torch.Tensor) -> LaunchedStep:
            self.plans.append(plan)
            self.led += 1
            return go_on(plan, tokens)

        runner.launch, runner.go_on = noted, went_on
        return runner

    def _deliver(self, event: TokenEvent) -> None:
        _note(self._answers[event.request_id], event)
