"""Steps in two halves: begun, then waited for once, with the caller's own work between them.

On a device that computes by itself the first half sets it to work; on a CPU the first half is what
needs Python's lock and the second what leaves it to others. Decides nothing.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

import torch

from fader_server.core import Plan, RowResult
from fader_server.model.decode import LeadingReplays, decodes
from fader_server.model.runner import ModelRunner, Part, Ready, in_order
from fader_server.model.sampler import Drawn


class LaunchingRunner(ModelRunner):
    """A ModelRunner on a device that computes by itself: one wait a step, whatever is in it."""

    def run(self, plan: Plan) -> list[RowResult]:
        return self.launch(plan).results()

    def launch(self, plan: Plan) -> "LaunchedStep":
        """Begin the step's first forwards as long as they are replays; the others cost the host
        their time, and begin when the results are asked for."""
        with torch.inference_mode():
            parts = list(self._parts(plan))
            begun = self.begin(takewhile(lambda part: part.replays is not None, parts))
        return LaunchedStep(self, parts, begun)

    def go_on(self, plan: Plan, tokens: torch.Tensor) -> "LaunchedStep":
        """Begin a decode step of one forward whose tokens [rows] int64 only the device knows."""
        with torch.inference_mode():
            (part,) = self._parts(plan)
            return LaunchedStep(self, [part], [self._prepared(part, tokens)()])

    def begin(self, parts: Iterable[Part]) -> list[Drawn]:
        """Queue forwards and their draws."""
        with torch.inference_mode():
            return [self._begin(part) for part in parts]


class LaunchedStep:
    """A step of which something may already be under way."""

    def __init__(self, runner: LaunchingRunner, parts: list[Part], begun: list[Drawn]) -> None:
        self._runner, self._parts, self._begun = runner, parts, begun

    @property
    def ahead(self) -> "Callable[[Plan], LaunchedStep] | None":
        """After a captured decode step of one forward, where no row's next token depends on what
        the host counts of its last ones, and rows leave no states behind: of two steps under way
        the second writes over what the first, if it fails, would have to go on from again."""
        if len(self._parts) != 1 or not self._begun or self._runner.keeps_states:
            return None
        (part,), (drawn,) = self._parts, self._begun
        if not decodes(part.plan) or not isinstance(part.replays, LeadingReplays):
            return None
        if any(row.sequence.request.params.penalises for row in part.plan.rows):
            return None
        return lambda plan: self._runner.go_on(plan, drawn.tokens)

    def results(self) -> list[RowResult]:
        """Queue what is left of it, then wait for all of it."""
        drawn = [*self._begun, *self._runner.begin(self._parts[len(self._begun) :])]
        pairs = zip(self._parts, drawn, strict=True)
        return in_order((part.places, one.wait()) for part, one in pairs)


class PreparingRunner(ModelRunner):
    """A ModelRunner on the processor that also serves HTTP: whom the caller wakes between the two
    halves finds Python's lock free while the kernels run."""

    def launch(self, plan: Plan) -> "PreparedStep":
        """Put the step's forwards together."""
        with torch.inference_mode():
            return PreparedStep([(part.places, self._prepared(part)) for part in self._parts(plan)])


class PreparedStep:
    """A step of which nothing has been computed yet."""

    ahead = None

    def __init__(self, parts: list[tuple[Sequence[int], Ready]]) -> None:
        self._parts = parts

    def results(self) -> list[RowResult]:
        """Compute it."""
        with torch.inference_mode():
            return in_order((places, compute().wait()) for places, compute in self._parts)
