"""Steps of a device that computes by itself: begun, then waited for once. Decides nothing."""

from collections.abc import Callable

import torch

from fader_server.core import Plan, RowResult
from fader_server.model.runner import ModelRunner, Part
from fader_server.model.sampler import Drawn


class LaunchingRunner(ModelRunner):
    """A ModelRunner on a device that computes by itself: one wait a step, whatever is in it."""

    def run(self, plan: Plan) -> list[RowResult]:
        return self.launch(plan).results()

    def launch(self, plan: Plan) -> "LaunchedStep":
        """Begin the step's first forward where it is a replay; the others cost the host their time,
        and begin when the results are asked for."""
        with torch.inference_mode():
            parts = list(self._parts(plan))
            begun = [self._begin(part) for part in parts[:1] if part.replayed]
        return LaunchedStep(self._begin, parts, begun)


class LaunchedStep:
    """A step of which something may already be under way."""

    def __init__(
        self, begin: Callable[[Part], Drawn], parts: list[Part], begun: list[Drawn]
    ) -> None:
        self._begin, self._parts, self._begun = begin, parts, begun

    def results(self) -> list[RowResult]:
        """Queue what is left of it, then wait for all of it."""
        with torch.inference_mode():
            drawn = [*self._begun, *map(self._begin, self._parts[len(self._begun) :])]
        results = [RowResult()] * sum(len(part.places) for part in self._parts)
        for part, wait in zip(self._parts, drawn, strict=True):
            for i, result in zip(part.places, wait(), strict=True):
                results[i] = result
        return results
