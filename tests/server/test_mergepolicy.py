"""`--merge auto` in a simulated clock: patience, hysteresis, backing off."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fader_adapters.errors import AdapterNotFound
from fader_adapters.spec import Digest
from fader_server.api.merge_ports import LaneInfo, MergeJob, MergeOrder, MergeStatus
from fader_server.api.traffic import Traffic, blend_key
from fader_server.automerge import AutoMerge
from fader_server.config import load
from fader_server.errors import MergeNoMemory
from fader_server.mergepolicy import BASE_KEY, Policy


@dataclass(frozen=True)
class Term:
    name: str
    version: Digest
    weight: float = 1.0


A = (Term("a", Digest("a" * 64)),)
B = (Term("b", Digest("b" * 64)), Term("a", Digest("a" * 64), 0.5))
KA, KB = blend_key(A), blend_key(B)


def policy() -> Policy:
    return Policy(share=0.6, seconds=10.0)


def feed(policy: Policy, merged, seconds: range, **tokens: int):
    """One look a second; the first decision and when it was made."""
    by_key = {"a": KA, "b": KB, "base": BASE_KEY}
    counts = {by_key[name]: count for name, count in tokens.items()}
    for now in seconds:
        decision = policy.observe(float(now), counts, merged)
        if decision is not None:
            return now, decision
    return None


def test_the_shortest_window_there_may_be_decides():
    seconds = load({"merge_seconds": "1"}, {}).merge_seconds
    policy = Policy(share=0.5, seconds=seconds)
    assert policy.observe(0.0, {KA: 100}, None) is None
    decision = policy.observe(1.0, {KA: 100}, None)
    assert decision is not None
    assert decision.action == "merge"


def test_a_blend_is_merged_after_a_whole_window_above_the_share_and_not_before():
    now, decision = feed(policy(), None, range(100), a=90, base=10)
    assert (now, decision.action, decision.blend) == (10, "merge", KA)
    assert decision.share == pytest.approx(0.9)


@pytest.mark.parametrize(
    "tokens", [{"a": 50, "b": 50}, {"base": 100}, {"a": 6}, {}, {"a": 60, "b": 40}]
)
def test_without_one_blend_above_the_share_nothing_is_merged(tokens):
    assert feed(policy(), None, range(100), **tokens) is None


def test_a_short_burst_is_no_reason():
    auto = policy()
    assert feed(auto, None, range(20), a=10, b=10) is None
    assert feed(auto, None, range(20, 22), a=20) is None
    assert feed(auto, None, range(22, 60), a=10, b=10) is None
    now, _ = feed(auto, None, range(60, 90), a=100, b=10)
    assert now < 80, "the same for long is one"


def test_between_the_two_marks_a_lane_neither_comes_nor_goes():
    tokens = {"a": 40, "b": 60}
    assert feed(policy(), KA, range(100), **tokens) is None
    assert feed(policy(), None, range(100), **tokens) is None


def test_a_lane_goes_below_half_the_share_after_a_window():
    now, decision = feed(policy(), KA, range(100), a=20, base=80)
    assert (now, decision.action, decision.blend) == (10, "drop", KA)


def test_a_lane_whose_traffic_moved_to_another_blend_is_replaced_at_once():
    _, decision = feed(policy(), KA, range(100), a=10, b=90)
    assert (decision.action, decision.blend) == ("merge", KB)


def test_silence_drops_nothing():
    assert feed(policy(), KA, range(1000)) is None


def test_two_decisions_lie_a_window_apart():
    auto = policy()
    first, _ = feed(auto, None, range(100), a=90)
    second, decision = feed(auto, KA, range(first + 1, 200), base=90)
    assert decision.action == "drop"
    assert second - first >= 10


def test_a_blend_that_could_not_be_merged_is_left_alone_for_a_while():
    auto = policy()
    now, decision = feed(auto, None, range(100), a=90)
    auto.shun(decision.blend, float(now))
    assert feed(auto, None, range(now + 1, now + 100), a=90) is None
    again, _ = feed(auto, None, range(now + 100, now + 130), a=90)
    assert again >= now + 100


@dataclass
class FakeLease:
    blend: Any = None
    released: int = 0

    def release(self) -> None:
        self.released += 1


@dataclass
class FakeAdapters:
    asked: list[Any] = field(default_factory=list)
    missing: bool = False

    def acquire(self, terms):
        self.asked.append([(str(t.ref), t.weight) for t in terms])
        if self.missing:
            raise AdapterNotFound("no adapter of this name")
        return FakeLease()


@dataclass
class FakeMerging:
    now: MergeStatus = field(default_factory=MergeStatus)
    full: bool = False
    dropped: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def status(self) -> MergeStatus:
        return self.now

    async def start(self, order, lease) -> MergeStatus:
        if self.full:
            raise MergeNoMemory("the lane needs 10 bytes, 1 are free")
        self.now = replace(self.now, job=MergeJob((), Digest(""), order.form, "merging", 0.0, 1))
        return self.now

    async def drop(self) -> MergeStatus:
        self.dropped += 1
        self.now = MergeStatus()
        return self.now

    def finish(self, terms) -> None:
        lane = LaneInfo(terms, Digest(""), Digest(""), "nf4", 1, 1.0, 0, {})
        self.now = MergeStatus(lane=lane)

    def fail(self) -> None:
        assert self.now.job is not None
        self.now = MergeStatus(job=replace(self.now.job, stage="refused", reason="too lossy"))


class World:
    def __init__(self) -> None:
        self.now = 0.0
        self.merging, self.adapters = FakeMerging(), FakeAdapters()
        self.decisions: Counter[str] = Counter()
        self.auto = AutoMerge(
            self.merging,
            self.adapters,
            self.merging.traffic,
            policy(),
            order=MergeOrder("bf16"),
            decided=lambda action: self.decisions.update([action]),
            clock=lambda: self.now,
        )

    async def pass_by(self, seconds: int, **tokens: int) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for name, count in tokens.items():
                terms = {"a": A, "b": B, "base": ()}[name]
                for _ in range(count):
                    self.merging.traffic.add(blend_key(terms), terms)
            await self.auto.look()


async def test_traffic_brings_a_lane_and_takes_it_away_again(caplog):
    world = World()
    with caplog.at_level(logging.INFO):
        await world.pass_by(15, b=30, base=5)
        assert world.adapters.asked == [
            [(f"b@{'b' * 64}", 1.0), (f"a@{'a' * 64}", 0.5)],
        ]
        world.merging.finish(B)
        await world.pass_by(30, b=30, base=5)
        assert world.decisions == {"merge": 1}
        await world.pass_by(30, base=30)
    assert world.decisions == {"merge": 1, "drop": 1}
    told = [r.fields for r in caplog.records if r.message == "auto merge"]
    assert [fields["decision"] for fields in told] == ["merge", "drop"]
    assert told[0]["share"] == pytest.approx(30 / 35, abs=0.001)


async def test_nothing_is_decided_while_a_merge_is_under_way():
    world = World()
    await world.pass_by(15, a=30)
    await world.pass_by(60, b=30)
    assert len(world.adapters.asked) == 1
    world.merging.finish(A)
    await world.pass_by(15, b=30)
    assert len(world.adapters.asked) == 2


@pytest.mark.parametrize("fault", ["full", "missing", "lossy"])
async def test_what_cannot_be_merged_is_told_and_not_tried_again_at_once(fault, caplog):
    world = World()
    world.merging.full, world.adapters.missing = fault == "full", fault == "missing"
    with caplog.at_level(logging.WARNING):
        await world.pass_by(12, a=30)
        if fault == "lossy":
            world.merging.fail()
        await world.pass_by(50, a=30)
    assert len(world.adapters.asked) == 1
    warned = [r.fields for r in caplog.records if r.message == "auto merge"]
    assert len(warned) == (fault != "lossy")
    world.merging.full = world.adapters.missing = False
    await world.pass_by(80, a=30)
    assert len(world.adapters.asked) == 2


def test_traffic_knows_equal_blends_however_they_are_spelled():
    traffic = Traffic()
    for terms in (B, tuple(reversed(B)), A, ()):
        traffic.add(blend_key(terms), terms)
    tokens, terms = traffic.take()
    assert tokens == {KB: 2, KA: 1, BASE_KEY: 1}
    assert terms[KB] == B
    assert traffic.take() == ({}, {})
