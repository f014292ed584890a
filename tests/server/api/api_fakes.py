"""A small world behind the API: bytes as tokens, an engine thread that follows a script."""

import asyncio
import codecs
import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fader_adapters.claims import NONE, Claims
from fader_adapters.errors import (
    AdapterExists,
    AdapterInvalid,
    AdapterNotFound,
    NameReserved,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
    VersionConflict,
)
from fader_adapters.report import (
    AdapterReport,
    BaseMatch,
    Health,
    ModuleReport,
    kinds_of,
    verdict,
)
from fader_adapters.spec import Blend, Digest, Term
from fader_server import app
from fader_server.api.adapter_ports import AdapterInfo, AdapterTotals, Loaded, LoadOrder
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.choosing import Usual
from fader_server.api.context import BaseModel
from fader_server.config import ServeConfig
from fader_server.core import Guide, Request, Sink, TokenEvent, TokenLogprob
from fader_server.engine.stats import TenantStats
from fader_server.errors import RequestInvalid
from fader_server.metrics import Metrics
from fader_server.recipes import RecipeBook
from fader_server.text.restriction import Restriction, restriction_of
from fader_server.text.shape import Shape
from fader_server.text.thought import Markers, Thought
from fader_server.text.tool_format import Frame, ToolFormat
from fader_server.text.tool_reader import CallReader
from fader_server.text.tools import CallPart, Tool, ToolUse

EOS = 256
VOCAB = 257
TEXT = "Grüße aus Köln: 🦊 jumps over the lazy dog."
MAX_LEN = 4096


def digest(text: str) -> Digest:
    return Digest(hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True)
class FakeDelta:
    text: str
    offset: int
    stopped: bool


class FakeTextStream:
    def __init__(self, *, stops: Iterable[str], include_stop: bool = False) -> None:
        self._include = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = list(stops)
        self._held = ""
        self._length = 0
        self._stopped = False

    def feed(self, token: int) -> FakeDelta:
        return self._delta(token, matched=True)

    def _delta(self, token: int, *, matched: bool) -> FakeDelta:
        text = self._decoder.decode(bytes([token])) if token < 256 else ""
        offset, self._length = self._length, self._length + len(text)
        return FakeDelta(self._match(text) if matched else text, offset, self._stopped)

    def _match(self, text: str) -> str:
        if self._stopped:
            return ""
        whole = self._held + text
        found = [(at, s) for at, s in ((whole.find(s), s) for s in self._stops) if at >= 0]
        if found:
            self._stopped, self._held = True, ""
            at, stop = min(found)
            return whole[: at + len(stop) if self._include else at]
        longest = max(
            (n for stop in self._stops for n in range(len(stop)) if whole.endswith(stop[:n])),
            default=0,
        )
        cut = len(whole) - longest
        self._held = whole[cut:]
        return whole[:cut]

    def finish(self) -> str:
        if self._stopped:
            return ""
        held, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return held


class FakeEcho:
    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt
        begun = FakeTextStream(stops=())
        self.deltas = [begun._delta(token, matched=False) for token in prompt]

    def stream(self, *, stops: Iterable[str] = (), include_stop: bool = False) -> FakeTextStream:
        made = FakeTextStream(stops=stops, include_stop=include_stop)
        for token in self._prompt:
            made._delta(token, matched=False)
        return made


FORMAT = ToolFormat(
    "object", '<call>{"name": "', '", "arguments": ', '}</call><call>{"name": "', "}</call>",
    Frame("<call>", "</call>", "<call>", ""), False, {}, ("name", "arguments"),
)  # fmt: skip


class FakeToolStream:
    """Content and calls, of bytes."""

    def __init__(self, use: ToolUse, *, stops: Iterable[str], include_stop: bool) -> None:
        self._bytes = FakeTextStream(stops=())
        self._content = FakeTextStream(stops=stops, include_stop=include_stop)
        self._reader = CallReader(FORMAT, use)
        self._calls: list[CallPart] = []
        self._parallel = use.parallel
        self._ended = False

    def feed(self, token: int) -> FakeDelta:
        shown = self._shown(self._reader.feed(self._bytes.feed(token).text))
        return FakeDelta(shown, 0, self._ended)

    def finish(self) -> str:
        if self._ended:
            return ""
        pieces = self._reader.feed(self._bytes.finish()) + self._reader.finish()
        return self._shown(pieces) + self._content.finish()

    def taken(self) -> list[CallPart]:
        calls, self._calls = self._calls, []
        return calls

    def _shown(self, pieces: Sequence[str | CallPart]) -> str:
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += self._content._match(piece)
                self._ended = self._content._stopped
            elif not self._ended:
                self._calls.append(piece)
                self._ended = piece.ends and not self._parallel
        return text


