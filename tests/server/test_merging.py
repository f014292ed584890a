"""Merging in a running world: in the background, reversible, told honestly, refused by name."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable

import pytest

from fader_adapters.errors import AdapterNotFound, BlendInvalid
from fader_server import config
from fader_server import merging as merging_module
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.merge_ports import MergeOrder, MergeStatus
from fader_server.api.named_blends import Recipe
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.errors import ConfigInvalid, MergeBusy, MergeNoMemory, MergeNotFound
from fader_server.mergejob import timed
from fader_server.metrics import Metrics
from fader_server.pacing import Cancelled, Pace
from fader_server.recipes import RecipeBook
from fader_server.world import open_world
from tests.support.lanes import weights_hash

PIRATE = {"pirate": 1.0}
WARM = Recipe(
    "warm",
    (NamedTerm(AdapterRef("pirate"), 0.7), NamedTerm(AdapterRef("polite"), 0.5)),
    1700000000,
)
BLEND = {"pirate": 0.7, "polite": 0.5}


@contextlib.contextmanager
def opened(**flags: object):
    """A world as `fader serve` has it when it begins to serve."""
    flags = {"kv_cache": "16MiB"} | flags | {"warm_up": "0", "threads": "1"}
    with open_world(config.load(flags, {}), Metrics()) as world:
        if world.prepare is not None:
            book = RecipeBook(world.adapters, base=world.base.name, most=8, recipes=[WARM])
            asyncio.run(world.prepare(world.adapters, book))
        yield world


def lease(world, blend):
    terms = [NamedTerm(AdapterRef(name), weight) for name, weight in blend.items()]
    return world.adapters.acquire(terms)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for another thread's work."""
    by = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < by, "it did not come in time"
        threading.Event().wait(0.002)


def order(world, blend, **how) -> MergeStatus:
    return asyncio.run(world.merging.start(MergeOrder(**how), lease(world, blend)))


def merged(world, blend, **how) -> MergeStatus:
    order(world, blend, **how)
    until(lambda: not world.merging.status().busy)
    return world.merging.status()


def drop(world) -> MergeStatus:
    return asyncio.run(world.merging.drop())


class Stream:
    """One request, read on the engine's thread."""

    def __init__(self, world, blend, *, tokens: int = 12, prompt: str = "Hello", id: str = "r"):
        held = lease(world, blend)
        text = tuple(world.tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0)
        self.events: list[TokenEvent] = []
        self.done = threading.Event()
        request = Request(id, text, params, held.blend, held.adapters)
        self._held = held
        world.engine.submit(request, self._sink)

    def _sink(self, event: TokenEvent) -> None:
        self.events.append(event)
        if event.finish or event.error:
            self._held.release()
            self.done.set()

    def result(self):
        assert self.done.wait(60)
        assert self.events[-1].error is None
        return [(e.token, e.logprob.logprob) for e in self.events if e.logprob is not None]


def answer(world, blend, **how):
    return Stream(world, blend, **how).result()


def lane_of(world, blend) -> str:
    stream = Stream(world, blend, tokens=2)
    stream.result()
    (admitted,) = [event.admitted for event in stream.events if event.admitted is not None]
    return admitted.lane


@pytest.fixture(scope="module")
def shared():
    with opened() as world:
        yield world


@pytest.fixture
def world(shared):
    yield shared
    until(lambda: not shared.merging.status().busy)
    with contextlib.suppress(MergeNotFound):
        drop(shared)
    until(lambda: not shared.merging.status().leaving_bytes)


def test_a_lane_is_made_used_and_gone_without_a_trace(world):
    before, others = answer(world, PIRATE), answer(world, {"polite": 1.0})
    weights = weights_hash(world.merging._parts.base.installed)
    status = merged(world, PIRATE, form="bf16")
    assert status.lane is not None
    assert status.job is None
    assert status.lane.bytes > 0
    assert answer(world, {"polite": 1.0}) == others
    assert (lane_of(world, PIRATE), lane_of(world, {"polite": 1.0})) == ("merged", "delta")
    counted = world.engine.stats().merged
    during = answer(world, PIRATE)
    assert world.engine.stats().merged == counted + len(during)
    assert [token for token, _ in during] == [token for token, _ in before]
    assert during != before, "a lane rounds differently: the same bits mean that it was not used"
    after = drop(world)
    assert after.lane is None
    assert lane_of(world, PIRATE) == "delta"
    assert answer(world, PIRATE) == before
    assert answer(world, {"polite": 1.0}) == others
    assert weights_hash(world.merging._parts.base.installed) == weights


