"""OpenAI's answer bodies from deltas: completions and chat, whole and in chunks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fader_server.api.choice import Delta, PlacedCall, Scored
from fader_server.api.generate import Usage
from fader_server.api.ports import Tokenizer

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    def body(self, kind: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class Renderer(Protocol):
    """One of the two wire formats."""

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        """The answer to a call without stream; one delta per choice, in order."""
        ...

    def opening(self, choices: int) -> list[Json]:
        """Chunks before the first delta."""
        ...

    def chunk(self, delta: Delta) -> Json: ...

    def usage_chunk(self, usage: Usage) -> Json: ...


class CompletionRenderer:
    """text_completion; `logprobs` is null unless asked for."""

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        body = self._head.body("text_completion", [self._choice(delta) for delta in deltas])
        return {**body, "usage": usage_body(usage)}

    def opening(self, choices: int) -> list[Json]:
        return []

    def chunk(self, delta: Delta) -> Json:
        body = self._head.body("text_completion", [self._choice(delta)])
        return {**body, "usage": None} if self._include_usage else body

    def usage_chunk(self, usage: Usage) -> Json:
        return {**self._head.body("text_completion", []), "usage": usage_body(usage)}

    def _choice(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._scores(delta.scored) if self._logprobs else None,
            "finish_reason": delta.finish,
        }

    def _scores(self, scored: Sequence[Scored]) -> Json:
        text = self._tokenizer.token_text
        return {
            "tokens": [text(item.token) for item in scored],
            "token_logprobs": [clamp(item.logprob) for item in scored],
            "top_logprobs": [self._top(item) for item in scored],
            "text_offset": [item.offset for item in scored],
        }

    def _top(self, item: Scored) -> dict[str, float] | None:
        """Keyed by text: of two tokens with one text the likelier stays, the chosen one always."""
        if item.logprob is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*item.top, (item.token, item.logprob)):
            text = self._tokenizer.token_text(token)
            top[text] = max(logprob, top.get(text, logprob))
        return {text: max(logprob, _FLOOR) for text, logprob in top.items()}


class ChatRenderer:
    """chat.completion and chat.completion.chunk."""

    def __init__(
        self, head: Head, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool
    ) -> None:
        self._head = head
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._include_usage = include_usage

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Json:
        choices = [
            {
                "index": delta.index,
                "message": self._message(delta),
                "logprobs": self._scores(delta.scored),
                "finish_reason": delta.finish,
            }
            for delta in deltas
        ]
        return {**self._head.body("chat.completion", choices), "usage": usage_body(usage)}

    def opening(self, choices: int) -> list[Json]:
        role = {"role": "assistant", "content": ""}
        return [self._chunk(self._choice(index, role, None, None)) for index in range(choices)]

    def chunk(self, delta: Delta) -> Json:
        content: Json = {"content": delta.text} if delta.text else {}
        if delta.calls:
            content["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.calls]
        return self._chunk(
            self._choice(delta.index, content, self._scores(delta.scored), delta.finish)
        )

    def usage_chunk(self, usage: Usage) -> Json:
        return {**self._head.body("chat.completion.chunk", []), "usage": usage_body(usage)}

    def _message(self, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        if not delta.calls:
            return message
        calls = [_call(call) for call in delta.calls]
        return {**message, "content": delta.text or None, "tool_calls": calls}

    def _chunk(self, choice: Json) -> Json:
        body = self._head.body("chat.completion.chunk", [choice])
        return {**body, "usage": None} if self._include_usage else body

    def _choice(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _scores(self, scored: Sequence[Scored]) -> Json | None:
        if not self._logprobs:
            return None
        content = [
            {
                **self._token(item.token, item.logprob or 0.0),
                "top_logprobs": [self._token(*pair) for pair in item.top],
            }
            for item in scored
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": max(logprob, _FLOOR),
            "bytes": None if data is None else list(data),
        }


_FLOOR = -9999.0
"""OpenAI's stand-in for a token that cannot be: JSON has no -Infinity."""


def _call(placed: PlacedCall) -> Json:
    function = {"name": placed.call.name, "arguments": placed.call.arguments}
    return {"id": placed.id, "type": "function", "function": function}


def clamp(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _FLOOR)


def usage_body(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


def encode(body: Json) -> bytes:
    """Compact JSON; strict, so that a NaN is our fault and not the client's surprise."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
