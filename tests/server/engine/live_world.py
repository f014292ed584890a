"""The whole of adapters in one world: real registry, store, tiers, pool, leases, scheduler and
engine, without its thread. The model, the disk and HTTP are played, one seed decides all chance.

An adapter's weights are its content's number in every element, so the device can tell whose bytes
a slot really points at, and `expected` knows the tokens of the version a request was admitted with.
"""

import math
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch

from fader_adapters.errors import AdapterError, AdapterInvalid, SourceNotFound, SourceUnavailable
from fader_adapters.inspection import Inspector
from fader_adapters.kernels.tables import Tables
from fader_adapters.parse import Factors, ParsedAdapter
from fader_adapters.pauses import Pause, never
from fader_adapters.pool import Pool
from fader_adapters.report import AdapterReport, ModuleReport
from fader_adapters.source import RawAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, RankScale, Upload, lay_out
from fader_adapters.tiers import ArenaTier
from fader_server.api.adapter_ports import LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.core import Request, SamplingParams, TokenEvent
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.loop import Engine
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.shares import Share
from fader_server.errors import FaderError
from fader_server.registry import LockedLease, Registry
from tests.server.engine.engine_device import LOOPS, Ahead, Device
from tests.server.engine.engine_world import Seen, check_answer, check_blocks, version

WIDTH = 32
UNIT = 2 * WIDTH
"""Elements of an adapter of rank 1."""
BASE = BaseSpec((LinearSpec("l", WIDTH, WIDTH, 0),), Digest("0" * 64), "test")
RANKS = (1, 1, 2, 2, 3, 9)
"""Of the contents 1, 2, …; the last one never fits."""
INVOCATIONS = {2: (4,), 4: (7, 8)}
"""Tokens that activate these contents."""
VERSIONS = {version(f"content {k}"): k for k in range(1, len(RANKS) + 1)}


@cache
def parsed(content: int) -> ParsedAdapter:
    """The adapter whose every weight is `content`."""
    rank = RANKS[content - 1]
    parts, invocation = [RankScale(0, rank, 1.0)], INVOCATIONS.get(content, ())
    spec = lay_out(BASE, version(f"content {content}"), parts, invocation)
    matrix = torch.full((rank, WIDTH), float(content))
    module = ModuleReport("l", rank, 1.0, 1.0, 1.0)
    report = AdapterReport((module,), 1, "LORA", False, ("F32",), None)
    return ParsedAdapter(spec, report, torch.float32, (Factors(matrix, matrix),))


class Memory:
    """A host tier that runs out at the k-th allocation from now."""

    def __init__(self, inner: ArenaTier) -> None:
        self._inner = inner
        self.fail_in = 0

    @property
    def used_bytes(self) -> int:
        return self._inner.used_bytes

    @property
    def total_bytes(self) -> int:
        return self._inner.total_bytes

    def allocate(self, numel: int) -> torch.Tensor | None:
        self.fail_in -= 1
        if self.fail_in == 0:
            raise MemoryError("injected")
        flat = self._inner.allocate(numel)
        if flat is not None:
            flat.fill_(math.nan)
        return flat

    def free(self, flat: torch.Tensor) -> None:
        flat.fill_(math.nan)
        self._inner.free(flat)


class Disk:
    """Sources whose folder k holds content k; some are missing, broken or away."""

    def __init__(self) -> None:
        self.faults: dict[str, Exception] = {}

    def fetch(self, reference: str, revision: str | None = None) -> RawAdapter:
        if reference in self.faults:
            raise self.faults[reference]
        return RawAdapter(b"", b"", reference)


class Reader(Inspector):
    """Takes an adapter's origin for its content."""

    def read(self, raw: RawAdapter, pause: Pause = never) -> ParsedAdapter:
        return parsed(int(raw.origin))


