"""A world to run the engine in: a pool and a device in plain integers that notice every mistake.

What a wrong block, slot or weight changes are the tokens, see engine_device, and `expected` knows
the right ones without any engine.
"""

import hashlib
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fader_adapters.errors import AdapterTooLarge
from fader_adapters.spec import AdapterData, AdapterSpec, Blend, Digest, Term, Upload
from fader_server.core import (
    Guide,
    Plan,
    Request,
    SamplingParams,
    Sequence,
    TokenEvent,
    TokenLogprob,
)
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.line import Line
from fader_server.engine.scheduler import Scheduler
from fader_server.engine.shares import Share
from fader_server.engine.stats import Unobserved
from fader_server.engine.stepper import Stepper
from tests.server.engine.engine_device import Ahead, Device, Stateful, draw
from tests.server.engine.engine_guides import Turns, guided
from tests.support.activation import terms_at


@dataclass(frozen=True)
class FakeData:
    spec: AdapterSpec
    flat: None = None


def version(name: str) -> Digest:
    return Digest(hashlib.sha256(name.encode()).hexdigest())


INVOCATIONS = {version("p"): (3, 4), version("q"): (5,)}
"""Tokens that activate these adapters."""


def adapters_of(blend: Blend, sizes: Mapping[Digest, int]) -> dict[Digest, AdapterData]:
    specs = (
        AdapterSpec(t.version, (), sizes.get(t.version, 1), INVOCATIONS.get(t.version, ()))
        for t in blend.terms
    )
    return {spec.version: FakeData(spec) for spec in specs}  # type: ignore[misc]


def blend_of(*terms: tuple[str, float]) -> Blend:
    return Blend.of(Term(version(name), gamma) for name, gamma in terms)


def request(
    name: str,
    prompt: Iterable[int],
    *,
    blend: Blend | None = None,
    sizes: Mapping[Digest, int] | None = None,
    salt: str = "",
    tenant: str = "",
    guide: Guide | None = None,
    **params: object,
) -> Request:
    blend = blend or Blend()
    params.setdefault("max_tokens", 4)
    return Request(
        name,
        tuple(prompt),
        SamplingParams(**params),  # type: ignore[arg-type]
        blend,
        adapters_of(blend, sizes or {}),
        salt,
        tenant,
        guide,
    )