class BytePieces:
    def is_silent(self, token: int) -> bool:
        return token == EOS

    def piece(self, token: int, *, first: bool = False) -> bytes:
        return bytes([token])


BRACKETS = Markers(ord("["), ord("]"), ("[", "]"), "", frozenset())


class FakeTokenizer:
    vocab_size = VOCAB
    eos_ids = frozenset({EOS})

    def __init__(self) -> None:
        self.thinks = False
        self.shapes: list[Shape] = []
        self.uses: list[tuple[ToolUse, str | None]] = []
        self.guided: list[str] = []
        """Tenants whose outputs were."""

    @property
    def schemas(self) -> list[str]:
        return [shape.text for shape in self.shapes]

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        *,
        special: bool = False,
        speaks: bool = True,
        continues: bool = False,
    ) -> list[int]:
        if any(tool.name == "unreadable" for tool in tools):
            raise RequestInvalid("this model has no tools", param="tools")
        shown = "".join(f"{tool.shown}\n" for tool in tools)
        rest = [
            {key: value for key, value in m.items() if key not in ("role", "content")}
            for m in messages
        ]
        lines = (
            f"{m['role']}:{m['content']}{more or ''}\n"
            for m, more in zip(messages, rest, strict=True)
        )
        first = ("special\n" if special else "") + (f"effort:{effort}\n" if effort else "")
        said = first + shown + "".join(lines)
        end = "" if speaks else "silent\n"
        return list((said.removesuffix("\n") if continues else said + end).encode())

    @property
    def told(self) -> dict[str, str | None]:
        return {"tokenizer_class": "Bytes", "eos_token": "<eos>", "chat_template": None}

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        text = bytes(token for token in tokens if token < 256).decode(errors="replace")
        return text + "<eos>" * (special and EOS in tokens)

    def stream(
        self,
        *,
        after: Sequence[int] = (),
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: Thought | None = None,
    ) -> FakeTextStream:
        return FakeTextStream(stops=stops, include_stop=include_stop)

    def echo(self, prompt: Sequence[int]) -> FakeEcho:
        return FakeEcho(prompt)

    def thought(self, prompt: Sequence[int]) -> Thought | None:
        """What stands in square brackets, once the base thinks."""
        return Thought(BytePieces(), BRACKETS, prompt) if self.thinks else None  # type: ignore[arg-type]

    def after_thought(self, guide: Guide, prompt: Sequence[int]) -> Guide:
        return guide

    def token_text(self, token: int) -> str:
        return "<eos>" if token == EOS else bytes([token]).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes | None:
        return None if token == EOS else bytes([token])

    def tool_stream(
        self,
        use: ToolUse,
        *,
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: Thought | None = None,
    ) -> FakeToolStream:
        return FakeToolStream(use, stops=stops, include_stop=include_stop)

    async def tool_guides(
        self, use: ToolUse, shape: Shape | None, count: int, *, tenant: str = ""
    ) -> list["FakeGuide"] | None:
        """Those that must call are guided."""
        self.guided.append(tenant)
        self.uses.append((use, shape and shape.text))
        return [FakeGuide() for _ in range(count)] if use.must else None

    def restriction(self, ids: Sequence[int], words: Iterable[str]) -> Restriction:
        return restriction_of(ids, words, lambda word: tuple(word.encode()), VOCAB)

    async def guides(
        self, shape: Shape, count: int, *, tenant: str = "", chat: bool = False
    ) -> list["FakeGuide"]:
        """Of a schema with `wait` never, with `refuse` a refusal."""
        self.guided.append(tenant)
        self.shapes.append(shape)
        if "wait" in shape.text:
            await asyncio.sleep(60)
        if "refuse" in shape.text:
            raise RequestInvalid("response_format has a schema of no use", param="response_format")
        return [FakeGuide() for _ in range(count)]


