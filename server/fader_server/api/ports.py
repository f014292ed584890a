"""What the API needs from the engine, the text layer and the adapter store, and nothing more.

Tests stand fakes behind these; app.py stands the real ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fader_adapters.claims import Claims
from fader_adapters.report import Health
from fader_adapters.spec import AdapterData, Blend, Digest
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.core import Guide, Request, Sink
from fader_server.text.shape import Shape
from fader_server.text.tools import Tool, ToolCall, ToolUse

Tier = Literal["disk", "host", "device"]


class TenantStats(Protocol):
    """One tenant at one moment: engine.stats.TenantStats."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class EngineStats(Protocol):
    """One look at the engine: engine.stats.EngineStats, as far as the API reads it."""

    @property
    def healthy(self) -> bool: ...
    @property
    def reason(self) -> str: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_total(self) -> int: ...
    @property
    def kv_used(self) -> int: ...
    @property
    def kv_cached(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def generated(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def faults(self) -> int: ...
    @property
    def tenants(self) -> Mapping[str, TenantStats]: ...
    @property
    def merged(self) -> int: ...

    def stuck(self, now: float, after: float) -> str:
        """Why the loop counts as stuck at `now` (time.monotonic), else empty."""
        ...


class Engine(Protocol):
    """The engine as callers on the event loop see it. No method blocks."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its events reach `sink` on the engine thread.

        Raises Overloaded, TenantBusy, RequestInvalid, ContextTooLong, AdapterTooLarge or
        EngineFault.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request without an event; unknown or ended ids are ignored."""
        ...

    def stats(self) -> EngineStats: ...


class TextDelta(Protocol):
    """What one token did to a text."""

    @property
    def text(self) -> str:
        """To append now."""
        ...

    @property
    def offset(self) -> int:
        """Characters of the returned text before this token."""
        ...

    @property
    def stopped(self) -> bool:
        """A stop string is complete; it and all after it is left out."""
        ...


class TextStream(Protocol):
    """Turns one choice's tokens into text: text.stream.TextStream."""

    @property
    def echoed(self) -> Sequence[TextDelta]:
        """One a prompt token, when the prompt is part of the text."""
        ...

    def feed(self, token: int) -> TextDelta: ...

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        ...


class ToolStream(TextStream, Protocol):
    """Turns one choice's tokens into content and calls of tools: text.tool_stream.ToolStream."""

    def taken(self) -> Sequence[ToolCall]:
        """The calls that came since this was asked."""
        ...


class Tokenizer(Protocol):
    """The base's text layer: text.tokenizer.Tokenizer. Encoding may run on any thread."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Raises RequestInvalid, ContextTooLong."""
        ...

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Through the base's template. Raises RequestInvalid, ContextTooLong."""
        ...

    def decode(self, tokens: Iterable[int]) -> str: ...

    def stream(
        self, *, prompt: Sequence[int] = (), echo: bool = False, stops: Iterable[str] = ()
    ) -> TextStream: ...

    def tool_stream(self, use: ToolUse, *, stops: Iterable[str] = ()) -> ToolStream:
        """Of a chat that was encoded with these tools."""
        ...

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes | None: ...

    async def guides(self, shape: Shape, count: int) -> Sequence[Guide]:
        """For so many outputs of one shape. Waits for its grammar, which others share.

        Raises RequestInvalid for a shape that cannot be enforced, Overloaded.
        """
        ...

    async def tool_guides(
        self, use: ToolUse, shape: Shape | None, count: int
    ) -> Sequence[Guide] | None:
        """The same for outputs that may or must call tools, and have the shape in their content;
        None: they need no guide."""
        ...


class LeasedTerm(Protocol):
    """One adapter of a running call, resolved."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> Digest: ...
    @property
    def weight(self) -> float: ...


class Lease(Protocol):
    """A call's hold on the versions it uses. Release is idempotent."""

    @property
    def blend(self) -> Blend: ...
    @property
    def adapters(self) -> Mapping[Digest, AdapterData]: ...
    @property
    def terms(self) -> Sequence[LeasedTerm]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What an administrator asks to load under a name."""

    name: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    replace: bool = True
    """Swap a name that is taken; else AdapterExists."""
    if_version: str | None = None
    """Only swap from this version; "" asks that the name is free."""
    pin: bool | None = None
    """None: as it is; a new name has no pin."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """The health report of one adapter."""

    name: str
    version: Digest
    rank: int
    """The largest of its modules."""
    scales: tuple[float, ...]
    modules: int
    """Linears of the base that it changes."""
    targets: tuple[str, ...]
    bytes: int
    tier: Tier
    leases: int
    pinned: bool
    retired: tuple[Digest, ...] = ()
    """Earlier versions that requests or recipes still hold."""
    health: Health | None = None
    """What the load found."""
    source: str = ""
    revision: str | None = None
    """The commit a Hub source meant when it was loaded."""
    created: int = 0
    """Unix seconds of the load."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load did."""

    info: AdapterInfo
    replaced: Digest | None
    """The version the name had before, if any."""


@dataclass(frozen=True, slots=True)
class AdapterTotals:
    """The store and the pool in numbers."""

    adapters: int = 0
    leases: int = 0
    host_bytes: int = 0
    device_bytes: int = 0
    host_evictions: int = 0
    device_evictions: int = 0
    slots: int = 0
    """Adapters the device can hold at once, when they are as large as those there are."""


class Adapters(Protocol):
    """The adapters of this server. Every method belongs to the event loop; none blocks it."""

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        """Resolve names and take the lease in one step. No terms: the base.

        Raises AdapterNotFound or BlendInvalid.
        """
        ...

    async def lease(self, terms: Sequence[NamedTerm], *, tenant: str = "") -> Lease:
        """The same, after loading what is missing where that is allowed; waits for room, in which
        tenants take turns.

        Raises AdapterError, Overloaded, TenantBusy.
        """
        ...

    async def load(self, order: LoadOrder) -> Loaded:
        """Fetch, check and publish; the name moves at once or not at all.

        Raises AdapterError: AdapterInvalid, AdapterMismatch, AdapterTooLarge, ArenaFull,
        AdapterExists, NameReserved, VersionConflict, SourceForbidden, SourceNotFound,
        SourceUnavailable.
        """
        ...

    async def revive(self, order: LoadOrder) -> None:
        """Fetch a version that is claimed, as an earlier one of a name that stays where it is.

        `order.sha256` is the version. Raises AdapterError as `load` does, AdapterNotFound when
        the name is not loaded.
        """
        ...

    def claim(self, claims: Claims) -> None:
        """Replace what recipes claim: names for no adapter, versions that outlive a swap.

        Raises NameReserved when an adapter has such a name, and nothing changes.
        """
        ...

    async def saved(self) -> None:
        """Return when every change so far would survive the end of the process."""
        ...

    def unload(self, name: str) -> None:
        """The name is gone at once. Raises AdapterNotFound."""
        ...

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo: ...

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """The name's current version, or the earlier one that is asked for and still held.

        Raises AdapterNotFound.
        """
        ...

    def list(self) -> Sequence[AdapterInfo]: ...

    def totals(self) -> AdapterTotals: ...