class FakePool:
    """Slots and a budget of elements; evicts the least recently acquired unpinned version."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pins: Counter[Digest] = Counter()
        self.size: dict[Digest, int] = {}  # resident, oldest first
        self.slots: dict[Digest, int] = {}
        self.leaving: set[Digest] = set()
        self.fail_acquires = 0

    @property
    def numel(self) -> int:
        return self.capacity

    def acquire(self, data: Mapping[Digest, AdapterData]) -> tuple[Upload, ...] | None:
        if self.fail_acquires:
            self.fail_acquires -= 1
            raise MemoryError("injected")
        self.check(data)
        need = {v: d.spec.numel for v, d in data.items()}
        pinned = sum(n for v, n in self.size.items() if self.pins[v] and v not in need)
        if pinned + sum(need.values()) > self.capacity:
            return None
        for v in [v for v in self.size if not self.pins[v] and v not in need]:
            fresh = sum(n for v, n in need.items() if v not in self.size)
            if sum(self.size.values()) + fresh <= self.capacity:
                break
            self._drop(v)
        uploads = []
        for v, d in data.items():
            self.pins[v] += 1
            if v in self.size:
                self.size[v] = self.size.pop(v)
                continue
            self.size[v] = d.spec.numel
            self.slots[v] = min(set(range(len(self.slots) + 1)) - set(self.slots.values()))
            uploads.append(Upload(d, self.slots[v], 0))
        return tuple(uploads)

    def check(self, data: Mapping[Digest, AdapterData]) -> None:
        if sum(d.spec.numel for d in data.values()) > self.capacity:
            raise AdapterTooLarge("never fits")

    def displaces(self, data: Mapping[Digest, AdapterData]) -> bool:
        missing = sum(d.spec.numel for v, d in data.items() if v not in self.size)
        return missing > 0 and sum(self.size.values()) + missing > self.capacity

    def prefetch(self, line: Iterable[Mapping[Digest, AdapterData]]) -> tuple[Upload, ...]:
        return ()

    def release(self, versions: tuple[Digest, ...]) -> None:
        for v in versions:
            assert self.pins[v] > 0, "released more often than acquired"
            self.pins[v] -= 1
            if not self.pins[v] and v in self.leaving:
                self._drop(v)

    def slot(self, v: Digest) -> int:
        return self.slots[v]

    def forget(self, v: Digest) -> None:
        if v in self.size:
            if self.pins[v]:
                self.leaving.add(v)
            else:
                self._drop(v)

    def _drop(self, v: Digest) -> None:
        del self.size[v], self.slots[v]
        self.leaving.discard(v)


def _contents(request: Request, tokens: list[int]) -> tuple[int, ...]:
    contents, content = [], 0
    for position, token in enumerate(tokens):
        terms = terms_at(request, position)
        key = tuple((int(t.version[:12], 16), t.gamma) for t in terms)
        content = hash((content, token, key))
        contents.append(content)
    return tuple(contents)


def expected(request: Request) -> list[int]:
    """The tokens of the request alone, by definition."""
    params, tokens = request.params, list(request.prompt)
    guide = request.guide.fresh() if isinstance(request.guide, Turns) else None
    output: list[int] = []
    while len(output) < params.max_tokens:
        token = draw(params.seed, _contents(request, tokens))
        if guide is not None:
            token = guided(guide.allowed(), token)
            guide.accept(token)
        tokens.append(token)
        output.append(token)
        if len(output) > params.min_tokens and token in params.stop_token_ids:
            break
        if guide is not None and guide.ended:
            break
    return output


def expected_scores(request: Request) -> list[TokenLogprob]:
    """The prompt logprobs of the request alone, by definition."""
    if request.params.prompt_logprobs is None:
        return []
    contents = _contents(request, list(request.prompt))
    return [
        TokenLogprob(request.prompt[p + 1], float(contents[p])) for p in range(len(contents) - 1)
    ]


@dataclass
class Seen:
    """What one request's caller saw."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None
    ends: int = 0
    cached: int = 0
    aborted: bool = False

    def take(self, event: TokenEvent) -> None:
        assert not self.ends, "an event after the last"
        assert not self.aborted, "an event after the abort"
        if event.token is not None:
            assert len(self.scores) >= len(expected_scores(self.request)) - len(
                event.prompt_logprobs
            ), "prompt logprobs come before or with the first token"
            self.tokens.append(event.token)
        self.scores += event.prompt_logprobs
        self.cached = max(self.cached, event.cached_tokens)
        if event.finish is not None or event.error is not None:
            self.ends += 1
            self.finish, self.error = event.finish, event.error


def by_arrival(line: Line, closed: Container[str]) -> Iterator[Sequence]:
    """A fault to plant as Line.in_turn: whoever came first is first, whosever it is."""
    everybody = [s for queue in line._queues.values() for s in queue]
    yield from [*line._returned, *sorted(everybody, key=lambda s: s.arrival)]


def check_blocks(scheduler: Scheduler) -> None:
    """The invariants of blocks and lines between two turns."""
    blocks, roster = scheduler.blocks, scheduler._roster
    holders: dict[int, list[tuple[Sequence, int]]] = {}
    for sequence in roster.running:
        for index, block in enumerate(sequence.blocks):
            holders.setdefault(block, []).append((sequence, index))
    for block, refs in enumerate(blocks._refs):
        assert refs == len(holders.get(block, []))
    assert 0 not in holders
    assert blocks.used == len(holders)
    assert blocks.used + blocks.cached + blocks.free == blocks.total
    for block, held in holders.items():
        if len(held) > 1:
            ends = {(i + 1) * blocks.block_size for _, i in held}
            assert len(ends) == 1, f"block {block} is in several places"
            keys = {
                (s.request.cache_salt, *(terms_at(s.request, p) for p in range(max(ends))))
                for s, _ in held
            }
            prefixes = {tuple(s.tokens[: (i + 1) * blocks.block_size]) for s, i in held}
            assert len(keys) == len(prefixes) == 1, f"block {block} is shared by strangers"
            assert all((i + 1) * blocks.block_size <= s.computed for s, i in held)
    assert not any(s.blocks for s in roster.waiting)
    assert set(roster.open) == {s.request.id for s in [*roster.running, *roster.waiting]}
    assert len(roster.running) <= scheduler.limits.max_rows
    assert [s.arrival for s in roster.running] == sorted(s.arrival for s in roster.running)
    for tenant, count in Counter(s.request.tenant for s in roster.running).items():
        most = scheduler._shares._most.get(tenant, 1.0)
        assert count <= max(1, int(most * scheduler.limits.max_rows)), tenant


