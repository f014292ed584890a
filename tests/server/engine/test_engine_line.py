"""The waiting line against its definition: the tenant that is behind is next."""

import random
from collections.abc import Mapping

import pytest

from fader_server.core import Sequence
from fader_server.engine.line import Line
from tests.server.engine.engine_world import request


class Naive:
    """What a line is, without its heaps: clocks, and everybody in order of arrival."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.clocks: dict[str, float] = {}
        self.returned: list[Sequence] = []
        self.new: list[Sequence] = []
        self.running: list[Sequence] = []
        self.admitted = 0.0

    def join(self, sequence: Sequence) -> None:
        if not self.new and not self.returned:
            self.clocks, self.admitted = {}, 0.0
        tenant, waiting = sequence.request.tenant, {s.request.tenant for s in self.new}
        if tenant not in waiting:
            floor = max(min((self.clocks[t] for t in waiting), default=0.0), self.admitted)
            self.clocks[tenant] = max(self.clocks.get(tenant, 0.0), floor)
        self.new.append(sequence)

    def admit(self, sequence: Sequence, tokens: int) -> None:
        self.admitted = max(self.admitted, self.clocks.get(sequence.request.tenant, 0.0))
        self.charge(sequence, tokens)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        tenant = sequence.request.tenant
        before = self.clocks.get(tenant, 0.0)
        self.clocks[tenant] = before + tokens / self.weights.get(tenant, 1.0)

    def end(self, sequence: Sequence) -> None:
        for place in (self.returned, self.new, self.running):
            if sequence in place:
                place.remove(sequence)

    def order(self) -> list[Sequence]:
        clocks, left, found = dict(self.clocks), list(self.new), list(self.returned)
        while left:
            chosen = min(left, key=lambda s: (clocks[s.request.tenant], self._place(s, left)))
            left.remove(chosen)
            found.append(chosen)
            tenant = chosen.request.tenant
            clocks[tenant] += len(chosen.tokens) / self.weights.get(tenant, 1.0)
        return found

    def _place(self, sequence: Sequence, left: list[Sequence]) -> int:
        """A tenant's first stands for it."""
        tenant = sequence.request.tenant
        first = next(s for s in left if s.request.tenant == tenant)
        return first.arrival if sequence is first else 1 << 30


WEIGHTS = {"b": 2.0, "c": 0.5}


def walk(seed: int, line: Line) -> None:
    rng, naive = random.Random(seed), Naive(WEIGHTS)
    for turn in range(120):
        waiting = [*naive.returned, *naive.new]
        match rng.randint(0, 5):
            case 0 | 1:
                tenant = rng.choice("abcd")
                own = request(str(turn), range(rng.randint(1, 9)), tenant=tenant)
                sequence = Sequence(own, list(own.prompt), arrival=turn)
                line.join(sequence)
                naive.join(sequence)
            case 2 if waiting:
                sequence = naive.order()[0]
                tokens = rng.randint(0, len(sequence.tokens))
                line.admit(sequence, tokens)
                if not sequence.settled:
                    naive.admit(sequence, tokens)
                sequence.settled, sequence.blocks = True, [1]
                (naive.returned if sequence in naive.returned else naive.new).remove(sequence)
                naive.running.append(sequence)
            case 3 if naive.running:
                sequence = rng.choice(naive.running)
                line.charge(sequence, 1)
                naive.charge(sequence, 1)
            case 4 if naive.running:
                sequence = rng.choice(naive.running)
                naive.running.remove(sequence)
                sequence.blocks = []
                line.put_back(sequence)
                naive.returned.insert(0, sequence)
            case 5 if waiting or naive.running:
                sequence = rng.choice([*waiting, *naive.running])
                line.end(sequence)
                naive.end(sequence)
        order = naive.order()
        assert list(line) == order
        assert len(line) == len(order)
        assert line.tenants == {s.request.tenant for s in order}
        closed = {"a"}
        assert list(line.in_turn(closed)) == [s for s in order if s.request.tenant != "a"]


def test_the_order_is_that_of_the_definition():
    for seed in range(60):
        walk(seed, Line(WEIGHTS))


def test_a_line_that_forgets_what_was_charged_is_noticed(monkeypatch):
    monkeypatch.setattr(Line, "charge", lambda self, sequence, tokens: None)
    with pytest.raises(AssertionError):
        walk(0, Line(WEIGHTS))


def test_whoever_leaves_meanwhile_is_not_given_and_nobody_is_left_out():
    line, given = Line({}), []
    made = [request(str(i), range(3), tenant="ab"[i % 2]) for i in range(8)]
    sequences = [Sequence(one, list(one.prompt), arrival=i) for i, one in enumerate(made)]
    for sequence in sequences:
        line.join(sequence)
    for sequence in line.in_turn(()):
        given.append(sequence)
        if sequence.arrival % 3 == 0:
            line.end(sequence)
    assert given == sequences
    assert list(line) == [s for s in sequences if s.arrival % 3]


def test_a_tenant_that_is_full_by_now_is_passed_by():
    line, closed = Line({}), set()
    for i, tenant in enumerate("abab"):
        one = request(str(i), range(3), tenant=tenant)
        line.join(Sequence(one, list(one.prompt), arrival=i))
    turns = line.in_turn(closed)
    assert next(turns).request.tenant == "a"
    closed.add("a")
    assert [s.request.tenant for s in turns] == ["b", "b"]
