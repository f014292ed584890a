"""Forwards that run side by side and meet at every linear: it is computed once for all of them.

Each forward is a greenlet: it runs until it comes to one of Fader's linears, and goes on with its
own rows of the result. Knows modules and rows; knows no sequence, no cache and no attention.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from fader_adapters.layers import SiteEmbedding, SiteHead, SiteLinear


class Host(Protocol):
    """Who is told what goes on next."""

    def linear(self, there: list[int], counts: list[int], *, head: bool) -> None:
        """A linear, for these of the forwards, which have so many rows; the output head?"""
        ...

    def forward(self, index: int) -> None:
        """One of the forwards."""
        ...


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A forward that waits at a module."""

    place: int
    x: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Stop:
    """A module where forwards meet."""

    compute: Callable[[torch.Tensor], torch.Tensor]
    kind: type[nn.Module]
    site: object
    """Stops of one site are computed together, where they are given the same."""
    module: nn.Module

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[1, n] token ids or [1, n, in]."""
        last = () if issubclass(self.kind, SiteEmbedding) else (x.shape[-1],)
        return x.reshape(1, -1, *last)

    def shaped(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The result for `x` in its own shape; y [1, n, out]."""
        shape = x.shape if issubclass(self.kind, SiteEmbedding) else x.shape[:-1]
        return y.reshape(*shape, y.shape[-1])


class Meeting:
    """Of the forwards of one model. One thread at a time."""

    def __init__(self, model: nn.Module) -> None:
        self._hub: greenlet | None = None
        self._stops: list[_Stop] = []
        self._last: tuple[object, list[torch.Tensor], torch.Tensor] | None = None
        for module in model.modules():
            if isinstance(module, SiteLinear | SiteEmbedding):
                site = module.site if isinstance(module, SiteLinear) else module
                stop = _Stop(module.forward, type(module), site, module)
                arrive = partial(self._arrive, len(self._stops), module.forward)
                setattr(module, "forward", arrive)  # noqa: B010 - a method by assignment
                self._stops.append(stop)

    def end(self) -> None:
        """Leave the model as it was."""
        for stop in self._stops:
            setattr(stop.module, "forward", stop.compute)  # noqa: B010

    def run(self, forwards: Sequence[Callable[[], torch.Tensor]], host: Host) -> list[torch.Tensor]:
        """Run them to their ends, side by side; what they return, in order.

        What one of them raises ends all.
        """
        self._hub = getcurrent()
        members = [greenlet(forward) for forward in forwards]
        try:
            at: list[Any] = []
            for i, member in enumerate(members):
                host.forward(i)
                at.append(member.switch())
            while waiting := [i for i, member in enumerate(members) if not member.dead]:
                # who is behind goes first, so that those who took another way meet again
                place = min(at[i].place for i in waiting)
                there = [i for i in waiting if at[i].place == place]
                given = [at[i].x for i in there]
                results = self._compute(self._stops[place], there, given, host)
                for i, y in zip(there, results, strict=True):
                    host.forward(i)
                    at[i] = members[i].switch(y)
            return at
        finally:
            self._hub = self._last = None
            for member in members:
                if not member.dead:
                    member.throw()  # unwinds it

    def _arrive(
        self, place: int, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        here = getcurrent()
        if self._hub is None or here.parent is not self._hub:
            return compute(x)
        return self._hub.switch(_Arrival(place, x))

    def _compute(
        self, stop: _Stop, there: list[int], given: list[torch.Tensor], host: Host
    ) -> list[torch.Tensor]:
        parts = [stop.rows(x) for x in given]
        counts = [part.shape[1] for part in parts]
        some = [(i, n) for i, n in zip(there, counts, strict=True) if n]
        host.linear(
            [i for i, _ in some], [n for _, n in some], head=issubclass(stop.kind, SiteHead)
        )
        results = torch.split(stop.compute(self._joined(stop, given, parts)), counts, dim=1)
        return [stop.shaped(y, x) for y, x in zip(results, given, strict=True)]

    def _joined(
        self, stop: _Stop, given: list[torch.Tensor], parts: list[torch.Tensor]
    ) -> torch.Tensor:
        """One tensor of all; the very same one for others of a site with the same inputs."""
        if self._last is not None:
            site, before, joined = self._last
            if site is stop.site and len(before) == len(given) and all(map(_same, before, given)):
                return joined
        joined = torch.cat(parts, dim=1)
        self._last = stop.site, given, joined
        return joined


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b