def test_the_report_tells_what_rounding_costs(world):
    keep = merged(world, BLEND).lane.report
    assert keep["rounding"] == "keep"
    assert keep["overall"]["linears"] == len(keep["linears"]) > 0
    assert keep["overall"]["relative_error"] > 0
    probe = keep["probe"]
    assert probe["tokens"] > 30
    assert 0 < probe["kl"] < probe["base_kl"]
    assert probe["base_top1"] < probe["top1"] <= 1
    plain = merged(world, BLEND, rounding="plain", force=True).lane.report
    assert plain["rounding"] == "plain"
    assert probe["kl"] < plain["probe"]["kl"], "the default is the better by KL"
    exact = merged(world, BLEND, form="bf16").lane.report
    assert exact["overall"]["relative_error"] < 0.1 * keep["overall"]["relative_error"]
    assert exact["probe"]["kl"] < 0.1 * probe["kl"]


def test_4_bits_that_lose_too_much_are_refused_unless_forced(world, caplog):
    with caplog.at_level(logging.WARNING):
        status = merged(world, {"german": 0.1}, rounding="plain")
    assert status.lane is None
    assert status.job is not None
    assert status.job.stage == "refused"
    assert "nats from the blend" in status.job.reason
    assert status.job.report is not None
    (told,) = [r.fields for r in caplog.records if r.message == "merge without a lane"]
    assert told["reason"] == status.job.reason
    forced = merged(world, {"german": 0.1}, rounding="plain", force=True)
    assert forced.lane is not None
    assert forced.job is None
    exact = merged(world, {"german": 0.1}, form="bf16")
    assert exact.lane is not None, "exact weights are never refused"


def test_a_second_order_is_refused_while_a_merge_is_under_way(world, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(Pace, "__call__", lambda self: _hold(self, held))
    order(world, PIRATE)
    with pytest.raises(MergeBusy, match="merging, 0% done"):
        order(world, BLEND)
    assert world.adapters.totals().leases == 1, "the refused order holds nothing"
    held.set()
    until(lambda: not world.merging.status().busy)
    assert world.merging.status().lane.digest == lease_digest(world, PIRATE)
    assert world.adapters.totals().leases == 0


def _hold(pace: Pace, held: threading.Event) -> None:
    while not held.wait(0.001):
        if pace._cancelled.is_set():
            raise Cancelled


def lease_digest(world, blend):
    held = lease(world, blend)
    held.release()
    return held.blend.digest


def test_a_merge_under_way_can_be_ended_and_the_open_lane_stays(world, monkeypatch):
    merged(world, PIRATE)
    monkeypatch.setattr(Pace, "__call__", lambda self: _hold(self, threading.Event()))
    assert order(world, BLEND).busy
    status = drop(world)
    assert not status.busy
    assert status.job is None
    assert status.lane.digest == lease_digest(world, PIRATE)
    assert world.adapters.totals().leases == 0
    assert drop(world).lane is None
    with pytest.raises(MergeNotFound):
        drop(world)


@contextlib.contextmanager
def dropped_in_the_background(world):
    """A drop that waits until the block has ended; gives what it answers."""
    told: list[MergeStatus] = []
    thread = threading.Thread(target=lambda: told.append(drop(world)))
    job = world.merging._job
    thread.start()
    until(lambda: job.pace.cancelled)
    yield told
    thread.join(30)


def test_a_merge_whose_lane_is_about_to_open_can_still_be_ended(world, monkeypatch):
    """The engine is busy, and the command that opens the lane waits for it."""
    merged(world, PIRATE)
    made, go = threading.Event(), threading.Event()

    def making(job):
        done = timed(job)
        made.set()
        return done

    monkeypatch.setattr(merging_module, "timed", making)
    world.engine.call(go.wait)
    order(world, BLEND)
    assert made.wait(30)
    with dropped_in_the_background(world) as told:
        go.set()
    assert told[0].lane.digest == lease_digest(world, PIRATE), "the lane before it stays"
    assert told[0].job is None
    assert lane_of(world, BLEND) == "delta"


def test_a_merge_that_is_ended_while_its_lane_opens_leaves_none(world, monkeypatch):
    opening, go = threading.Event(), threading.Event()
    real = world.merging._open

    def slowly(*arguments):
        real(*arguments)
        opening.set()
        go.wait(30)

    monkeypatch.setattr(world.merging, "_open", slowly)
    order(world, BLEND)
    assert opening.wait(30)
    with dropped_in_the_background(world) as told:
        go.set()
    assert told[0].lane is None
    assert not told[0].busy
    assert lane_of(world, BLEND) == "delta"


def test_the_same_order_twice_merges_once(world):
    first = merged(world, BLEND)
    assert not order(world, BLEND).busy
    assert world.merging.status().lane is first.lane
    assert merged(world, BLEND, form="bf16").lane.key != first.lane.key


@pytest.mark.parametrize(("blend", "kind"), [({}, BlendInvalid), ({"nobody": 1}, AdapterNotFound)])
def test_what_cannot_be_merged_is_refused_by_name(world, blend, kind):
    with pytest.raises(kind):
        order(world, blend)
    assert world.merging.status() == MergeStatus()
    assert world.adapters.totals().leases == 0


def test_too_little_memory_is_told_before_anything_is_changed(world, monkeypatch):
    parts = world.merging._parts
    small = type(parts)(**{**vars(parts), "free": lambda: 100_000})
    monkeypatch.setattr(world.merging, "_parts", small)
    with pytest.raises(MergeNoMemory, match="100000 are free"):
        order(world, BLEND)
    assert world.merging.status() == MergeStatus()
    assert world.adapters.totals().leases == 0
    monkeypatch.setattr(world.merging, "_parts", parts)
    assert merged(world, BLEND).lane is not None


def test_streams_go_on_bit_for_bit_while_lanes_come_and_go(world):
    alone = {name: answer(world, {name: 1.0}, tokens=200) for name in ("json", "polite")}
    pirate = answer(world, PIRATE, tokens=200)
    streams = [
        (name, Stream(world, {name: 1.0}, tokens=200, id=f"{name}{i}"))
        for i in range(3)
        for name in alone
    ]
    inside = Stream(world, PIRATE, tokens=200, id="inside")
    until(lambda: len(inside.events) > 2)
    merged(world, PIRATE)
    after = Stream(world, PIRATE, tokens=200, id="after")
    until(lambda: len(after.events) > 2)
    drop(world)
    for name, stream in streams:
        assert stream.result() == alone[name]
    assert inside.result() == pirate, "it was admitted before there was a lane"
    assert after.result() != pirate
    until(lambda: not world.merging.status().leaving_bytes)


def test_a_dropped_lane_serves_its_requests_to_their_end(world):
    merged(world, PIRATE)
    expected = answer(world, PIRATE, tokens=150)
    stream = Stream(world, PIRATE, tokens=150)
    until(lambda: len(stream.events) > 2)
    status = drop(world)
    assert status.lane is None
    if not stream.done.is_set():
        assert status.requests == 1
        assert status.leaving_bytes > 0
    assert stream.result() == expected
    until(lambda: not world.merging.status().leaving_bytes)
    assert not world.merging._parts.runner._lanes


def test_a_failure_of_the_merge_is_told_and_costs_nothing(world, monkeypatch, caplog):
    def fail(self) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Pace, "__call__", fail)
    with caplog.at_level(logging.ERROR):
        status = merged(world, PIRATE)
    assert status.job.stage == "failed"
    assert status.job.reason == "a fault inside the server: RuntimeError"
    assert status.lane is None
    assert world.adapters.totals().leases == 0
    monkeypatch.undo()
    assert merged(world, PIRATE).lane is not None


