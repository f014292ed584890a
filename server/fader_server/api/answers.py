"""What every answer has, whatever its wire format: a head, a usage, tokens with logprobs; and what
a format must know to tell one. Knows no format.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fader_server.api.choice import Delta, Scored
from fader_server.api.generate import Usage
from fader_server.api.pieces import Columns, Json


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    def body(self, kind: str, choices: list[Json]) -> Json:
        return self.fields(kind) | {"choices": choices}

    def fields(self, kind: str) -> Json:
        """Without the choices."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Told:
    """What an answer says beside its words."""

    logprobs: bool
    include_usage: bool
    """In a stream."""
    prompts: Sequence[Sequence[int]] | None
    """The tokens that each choice goes on from, where ids of tokens are told; as vLLM tells them:
    a completion's choice has `prompt_token_ids`, a chat as a whole, a stream's first chunks."""
    calls_alone: bool = False
    """The answer is calls of tools and has no content."""

    def ids(self, delta: Delta) -> Json:
        """Fields of a choice."""
        return {} if self.prompts is None else {"token_ids": list(delta.ids)}

    def usage(self, so_far: Usage | None) -> Json:
        """Fields of a stream's chunk that has a choice; None: it does not tell the usage so far."""
        if so_far is not None:
            return {"usage": usage_body(so_far)}
        return {"usage": None} if self.include_usage else {}

    def prompt(self, index: int) -> Json:
        """Fields that tell the prompt of a choice."""
        return {} if self.prompts is None else {"prompt_token_ids": list(self.prompts[index])}


@dataclass(slots=True)
class Gathered:
    """A choice of an answer without stream, as it comes."""

    parts: list[Delta] = field(default_factory=list)
    """Without logprobs."""
    scores: Columns = field(default_factory=Columns)

    @property
    def delta(self) -> Delta:
        """All of it as one."""
        return Delta.joined(self.parts)


class TokenNames(Protocol):
    """What tokens are called where their logprobs are told."""

    def token_text(self, token: int) -> str: ...

    def token_bytes(self, token: int) -> bytes | None: ...


class ById:
    """Tokens called by their ids, as vLLM calls them: no two have one name."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names

    def token_text(self, token: int) -> str:
        return f"token_id:{token}"

    def token_bytes(self, token: int) -> bytes | None:
        return self._names.token_bytes(token)


class Renderer(Protocol):
    """One of the wire formats."""

    @property
    def last(self) -> bytes:
        """What a stream ends with, however it went."""
        ...

    def gather(self, gathered: Gathered, delta: Delta) -> None:
        """Add to a choice of an answer without stream."""
        ...

    def whole(self, choices: Sequence[Gathered], usage: Usage) -> bytes:
        """That answer; the choices in order."""
        ...

    def opening(self, choices: int, usage: Usage | None) -> bytes:
        """Events before the first delta. usage: so far, if they are to tell it."""
        ...

    def chunks(self, batch: Sequence[Delta], usage: Usage | None) -> bytes: ...

    def closing(self, usage: Usage) -> bytes:
        """Events after the last delta."""
        ...

    def failure(self, error: Json) -> bytes:
        """Events after whatever was told, when nothing more comes."""
        ...


FLOOR = -9999.0
"""OpenAI's stand-in for a token that cannot be: JSON has no -Infinity."""


def token_scores(
    names: TokenNames, scored: Sequence[Scored], *, none: list[int] | None = None
) -> list[Json]:
    """Tokens with their logprobs and those of the likeliest. none: `bytes` of one without any."""

    def told(token: int, logprob: float) -> Json:
        data = names.token_bytes(token)
        return {
            "token": names.token_text(token),
            "logprob": max(logprob, FLOOR),
            "bytes": none if data is None else list(data),
        }

    return [
        {
            **told(item.token, item.logprob or 0.0),
            "top_logprobs": [told(*pair) for pair in item.top],
        }
        for item in scored
    ]


def clamp(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, FLOOR)


def usage_body(usage: Usage) -> Json:
    details: Json = {"reasoning_tokens": usage.thought} if usage.thought else {}
    if usage.foretold:
        came = min(usage.guessed, usage.foretold)
        details["accepted_prediction_tokens"] = came
        details["rejected_prediction_tokens"] = usage.foretold - came
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        **({"completion_tokens_details": details} if details else {}),
    }