def check_answer(name: str, seen: Seen) -> None:
    """A request that has ended, or was aborted, said only what it says alone."""
    want, scores = expected(seen.request), expected_scores(seen.request)
    assert seen.ends == (not seen.aborted), f"{name} ended {seen.ends} times"
    if seen.error is None and not seen.aborted:
        assert seen.tokens == want, name
        assert seen.scores == scores, name
    assert seen.tokens == want[: len(seen.tokens)], name
    assert seen.scores == scores[: len(seen.scores)], name


class World:
    """Scheduler, pool and device in one thread, with everything they promise checked."""

    def __init__(
        self,
        *,
        blocks: int = 40,
        block_size: int = 4,
        max_rows: int = 4,
        chunk_size: int = 8,
        max_step_tokens: int | None = None,
        max_model_len: int = 64,
        max_overtakes: int = 3,
        capacity: int = 3,
        ahead: bool = False,
        shares: Mapping[str, Share] | None = None,
        states: bool = False,
        lookup: int = 0,
    ) -> None:
        """`ahead`: the device computes by itself; `states`: rows go on from those; `lookup`: rows
        up to which guesses fill a step."""
        limits = Limits(
            max_rows=max_rows,
            chunk_size=chunk_size,
            max_step_tokens=max_step_tokens or max_rows + chunk_size,
            max_model_len=max_model_len,
            max_overtakes=max_overtakes,
            block=block_size if states else 0,
            lookup=lookup,
        )
        self.now = 0.0
        kind = Stateful if states else Ahead if ahead else Device
        self.device = kind(blocks, block_size)
        slots = self.device.slots if isinstance(self.device, Stateful) else None
        if slots is not None:
            slots.most += 2 * max_rows
        self.blocks = BlockManager(blocks, block_size=block_size, states=slots)
        self.pool = FakePool(capacity)
        self.scheduler = Scheduler(limits, blocks=self.blocks, pool=self.pool, shares=shares)
        self.stepper = Stepper(
            self.scheduler,
            self.device,
            self.device.upload,
            deliver=lambda event: self.seen[event.request_id].take(event),
            clock=lambda: self.now,
            observer=Unobserved(),
        )
        self.seen: dict[str, Seen] = {}

    def submit(self, one: Request) -> Seen:
        self.stepper.add(one)
        self.seen[one.id] = Seen(one)
        return self.seen[one.id]

    def abort(self, name: str) -> None:
        self.stepper.abort(name)
        if not self.seen[name].ends:
            self.seen[name].aborted = True

    def turn(self) -> bool:
        plans = self.device.plans
        known = len(plans)
        worked = self.stepper.turn()
        for plan in plans[known:]:
            self._check_plan(plan)
        return worked

    def _check_plan(self, plan: Plan) -> None:
        limits = self.scheduler.limits
        assert plan.tokens <= limits.max_step_tokens
        own = [row for row in plan.rows if not row.guesses]
        assert len({id(row.sequence) for row in own}) == len(own) <= len(plan.rows)
        assert len(plan.rows) <= limits.max_rows
        if len(own) < len(plan.rows):
            assert len(plan.rows) <= limits.lookup
            assert all(row.count == 1 and row.samples for row in plan.rows)
        for row in plan.rows:
            end, prompt_len = row.start + row.count, row.sequence.prompt_len
            ends = row.start // limits.chunk_size + 1
            assert end <= ends * limits.chunk_size
            assert row.start >= prompt_len or end <= prompt_len, "a chunk ends at the prompt's end"

    def finish(self, turns: int = 3000) -> None:
        """Run until nothing is open; that this ends is freedom from deadlock."""
        for _ in range(turns):
            if not self.turn():
                break
        roster = self.scheduler._roster
        assert not roster.open, f"still open after {turns} turns: {list(roster.open)}"
        self.check_end()

    def check(self) -> None:
        """The invariants between two turns."""
        roster = self.scheduler._roster
        check_blocks(self.scheduler)
        pins = Counter(v for s in roster.running for v in s.request.adapters)
        assert +self.pool.pins == pins

    def check_end(self) -> None:
        """What must hold when every request has ended."""
        self.check()
        assert self.blocks.used == 0
        assert not +self.pool.pins
        for name, seen in self.seen.items():
            check_answer(name, seen)
