"""One choice of a call: its tokens become text, logprobs and an end. Knows nothing about HTTP."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from fader_server.api.ports import Echo, TextStream, Thought
from fader_server.core import FinishReason, Request, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True)
class Scored:
    """One token with its logprob; `logprob` is None for the first token of an echoed prompt."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int
    """Characters of the returned text before it."""
    of: Literal["text", "thought", "call"] = "text"
    """What came of it, or may yet; of a call: those before it without a text were so, too."""


@dataclass(frozen=True, slots=True)
class PlacedCall:
    """What a call of a tool gained, among those of its choice."""

    index: int
    id: str
    """"" where the call goes on, as its name is."""
    name: str
    arguments: str


Finish = FinishReason | Literal["tool_calls"]
PIECE = 64
"""Tokens of a prompt that are told at once, where each has logprobs: nobody else waits longer."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained: text, thought, tokens with logprobs or ids when asked for, calls, maybe
    its end."""

    index: int
    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: Finish | None = None
    calls: tuple[PlacedCall, ...] = ()
    ids: tuple[int, ...] = ()
    thought: str = ""

    @property
    def empty(self) -> bool:
        gained = self.text or self.scored or self.calls or self.ids or self.thought
        return not gained and self.finish is None

    @property
    def told(self) -> tuple["Delta", ...]:
        """As a stream tells it: clients look for the end of a choice behind its calls."""
        if not self.calls or self.finish is None:
            return (self,)
        return replace(self, finish=None), Delta(self.index, finish=self.finish)

    @property
    def unscored(self) -> "Delta":
        """Without its logprobs."""
        return replace(self, scored=()) if self.scored else self

    def plus(self, after: "Delta") -> "Delta":
        return Delta.joined((self, after))

    @classmethod
    def joined(cls, parts: Sequence["Delta"]) -> "Delta":
        """All gains of one choice as one; at least one part."""
        text = "".join(part.text for part in parts)
        scored = tuple(item for part in parts for item in part.scored)
        calls = _joined(item for part in parts for item in part.calls)
        ids = tuple(token for part in parts for token in part.ids)
        thought = "".join(part.thought for part in parts)
        finishes: list[Finish] = [part.finish for part in parts if part.finish is not None]
        finish = finishes[-1] if finishes else None
        return cls(parts[0].index, text, scored, finish, calls, ids, thought)


def _joined(parts: Iterable[PlacedCall]) -> tuple[PlacedCall, ...]:
    """As few as there are calls."""
    calls: dict[int, list[PlacedCall]] = {}
    for part in parts:
        calls.setdefault(part.index, []).append(part)
    return tuple(
        replace(one[0], arguments="".join(part.arguments for part in one)) for one in calls.values()
    )


class Choice:
    """Follows one engine request to its end."""

    def __init__(
        self,
        index: int,
        request: Request,
        text: TextStream,
        *,
        ids: bool,
        echo: Echo | None = None,
        thought: Thought | None = None,
    ) -> None:
        """ids: deltas have those of all tokens, of one that ends the text too. echo: the prompt,
        where it is part of the text. thought: takes the tokens that are no part of the text; None:
        all are."""
        self.index = index
        self.request = request
        self.generated = 0
        self.guessed = 0
        self.cached = 0
        self.finish: FinishReason | None = None
        self._text = text
        self._ids = ids
        self._thought = thought
        self._echo = echo
        self._prompt_scores: list[TokenLogprob] = []

    def take(self, event: TokenEvent) -> Delta:
        """Account for one event of this choice's request."""
        self._prompt_scores.extend(event.prompt_logprobs)
        self.cached = max(self.cached, event.cached_tokens)
        if self.finish is not None or (event.token is None and event.finish is None):
            return Delta(self.index)
        delta = Delta(self.index)
        self.guessed += event.guessed
        if event.token is not None:
            delta = self._take_token(event, event.token)
            if self._ids:
                delta = delta.plus(Delta(self.index, ids=(event.token,)))
        if event.finish is not None and self.finish is None:
            self.finish = event.finish
            thought = self._thought.finish() if self._thought is not None else ""
            end = Delta(self.index, self._text.finish(), finish=event.finish, thought=thought)
            delta = delta.plus(end)
        return delta

    @property
    def thought_tokens(self) -> int:
        """Of those generated."""
        return 0 if self._thought is None else self._thought.tokens

    def echoed(self) -> Iterator[Delta]:
        """The prompt, once, before the first delta that is not empty; in pieces where it has
        logprobs, for which it is work."""
        echo, self._echo = self._echo, None
        if echo is None:
            return
        deltas = echo.deltas
        if self.request.params.prompt_logprobs is None:
            yield Delta(self.index, "".join(delta.text for delta in deltas))
            return
        scores, self._prompt_scores = [None, *self._prompt_scores], []  # nothing before the first
        told = zip(self.request.prompt, scores, deltas, strict=True)
        while part := list(islice(told, PIECE)):
            scored = tuple(
                Scored(token, score and score.logprob, score.top if score else (), delta.offset)
                for token, score, delta in part
            )
            yield Delta(self.index, "".join(delta.text for *_, delta in part), scored)

    def _take_token(self, event: TokenEvent, token: int) -> Delta:
        self.generated += 1
        ends = event.finish == "stop" and token in self.request.params.stop_token_ids
        if ends:  # the token that ends a text is not part of it
            return Delta(self.index)
        thought = None if self._thought is None else self._thought.take(token)
        if thought is not None:
            scored = tuple(replace(one, of="thought") for one in self._scored(event, token, 0))
            return Delta(self.index, scored=scored, thought=thought)
        delta = self._text.feed(token)
        self.finish = "stop" if delta.stopped else None
        scored = self._scored(event, token, delta.offset)
        return Delta(self.index, delta.text, scored, self.finish)

    def _scored(self, event: TokenEvent, token: int, offset: int) -> tuple[Scored, ...]:
        score = event.logprob
        if score is None or self.request.params.logprobs is None:
            return ()
        return (Scored(token, score.logprob, score.top, offset),)
