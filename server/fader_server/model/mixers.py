"""Layers that keep states of their own beside attention, in models whose rows otherwise share a
forward: recurrences and convolutions run row by row, through the model's own code and cache.

Keys and values of the attention layers lie in the engine's cache. Knows modules by what they hold
and take; knows no family.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from fader_adapters.layers import SiteLinear
from fader_server.core import Plan
from fader_server.errors import EngineFault
from fader_server.model.alone import cache_name
from fader_server.model.batch import Batch
from fader_server.model.meeting import Meeting
from fader_server.model.solo import PrepareStep, States
from fader_server.model.states import StateShape, held, new_cache

Row = tuple[int, Cache]
"""Tokens of a row and its cache."""


class Mixers:
    """Of one model. One thread at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config
        self._rows: Sequence[Row] | None = None
        self._threads = 1
        self._mixers = [_Mixer(module, name, self) for module, name in found(model)]
        self._states = States(self._new_cache)
        self.state = StateShape(0, 0)
        """What a sequence takes, after `rows_of`."""
        self.linears = frozenset(
            module
            for mixer in self._mixers
            for module in mixer.module.modules()
            if isinstance(module, SiteLinear)
        )

    def __len__(self) -> int:
        return len(self._mixers)

    @property
    def modules(self) -> list[nn.Module]:
        """The layers."""
        return [mixer.module for mixer in self._mixers]

    @property
    def threads(self) -> int:
        """Of everything that rows share."""
        return self._threads

    @property
    def rows(self) -> Sequence[Row] | None:
        """Of the forward that runs now; None: one that is not of the engine."""
        return self._rows

    def end(self) -> None:
        """Leave the model as it was."""
        for mixer in self._mixers:
            mixer.end()

    def run(
        self,
        plan: Plan,
        batch: Batch,
        *,
        prepare: PrepareStep,
        packed: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        self._states.drop_ended()
        own = [self._states.at(row.sequence, row.start) for row in plan.rows]
        for one in own:
            one.computed = None
        rows = [(row.count, one.cache) for row, one in zip(plan.rows, own, strict=True)]
        with self._sharing(rows):
            logits = packed()
        for row, one in zip(plan.rows, own, strict=True):
            one.computed = row.start + row.count
        return logits

    @contextmanager
    def rows_of(self, counts: Sequence[int]) -> Iterator[None]:
        """New sequences of so many tokens share the next forward."""
        rows = [(count, self._new_cache()) for count in counts]
        with self._sharing(rows):
            yield
        self.state = StateShape(0, 2 * sum(held(rows[0][1]).values()))

    def linear(self, there: list[int], counts: list[int], *, head: bool) -> None:
        assert self._rows is not None
        if counts != [count for count, _ in self._rows]:
            raise EngineFault("a linear beside attention was not given all of a step's tokens")
        torch.set_num_threads(self._threads)

    def forward(self, index: int) -> None:
        """One token is too little work to share, and its bits must not depend on the others."""
        assert self._rows is not None
        torch.set_num_threads(1 if self._rows[index][0] == 1 else self._threads)

    def _new_cache(self) -> Cache:
        return new_cache(self._config)

    @contextmanager
    def _sharing(self, rows: Sequence[Row]) -> Iterator[None]:
        self._rows, self._threads = rows, torch.get_num_threads()
        try:
            yield
        finally:
            self._rows = None
            torch.set_num_threads(self._threads)


class _Mixer:
    """One of the layers; stands where its forward stood."""

    def __init__(self, module: nn.Module, cache: str, owner: Mixers) -> None:
        """`cache`: what it calls the cache it is given."""
        self.module = module
        self._compute: Callable[..., torch.Tensor] = module.forward
        self._cache = cache
        self._owner = owner
        self._meeting = Meeting(module)

        def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return self._forward(hidden_states, *args, **kwargs)

        # a function, which a copy of the model may share, where a method would bring its owner
        setattr(module, "forward", forward)  # noqa: B010

    def end(self) -> None:
        self._meeting.end()
        setattr(self.module, "forward", self._compute)  # noqa: B010

    def _forward(
        self, hidden_states: torch.Tensor, *args: object, **kwargs: object
    ) -> torch.Tensor:
        rows = self._owner.rows
        if rows is None:
            return self._compute(hidden_states, *args, **kwargs)
        parts = torch.split(hidden_states, [count for count, _ in rows], dim=1)
        forwards = [
            partial(self._compute, part, **{self._cache: cache})
            for part, (_, cache) in zip(parts, rows, strict=True)
        ]
        outputs = self._meeting.run(forwards, self._owner)
        torch.set_num_threads(self._owner.threads)
        return torch.cat(outputs, dim=1)


def found(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules with a convolution over tokens that are given a cache, and what they call it."""
    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            name = cache_name(type(module))
            if name is not None:
                yield module, name