class LiveDevice(Device):
    """The device over the real arena and tables."""

    def __init__(self, blocks: int, block_size: int, tables: Tables, pool: Pool) -> None:
        super().__init__(blocks, block_size)
        self._tables = tables
        self._pool = pool
        self._weights = tables.arena.numpy()
        self.meanwhile: Callable[[], None] = lambda: None
        """What other threads do while a step runs."""

    def upload(self, uploads: tuple[Upload, ...]) -> None:
        for one in uploads:
            if one.data.spec.version in self.bad_uploads:
                raise RuntimeError("injected")
            self._pool.upload((one,))

    def content(self, slot: int) -> int:
        """The version whose weights the slot points at; nobody's when they are not all of one."""
        rank = int(self._tables.rank[slot, 0])
        found = set()
        for offsets in (self._tables.a_offset, self._tables.b_offset):
            at = int(offsets[slot, 0])
            found.update(self._weights[at : at + rank * WIDTH].tolist())
        if len(found) != 1 or not (content := found.pop()) >= 1:
            return -1
        return int(version(f"content {int(content)}")[:12], 16)

    def run(self, plan):
        self.let_others()
        return super().run(plan)

    def let_others(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()


class LiveAhead(LiveDevice, Ahead):
    """The same, computing by itself."""

    def upload(self, uploads: tuple[Upload, ...]) -> None:
        self.compute(None)
        super().upload(uploads)

    def execute(self, plan):
        self.let_others()
        return super().execute(plan)


@dataclass
class Call:
    """One HTTP call: its lease, what it saw, and the events on their way to it."""

    lease: LockedLease
    seen: Seen
    events: deque[TokenEvent] = field(default_factory=deque)
    gone: bool = False


class LiveWorld:
    """Everything between HTTP and the model, with its promises checked after every turn."""

    def __init__(self, rng: random.Random, *, ahead: bool = False, lookup: int = 0) -> None:
        """`ahead`: the device computes by itself; `lookup`: rows up to which guesses fill a step,
        and then outputs say things again."""
        self.loops = LOOPS if lookup else 0
        self.rng = rng
        in_place = rng.random() < 0.3
        rows, chunk = rng.randint(1, 5), rng.choice([4, 8, 11])
        units = rng.randint(3, 7 if in_place else 4)
        arena = torch.full((units * UNIT,), math.nan)
        tables = Tables(arena, 1)
        self.pool = Pool(tables, in_place=in_place)
        inner = ArenaTier(arena)
        if not in_place:
            inner = ArenaTier(torch.empty(rng.randint(5, 12) * UNIT))
        self.memory = Memory(inner)
        self.tables = tables
        self.disk = Disk()
        count = rng.randint(9, 30)
        limits = Limits(
            max_rows=rows,
            chunk_size=chunk,
            max_step_tokens=rows + chunk + rng.randint(0, 12),
            max_model_len=32,
            max_overtakes=rng.randint(0, 3),
            lookup=lookup,
        )
        self.device = (LiveAhead if ahead else LiveDevice)(count, 4, tables, self.pool)
        self.scheduler = Scheduler(
            limits,
            blocks=BlockManager(count, block_size=4),
            pool=self.pool,
            shares={"half": Share(most=0.5), "heavy": Share(weight=3.0)},
        )
        self.engine = Engine(
            self.scheduler,
            self.device,
            self.device.upload,
            max_waiting=12,
            max_waiting_of={"half": 4},
            clock=lambda: 0.0,
        )
        self.registry = Registry(
            Reader(BASE, dtype=torch.float32),
            tier=self.memory,
            pool=self.pool,
            sources=self.disk,
            forget=self.engine.forget,
            max_terms=3,
            max_adapters=4,
            fetch_timeout=1.0,
        )
        self.names: dict[str, Digest] = {}
        """What every name means, by the answers that were given."""
        self.calls: dict[str, Call] = {}
        self.crashed = False
        self.faults = 0
        """Injected so far; without any no request may fail."""
        self.refused: Counter[str] = Counter()

    def load(self, name: str, content: int, **wishes: object) -> None:
        """PUT; a refusal leaves everything as it was."""
        try:
            loaded = self.registry.load_now(LoadOrder(name, str(content), **wishes))
        except (AdapterError, MemoryError) as error:
            self.refused[type(error).__name__] += 1
            return
        expect = wishes.get("if_version")
        before = self.names.get(name, "")
        assert expect is None or before.startswith(str(expect)), "compare and swap"
        assert expect or before == "" or wishes.get("replace", True), "a taken name was replaced"
        assert loaded.replaced == (before or None)
        assert VERSIONS[loaded.info.version] == content
        self.names[name] = loaded.info.version

    def unload(self, name: str) -> None:
        self.registry.unload(name)
        del self.names[name]

    def evict(self) -> None:
        gone = self.registry.evict(lambda name: True)
        if gone is not None:
            del self.names[gone]

    def ask(self, name: str, refs: list[tuple[str, float]], **params: object) -> None:
        """A call arrives: lease and submit."""
        terms = [NamedTerm(AdapterRef(ref), gamma) for ref, gamma in refs]
        try:
            lease = self.registry.acquire(terms)
        except AdapterError as error:
            self.refused[type(error).__name__] += 1
            assert len(refs) > 3 or not all(n in self.names for n, _ in refs)
            return
        gammas: dict[str, float] = {}
        for ref, gamma in refs:
            gammas[self.names[ref]] = gammas.get(self.names[ref], 0.0) + gamma
        assert {t.version: t.gamma for t in lease.blend.terms} == gammas
        params["seed"] = self.loops + self.rng.randint(0, 2)
        prompt = range(start := self.rng.randint(0, 1), start + self.rng.randint(1, 20))
        request = Request(
            name,
            tuple(prompt),
            SamplingParams(**params),  # type: ignore[arg-type]
            lease.blend,
            lease.adapters,
            self.rng.choice(["", "", "x"]),
            self.rng.choice(["", "half", "heavy", "other"]),
        )
        call = Call(lease, Seen(request))
        try:
            self.engine.submit(request, call.events.append)
        except (FaderError, AdapterError) as error:
            self.refused[type(error).__name__] += 1
            lease.release()
            return
        self.calls[name] = call

    def hang_up(self, name: str) -> None:
        """The client is gone: the lease ends at once, the engine hears of it later."""
        call = self.calls[name]
        if call.gone or call.seen.ends:
            return
        call.gone = call.seen.aborted = True
        self.engine.abort(name)
        call.lease.release()

    def read(self, name: str) -> None:
        """The event loop hands on what came for one call; its end ends the lease."""
        call = self.calls[name]
        while call.events:
            event = call.events.popleft()
            if call.gone:
                continue  # it was under way
            call.seen.take(event)
            if call.seen.ends:
                call.lease.release()

    def turn(self) -> bool:
        """One turn of the engine's loop; a device that fails on everything ends it."""
        if self.crashed:
            return False
        try:
            return self.engine._turn()
        except FaderError as error:
            self.crashed = True
            self.engine._close(error)
            return False

    def check(self) -> None:
        """What holds between two turns."""
        leased = [c for c in self.calls.values() if not (c.gone or c.seen.ends)]
        assert self.registry.totals().leases == len(leased)
        assert {info.name: info.version for info in self.registry.list()} == self.names
        for call in leased:
            for digest, adapter in call.lease.adapters.items():
                values = set(adapter.flat.numpy().tolist())
                assert values == {float(VERSIONS[digest])}, "leased weights were touched"
        if not self.crashed:
            running = self.scheduler._roster.running
            assert self.pool.pins == sum(len(s.request.adapters) for s in running)
            check_blocks(self.scheduler)
        if not self.faults:
            assert not any(call.seen.error for call in self.calls.values())

    def finish(self) -> None:
        """Everybody reads to the end, every name goes; nothing may be left."""
        turns = 0
        while self.turn() or self.scheduler.running or self.engine.stats().waiting:
            turns += 1
            assert turns < 3000, "no end"
        for name in self.calls:
            self.read(name)
        self.check()
        for name in list(self.names):
            self.unload(name)
        if not self.crashed:
            self.engine._obey()
        for name, call in self.calls.items():
            check_answer(name, call.seen)
        store, pool = self.registry._store, self.pool
        assert store.leases == store.versions == self.memory.used_bytes == 0
        assert not self.engine._sinks
        assert pool.pins == self.scheduler.blocks.used == 0
        if not self.crashed:
            assert pool.resident == pool.resident_bytes == 0
            assert not self.tables.rank.any()


def disturb(world: LiveWorld) -> None:
    """At most one fault, as the machine would have it."""
    rng, device = world.rng, world.device
    some = rng.choice(list(world.calls) or ["none"])
    fault = rng.randint(0, 9)
    world.faults += fault < 7
    match fault:
        case 0:
            device.culprits.add(some)
        case 1:
            device.nan.add(some)
        case 2:
            device.out_of_memory_above = rng.choice([2, 5, 10**9, 10**9])
        case 3:
            device.bad_uploads = set(rng.sample(list(VERSIONS), rng.choice([0, 0, 1])))
        case 4:
            world.memory.fail_in = rng.randint(1, 3)
        case 5:
            folder = str(rng.randint(1, len(RANKS)))
            kinds = (AdapterInvalid("x"), SourceNotFound("x"), SourceUnavailable("x"))
            world.disk.faults = {folder: rng.choice(kinds)}
        case 6 if rng.random() < 0.2:
            device.broken = True


def act(world: LiveWorld) -> None:
    """What one caller or administrator does."""
    rng = world.rng
    name = rng.choice("abcd")
    match rng.randint(0, 9):
        case 0 | 1 | 2:
            wishes: dict[str, object] = {"replace": rng.random() < 0.8, "pin": rng.random() < 0.1}
            if rng.random() < 0.3:
                guess = rng.choice([*world.names.values(), "", "0" * 12])
                wishes["if_version"] = guess[:12]
            world.load(name, rng.randint(1, len(RANKS)), **wishes)
        case 3 if name in world.names:
            world.unload(name)
        case 4 if rng.random() < 0.5:
            world.evict()
        case 5 if world.calls:
            world.hang_up(rng.choice(list(world.calls)))
        case _:
            world.ask(f"r{len(world.calls)}.{rng.random()}", _refs(rng), **_params(rng))


def _refs(rng: random.Random) -> list[tuple[str, float]]:
    names = rng.sample("abcd", rng.choice([0, 1, 1, 1, 2, 3]))
    refs = [(name, rng.choice([0.5, 1.0])) for name in names]
    too_many = len(refs) == 3 and {gamma for _, gamma in refs} == {1.0}
    return [*refs, *refs[:1]] if too_many else refs


def _params(rng: random.Random) -> dict[str, object]:
    return {
        "max_tokens": rng.randint(0, 12),
        "min_tokens": rng.choice([0, 0, 3]),
        "stop_token_ids": frozenset(rng.sample(range(50), rng.choice([0, 5]))),
    }


def live(seed: int, *, guesses: bool = False) -> LiveWorld:
    """One world from its first load to the last release; raises on any broken promise."""
    rng = random.Random(seed)
    world = LiveWorld(rng, ahead=bool(seed % 2), lookup=2 + seed % 4 if guesses else 0)
    calm = rng.random() < 0.5
    for name in rng.sample("abcd", rng.randint(1, 4)):
        world.load(name, rng.randint(1, len(RANKS)))
    for _ in range(rng.randint(1, 24)):
        for _ in range(rng.choice([0, 1, 1, 3])):
            act(world)
        if not calm:
            disturb(world)
        if rng.random() < 0.3:
            world.device.meanwhile = lambda: act(world)
        world.turn()
        for name in list(world.calls):
            if rng.random() < 0.7:
                world.read(name)
        world.check()
    world.device.meanwhile = lambda: None
    world.finish()
    return world
