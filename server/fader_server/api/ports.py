"""What the API needs from the engine and the text layer, and nothing more.

Tests stand fakes behind these; app.py stands the real ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from fader_server.core import Guide, Request, Sink
from fader_server.text.restriction import Restriction
from fader_server.text.shape import Shape
from fader_server.text.tools import CallPart, Tool, ToolUse


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
    @property
    def guessed(self) -> int: ...
    @property
    def accepted(self) -> int: ...

    def stuck(self, now: float, after: float) -> str:
        """Why the loop counts as stuck at `now` (time.monotonic), else empty."""
        ...


class Engine(Protocol):
    """The engine as callers on the event loop see it. No method blocks."""

    def submit(self, request: Request, sink: Sink, *, further: bool = False) -> None:
        """Queue a request; its events reach `sink` on the engine thread. further: another choice of
        a call of which one was queued.

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

    def feed(self, token: int) -> TextDelta: ...

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
        ...


class Echo(Protocol):
    """A prompt that its choices' texts begin with: text.stream.Echo."""

    @property
    def deltas(self) -> Sequence[TextDelta]:
        """One a token."""
        ...

    def stream(self, *, stops: Iterable[str] = (), include_stop: bool = False) -> TextStream:
        """The text of a new choice, from behind the prompt on."""
        ...


class ToolStream(TextStream, Protocol):
    """Turns one choice's tokens into content and calls of tools: text.tool_stream.ToolStream."""

    def taken(self) -> Sequence[CallPart]:
        """What calls gained since this was asked."""
        ...


class Thought(Protocol):
    """Tells what one choice thinks from what it answers: text.thought.Thought."""

    @property
    def tokens(self) -> int:
        """Thought so far."""
        ...

    def take(self, token: int) -> str | None:
        """What the thought gains; None: the token is the answer's."""
        ...

    def finish(self) -> str:
        """What was held back, when no more tokens come."""
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
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        *,
        special: bool = False,
        speaks: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """Through the base's template.

        special: also with the tokens the tokenizer adds by itself. speaks: with what the template
        lets the assistant's answer begin with. Raises RequestInvalid, ContextTooLong.
        """
        ...

    @property
    def told(self) -> Mapping[str, str | None]:
        """Its class, special tokens and chat template."""
        ...

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """special: with the names of special tokens."""
        ...

    def stream(
        self,
        *,
        after: Sequence[int] = (),
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: Thought | None = None,
    ) -> TextStream:
        """after: what the text continues; none in a chat. thought: of the same choice."""
        ...

    def echo(self, prompt: Sequence[int]) -> Echo:
        """Takes its time, on any thread."""
        ...

    def tool_stream(
        self,
        use: ToolUse,
        *,
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: Thought | None = None,
    ) -> ToolStream:
        """Of a chat that was encoded with these tools. thought: of the same choice."""
        ...

    def thought(self, prompt: Sequence[int]) -> Thought | None:
        """Of a new choice in a chat with this prompt; None: thoughts are not told apart."""
        ...

    def after_thought(self, guide: Guide, prompt: Sequence[int]) -> Guide:
        """The guide for the answer of a choice in a chat with this prompt. Raises
        RequestInvalid."""
        ...

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes | None: ...

    async def guides(
        self, shape: Shape, count: int, *, tenant: str = "", chat: bool = False
    ) -> Sequence[Guide]:
        """For so many outputs of one shape; chat: for answers of one. Waits for its grammar, which
        others share; grammars are made for tenants in turn.

        Raises RequestInvalid for a shape that cannot be enforced, Overloaded.
        """
        ...

    def restriction(self, ids: Sequence[int], words: Iterable[str]) -> Restriction:
        """To these ids, all if there are none, and without these words; on any thread.
        Raises RequestInvalid."""
        ...

    async def tool_guides(
        self, use: ToolUse, shape: Shape | None, count: int, *, tenant: str = ""
    ) -> Sequence[Guide] | None:
        """The same for outputs that may or must call tools, and have the shape in their content;
        None: they need no guide."""
        ...
