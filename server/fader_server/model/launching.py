"""Steps in two halves: begun, then waited for once, with the caller's own work between them.

On a device that computes by itself the first half sets it to work; on a CPU the first half is what
needs Python's lock and the second what leaves it to others. Decides nothing.
"""

from collections.abc import Callable, Sequence

import torch

from fader_server.core import Plan, RowResult
from fader_server.model.runner import ModelRunner, Part, Ready, in_order
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
            begun = [self._begin(part) for part in parts[:1] if part.replays is not None]
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
        pairs = zip(self._parts, drawn, strict=True)
        return in_order((part.places, wait()) for part, wait in pairs)


class PreparingRunner(ModelRunner):
    """A ModelRunner on the processor that also serves HTTP: whom the caller wakes between the two
    halves finds Python's lock free while the kernels run."""

    def launch(self, plan: Plan) -> "PreparedStep":
        """Put the step's forwards together."""
        with torch.inference_mode():
            return PreparedStep([(part.places, self._prepared(part)) for part in self._parts(plan)])


class PreparedStep:
    """A step of which nothing has been computed yet."""

    def __init__(self, parts: list[tuple[Sequence[int], Ready]]) -> None:
        self._parts = parts

    def results(self) -> list[RowResult]:
        """Compute it."""
        with torch.inference_mode():
            return in_order((places, compute()()) for places, compute in self._parts)