class FakeGuide:
    """Anything goes."""

    ended = False

    def allowed(self) -> bytes:
        return b"\xff" * (VOCAB // 8 + 1)

    def accept(self, token: int) -> None:
        pass


@dataclass(frozen=True)
class FakeStats:
    healthy: bool = True
    reason: str = ""
    running: int = 0
    waiting: int = 0
    kv_total: int = 100
    kv_used: int = 25
    kv_cached: int = 5
    block_size: int = 16
    prefix_queries: int = 0
    prefix_hits: int = 0
    generated: int = 0
    merged: int = 0
    guessed: int = 0
    accepted: int = 0
    preemptions: int = 0
    faults: int = 0
    stuck_reason: str = ""
    tenants: Mapping[str, TenantStats] = field(default_factory=dict)

    def stuck(self, now: float, after: float) -> str:
        return self.stuck_reason


Script = Callable[[Request], Iterator[TokenEvent]]


def say(
    text: str = TEXT,
    *,
    fail_after: int | None = None,
    error: Exception | None = None,
    fail_when: Callable[[], bool] = lambda: True,
) -> Script:
    """A script: the text, then EOS; or an error after some tokens, once it may."""

    def run(request: Request) -> Iterator[TokenEvent]:
        params = request.params
        prompt_scores: tuple[TokenLogprob, ...] = ()
        if params.prompt_logprobs is not None:
            prompt_scores = tuple(score(t, params.prompt_logprobs) for t in request.prompt[1:])
            yield TokenEvent(request.id, prompt_logprobs=prompt_scores)
        if params.max_tokens == 0:
            yield TokenEvent(request.id, finish="length")
            return
        for count, token in enumerate([*text.encode(), EOS], 1):
            if fail_after is not None and count > fail_after:
                while not fail_when():
                    time.sleep(0.001)
                yield TokenEvent(request.id, error=error)
                return
            stops = token in params.stop_token_ids
            ends = "stop" if stops else "length" if count == params.max_tokens else None
            found = None if params.logprobs is None else score(token, params.logprobs)
            yield TokenEvent(request.id, token, found, cached_tokens=count == 1, finish=ends)
            if ends:
                return
        yield TokenEvent(request.id, EOS, finish="length")

    return run


def endless(request: Request) -> Iterator[TokenEvent]:
    """A script that never ends, a token a millisecond."""
    while True:
        time.sleep(0.001)
        yield TokenEvent(request.id, 97)


def score(token: int, top: int) -> TokenLogprob:
    others = tuple(((token + k) % VOCAB, -0.5 - k) for k in range(top))
    return TokenLogprob(token, -0.5, others)


class FakeEngine:
    """One event of every open request a turn, on a thread of its own, like the real one."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or say()
        self.gate = threading.Event()
        self.gate.set()
        self.refuse: Exception | None = None
        self.refuse_from = 0
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.told = FakeStats()
        self._open: dict[str, tuple[Iterator[TokenEvent], Sink]] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        return len(self._open)

    def submit(self, request: Request, sink: Sink, *, further: bool = False) -> None:
        if self.refuse is not None and len(self.seen) >= self.refuse_from:
            raise self.refuse
        with self._lock:
            self.seen.append(request)
            self._open[request.id] = (self.script(request), sink)
        self._wake.set()

    def abort(self, request_id: str) -> None:
        with self._lock:
            self.aborted.append(request_id)
            self._open.pop(request_id, None)

    def stats(self) -> FakeStats:
        return replace(self.told, running=self.open)

    def stop(self) -> None:
        self._ended = True
        self._wake.set()
        self.gate.set()
        self._thread.join(5)

    def _main(self) -> None:
        while not self._ended:
            self._wake.wait()
            self._wake.clear()
            while self._open and not self._ended:
                self.gate.wait()
                for id, (events, sink) in list(self._open.items()):
                    event = next(events)
                    if event.finish or event.error:
                        with self._lock:
                            self._open.pop(id, None)
                    sink(event)


@dataclass(frozen=True)
class FakeTerm:
    name: str
    version: Digest
    weight: float


@dataclass
class FakeLease:
    blend: Blend
    terms: tuple[FakeTerm, ...]
    owner: "FakeAdapters"
    adapters: Mapping[Digest, Any] = field(default_factory=dict)
    released: bool = False

    def release(self) -> None:
        if not self.released:
            self.released = True
            self.owner.leases -= 1


_MODULE = ModuleReport("layers.0.q_proj", 8, 16.0, 2.0, 3.0)
_REPORT = AdapterReport((_MODULE,), 4, "LORA", False, ("F32",), "org/base")
HEALTH = Health(
    report=_REPORT,
    dtype="bfloat16",
    nbytes=1024,
    kinds=tuple(kinds_of(_REPORT.modules, [30.0])),
    largest=0.1,
    match=BaseMatch("f" * 64, "org/base", verdict("org/base", "base")),
)


class FakeAdapters:
    """Names to versions; any source but `missing`, `secret` and `broken` loads."""

    def __init__(self, names: Sequence[str] = ("tone", "domain")) -> None:
        self.infos = {name: self._info(name, name) for name in names}
        self.leases = 0
        self.lessees: list[str] = []
        self.claims = NONE
        self.earlier: dict[str, list[AdapterInfo]] = {}

    def _info(self, name: str, content: str, *, pinned: bool = False) -> AdapterInfo:
        return AdapterInfo(
            name, digest(content), 8, (2.0,), 4, ("q_proj",), 1024, "host", 0, pinned,
            source=f"/roots/{content}", health=HEALTH,
        )  # fmt: skip

    def acquire(self, terms: Sequence[NamedTerm]) -> FakeLease:
        kept = [
            FakeTerm(term.ref.name, self.get(term.ref).version, term.weight)
            for term in terms
            if self.get(term.ref) and term.weight
        ]
        self.leases += 1
        return FakeLease(Blend.of(Term(t.version, t.weight) for t in kept), tuple(kept), self)

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> FakeLease:
        self.lessees.append(tenant)
        return self.acquire(terms)

    def get(self, ref: AdapterRef) -> AdapterInfo:
        info = self.infos.get(ref.name)
        known = [] if info is None else [info, *self.earlier.get(ref.name, [])]
        for found in known:
            if found.version.startswith(ref.version or ""):
                return found
        raise AdapterNotFound.of(ref.name)

    def claim(self, claims: Claims) -> None:
        if claims.names & self.infos.keys():
            raise NameReserved("an adapter has the name")
        self.claims = claims
        for name, infos in self.earlier.items():
            infos[:] = [info for info in infos if (name, info.version) in claims.versions]

    async def revive(self, order: LoadOrder) -> None:
        await asyncio.sleep(0)
        self.get(AdapterRef(order.name))
        info = self._sourced(order)
        if info.version != order.sha256:
            raise VersionConflict("another version")
        self.earlier.setdefault(order.name, []).append(info)

    async def saved(self) -> None:
        pass

    async def load(self, order: LoadOrder) -> Loaded:
        await asyncio.sleep(0)
        old = self.infos.get(order.name)
        if order.name in self.claims.names:
            raise NameReserved("a recipe has the name")
        if old and not order.replace:
            raise AdapterExists("taken")
        if order.if_version is not None and (old.version if old else "") != order.if_version:
            raise VersionConflict("moved")
        info = self._sourced(order)
        self.infos[order.name] = info
        if old and (old.name, old.version) in self.claims.versions:
            self.earlier.setdefault(old.name, []).append(old)
        return Loaded(info, old.version if old else None)

    def _sourced(self, order: LoadOrder) -> AdapterInfo:
        refusals = {
            "missing": SourceNotFound("nothing there"),
            "secret": SourceForbidden("outside the roots"),
            "broken": AdapterInvalid("lora_A is missing"),
            "away": SourceUnavailable("https://secret.example cannot be reached"),
        }
        if order.source in refusals:
            raise refusals[order.source]
        old = self.infos.get(order.name)
        pinned = old is not None and old.pinned if order.pin is None else order.pin
        return self._info(order.name, order.source.removeprefix("/roots/"), pinned=pinned)

    def unload(self, name: str) -> None:
        self.earlier.pop(name, None)
        if self.infos.pop(name, None) is None:
            raise AdapterNotFound("no such adapter")

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        self.infos[name] = replace(self.get(AdapterRef(name)), pinned=pinned)
        return self.infos[name]

    def list(self) -> list[AdapterInfo]:
        return list(self.infos.values())

    def totals(self) -> AdapterTotals:
        return AdapterTotals(len(self.infos), self.leases, 2048, 1024, 0, 3, 4)


@dataclass
class World:
    """An application over fakes."""

    engine: FakeEngine
    adapters: FakeAdapters
    recipes: RecipeBook
    metrics: Metrics
    app: Any

    @property
    def tokenizer(self) -> FakeTokenizer:
        return self.app.state.context.tokenizer

    @property
    def idle(self) -> bool:
        return self.engine.open == 0 and self.adapters.leases == 0

    def told(self) -> bool:
        """A first token has been seen by the API."""
        return "fader_time_to_first_token_seconds_count 0.0" not in self.metrics.render().decode()

    async def until(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "the condition never came"
            await asyncio.sleep(0.002)


def build_world(**changes: Any) -> World:
    script, merging = changes.pop("script", None), changes.pop("merging", None)
    spans, usual = changes.pop("spans", None), changes.pop("usual", Usual())
    tenants = changes.pop("tenants", ())
    if tenants:
        changes["tenants"] = Path("tenants.toml")
    adapters, over = changes.pop("adapters", None) or FakeAdapters(), changes.pop("over", None)
    engine, metrics = FakeEngine(script), Metrics()
    config = ServeConfig(**{"port": 0, **changes})
    named = adapters if over is None else over(adapters)
    recipes = RecipeBook(named, base="base", most=config.max_recipes)
    application = app.build(
        config,
        BaseModel("base", digest("base"), MAX_LEN, 1700000000, usual),
        engine=engine,
        adapters=named,
        recipes=recipes,
        tokenizer=FakeTokenizer(),
        metrics=metrics,
        version="9",
        merging=merging,
        tenants=tenants,
        spans=spans,
    )
    application.state.context.readiness.reason = ""
    return World(engine, adapters, recipes, metrics, application)