def test_a_panic_of_native_code_ends_its_merge(world, monkeypatch):
    class Panic(BaseException):
        """As pyo3's is."""

    def panic(self) -> None:
        raise Panic("broken")

    monkeypatch.setattr(Pace, "__call__", panic)
    status = merged(world, PIRATE)
    assert status.job.stage == "failed"
    assert status.job.reason == "a fault inside the server: Panic"
    assert world.adapters.totals().leases == 0


def test_the_lane_that_the_settings_name_is_open_from_the_first_request():
    with opened(merge="pirate=0.7,polite=0.5", merge_dtype="bf16") as world:
        status = world.merging.status()
        assert status.lane is not None
        assert status.lane.form == "bf16"
        assert [(t.name, t.weight) for t in status.lane.terms] == [("pirate", 0.7), ("polite", 0.5)]
        answer(world, BLEND)
        assert world.engine.stats().merged > 0
        assert world.adapters.totals().leases == 0


def test_the_settings_may_name_a_recipe():
    with opened(merge="warm") as world:
        lane = world.merging.status().lane
        assert [(t.name, t.weight) for t in lane.terms] == [("pirate", 0.7), ("polite", 0.5)]


@pytest.mark.parametrize("blend", ["nobody=1", "pirate=99", "pirate,pirate", "warm=0.5"])
def test_a_setting_that_cannot_be_merged_stops_the_start(blend):
    with pytest.raises(ConfigInvalid, match="--merge"), opened(merge=blend):
        pass


def test_a_probe_file_is_used_and_checked(tmp_path):
    probe = tmp_path / "probe.txt"
    probe.write_text("What is the capital of France? What colour is the sky?")
    with opened(merge="pirate", probe=str(probe)) as world:
        short = world.merging.status().lane.report["probe"]["tokens"]
    with opened(merge="pirate") as world:
        assert world.merging.status().lane.report["probe"]["tokens"] > short > 2
    for text in (None, ""):
        if text is None:
            probe.unlink()
        else:
            probe.write_text(text)
        with pytest.raises(ConfigInvalid, match="--probe"), opened(probe=str(probe)):
            pass
