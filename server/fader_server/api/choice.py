"""One choice of a call: its tokens become text, logprobs and an end. Knows nothing about HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

from fader_server.api.ports import Tokenizer
from fader_server.core import FinishReason, Request, TokenEvent, TokenLogprob


@dataclass(frozen=True, slots=True)
class Scored:
    """One token with its logprob; `logprob` is None for the first token of an echoed prompt."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int
    """Characters of the returned text before it."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What a choice gained: text, tokens with logprobs when asked for, maybe its end."""

    index: int
    text: str = ""
    scored: tuple[Scored, ...] = ()
    finish: FinishReason | None = None

    @property
    def empty(self) -> bool:
        return not self.text and not self.scored and self.finish is None

    def plus(self, after: "Delta") -> "Delta":
        return Delta(
            self.index,
            self.text + after.text,
            self.scored + after.scored,
            after.finish or self.finish,
        )

    @classmethod
    def joined(cls, parts: Sequence["Delta"]) -> "Delta":
        """All gains of one choice as one; at least one part."""
        text = "".join(part.text for part in parts)
        scored = tuple(item for part in parts for item in part.scored)
        return cls(parts[0].index, text, scored, parts[-1].finish)


class Choice:
    """Follows one engine request to its end."""

    def __init__(
        self,
        index: int,
        request: Request,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...],
        echo: str | None,
    ) -> None:
        """`echo`: the prompt's text when it is returned."""
        self.index = index
        self.request = request
        self.generated = 0
        self.cached = 0
        self.finish: FinishReason | None = None
        self._tokenizer = tokenizer
        self._text = tokenizer.stream(stop)
        self._echo = echo
        self._chars = 0
        self._prompt_scores: list[TokenLogprob] = []

    def take(self, event: TokenEvent) -> Delta:
        """Account for one event of this choice's request."""
        self._prompt_scores.extend(event.prompt_logprobs)
        self.cached = max(self.cached, event.cached_tokens)
        if self.finish is not None or (event.token is None and event.finish is None):
            return Delta(self.index)
        delta = self._take_echo()
        if event.token is not None:
            delta = delta.plus(self._take_token(event, event.token))
        if event.finish is not None and self.finish is None:
            self.finish = event.finish
            delta = delta.plus(self._gain(self._text.flush()))
        return delta

    def _gain(self, text: str, scored: tuple[Scored, ...] = ()) -> Delta:
        self._chars += len(text)
        return Delta(self.index, text, scored, self.finish)

    def _take_echo(self) -> Delta:
        if self._echo is None:
            return Delta(self.index)
        text, self._echo = self._echo, None
        wanted = self.request.params.prompt_logprobs is not None
        return self._gain(text, self._score_prompt() if wanted else ())

    def _score_prompt(self) -> tuple[Scored, ...]:
        scores = [None, *self._prompt_scores]
        positions = self._tokenizer.stream(())
        scored: list[Scored] = []
        chars = 0
        for token, score in zip(self.request.prompt, scores, strict=True):
            logprob, top = (score.logprob, score.top) if score else (None, ())
            scored.append(Scored(token, logprob, top, chars))
            chars += len(positions.push(token))
        return tuple(scored)

    def _take_token(self, event: TokenEvent, token: int) -> Delta:
        self.generated += 1
        scored: tuple[Scored, ...] = ()
        if event.logprob is not None and self.request.params.logprobs is not None:
            scored = (Scored(token, event.logprob.logprob, event.logprob.top, self._chars),)
        ends = event.finish == "stop" and token in self.request.params.stop_token_ids
        text = "" if ends else self._text.push(token)
        if self._text.stopped:
            self.finish = "stop"
        return self._gain(text, scored)
