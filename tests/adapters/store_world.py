"""A store over a CPU arena, for its tests: four adapters, room for some of them."""

import math

import torch

from fader_adapters.leases import AdapterRef, HostAdapter
from fader_adapters.store import Store
from fader_adapters.tiers import ArenaTier
from tests.adapters.peft_files import make_parsed

P = [make_parsed(seed=seed) for seed in range(4)]
NUMEL = P[0].spec.numel


class World:
    """A store over a CPU arena with room for three adapters; retired versions wait in a list."""

    def __init__(self, room: int = 3, **options):
        self.arena = torch.full((room * NUMEL,), math.nan)
        self.retired = []
        self.store = Store(ArenaTier(self.arena), on_retired=self.retired.append, **options)

    def load(self, name, parsed, **options) -> HostAdapter:
        with self.store.reserve(parsed) as reservation:
            reservation.fill()
            return self.store.publish(name, reservation, **options)

    def lease(self, *names, weight=1.0):
        return self.store.acquire([AdapterRef(name, None, weight) for name in names])

    def reclaim_all(self):
        while self.retired:
            self.store.reclaim(self.retired.pop(0))


def expected(parsed):
    flat = torch.empty(parsed.spec.numel)
    parsed.write(flat)
    return flat
