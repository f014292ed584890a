"""What the API needs from the engine, the text layer and the adapter store, and nothing more.

Tests stand fakes behind these; app.py stands the real ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from fader_adapters.spec import AdapterData, Blend, Digest
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.messages import Message
from fader_server.core import Request, Sink

Tier = Literal["disk", "host", "device"]


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
    def prefix_queries(self) -> int: ...
    @property
    def prefix_hits(self) -> int: ...
    @property
    def generated(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def faults(self) -> int: ...

    def stuck(self, now: float, after: float) -> str:
        """Why the loop counts as stuck at `now` (time.monotonic), else empty."""
        ...


class Engine(Protocol):
    """The engine as callers on the event loop see it. No method blocks."""

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request; its events reach `sink` on the engine thread.

        Raises Overloaded, RequestInvalid, ContextTooLong or EngineFault.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request without an event; unknown or ended ids are ignored."""
        ...

    def stats(self) -> EngineStats: ...


class TextStream(Protocol):
    """Turns one choice's tokens into text. Holds back half characters and stop prefixes."""

    def push(self, token: int) -> str:
        """The text that is now certain."""
        ...

    def flush(self) -> str:
        """What was held back; call once, when no more tokens come."""
        ...

    @property
    def stopped(self) -> bool:
        """A stop string was found; it and all after it is left out."""
        ...


class Tokenizer(Protocol):
    """The base's text layer. Every method may run on any thread."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text: the model's EOS."""
        ...

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: text longer than this times n has over n tokens."""
        ...

    def encode_prompt(self, text: str, *, special: bool = True) -> Sequence[int]: ...

    def encode_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """Through the base's template. Raises RequestInvalid when it has none or refuses."""
        ...

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def stream(self, stop: tuple[str, ...]) -> TextStream: ...


@dataclass(frozen=True, slots=True)
class LeasedTerm:
    """One adapter of a running call, resolved."""

    name: str
    version: Digest
    weight: float


class Lease(Protocol):
    """A call's hold on the versions it uses. Release is idempotent."""

    @property
    def blend(self) -> Blend: ...

    @property
    def adapters(self) -> Mapping[Digest, AdapterData]: ...

    @property
    def terms(self) -> tuple[LeasedTerm, ...]: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What an administrator asks to load under a name."""

    name: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    if_version: str | None = None
    """Only swap from this version; "" asks that the name is free."""
    pin: bool = False


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """The health report of one adapter."""

    name: str
    version: Digest
    rank: int
    scale: float
    modules: int
    """Linears of the base that it changes."""
    targets: tuple[str, ...]
    bytes: int
    tier: Tier
    leases: int
    pinned: bool
    retired: tuple[Digest, ...] = ()
    """Earlier versions that requests still hold."""
    relative_norm: float | None = None
    """Largest ‖ΔW‖/‖W‖ of its modules."""
    source: str = ""
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
    """Adapters the device can hold at once."""


class Adapters(Protocol):
    """The adapters of this server. Only `load` blocks: call it off the event loop."""

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        """Resolve names and take the lease in one step. No terms: the base.

        Raises AdapterNotFound or BlendInvalid.
        """
        ...

    def load(self, order: LoadOrder) -> Loaded:
        """Fetch, check and publish; the name moves at once or not at all.

        Raises AdapterError: AdapterInvalid, AdapterMismatch, AdapterTooLarge, ArenaFull,
        AdapterExists, VersionConflict, SourceForbidden, SourceNotFound.
        """
        ...

    def unload(self, name: str) -> None:
        """The name is gone at once. Raises AdapterNotFound."""
        ...

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo: ...

    def get(self, ref: AdapterRef) -> AdapterInfo:
        """Raises AdapterNotFound."""
        ...

    def list(self) -> Sequence[AdapterInfo]: ...

    def totals(self) -> AdapterTotals: ...
