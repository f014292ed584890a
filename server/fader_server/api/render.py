"""OpenAI's answer bodies from deltas: completions and chat, whole and in chunks.

What is streamed comes as framed events. Knows nothing about HTTP.
"""

from collections.abc import Iterable, Sequence

from fader_server.api.answers import (
    FLOOR,
    Gathered,
    Head,
    TokenNames,
    Told,
    clamp,
    token_scores,
    usage_body,
)
from fader_server.api.choice import Delta, PlacedCall, Scored
from fader_server.api.generate import Usage
from fader_server.api.pieces import Json, encode, event, written

DONE = b"data: [DONE]\n\n"


class CompletionRenderer:
    """text_completion; `logprobs` is null unless asked for."""

    last = DONE

    def __init__(self, head: Head, names: TokenNames, told: Told) -> None:
        self._head = head
        self._names = names
        self._told = told

    def gather(self, gathered: Gathered, delta: Delta) -> None:
        gathered.parts.append(delta.unscored)
        if self._told.logprobs:
            gathered.scores.add(self._scores(delta.scored))

    def whole(self, choices: Sequence[Gathered], usage: Usage) -> bytes:
        return _whole(self._head.fields("text_completion"), map(self._whole, choices), usage)

    def _whole(self, gathered: Gathered) -> bytes:
        delta = gathered.delta
        said = self._said(delta) | self._told.prompt(delta.index)
        scores = gathered.scores.written() if self._told.logprobs else b"null"
        return written(said, logprobs=scores)

    def opening(self, choices: int, usage: Usage | None) -> bytes:
        if self._told.prompts is None:
            return b""
        empty = [Delta(index) for index in range(choices)]
        prompt = self._told.prompt
        return b"".join(self._chunk(self._choice(d) | prompt(d.index), usage) for d in empty)

    def chunks(self, batch: Sequence[Delta], usage: Usage | None) -> bytes:
        parts = (part for delta in batch for part in delta.told)
        return b"".join(self._chunk(self._choice(part), usage) for part in parts)

    def _chunk(self, choice: Json, usage: Usage | None) -> bytes:
        return _event(self._head.body("text_completion", [choice]) | self._told.usage(usage))

    def closing(self, usage: Usage) -> bytes:
        return _usage_chunk(self._head.body("text_completion", []), usage, self._told)

    def failure(self, error: Json) -> bytes:
        return _event({"error": error})

    def _choice(self, delta: Delta) -> Json:
        scores = self._scores(delta.scored) if self._told.logprobs else None
        return self._said(delta) | {"logprobs": scores}

    def _said(self, delta: Delta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "finish_reason": delta.finish,
            **self._told.ids(delta),
        }

    def _scores(self, scored: Sequence[Scored]) -> Json:
        text = self._names.token_text
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
            text = self._names.token_text(token)
            top[text] = max(logprob, top.get(text, logprob))
        return {text: max(logprob, FLOOR) for text, logprob in top.items()}


class ChatRenderer:
    """chat.completion and chat.completion.chunk."""

    last = DONE

    def __init__(self, head: Head, names: TokenNames, told: Told) -> None:
        self._head = head
        self._names = names
        self._told = told

    def gather(self, gathered: Gathered, delta: Delta) -> None:
        gathered.parts.append(delta.unscored)
        if self._told.logprobs:
            gathered.scores.add({"content": self._tokens(delta.scored)})

    def whole(self, choices: Sequence[Gathered], usage: Usage) -> bytes:
        fields = self._head.fields("chat.completion") | self._told.prompt(0)
        return _whole(fields, map(self._whole, choices), usage)

    def _whole(self, gathered: Gathered) -> bytes:
        delta = gathered.delta
        said = {
            "index": delta.index,
            "message": self._message(delta),
            "finish_reason": delta.finish,
            **self._told.ids(delta),
        }
        scores = gathered.scores.written(refusal=b"null") if self._told.logprobs else b"null"
        return written(said, logprobs=scores)

    def opening(self, choices: int, usage: Usage | None) -> bytes:
        role = {"role": "assistant", "content": None if self._told.calls_alone else ""}
        return b"".join(
            self._chunk(self._choice(at, role, None, None), usage, self._told.prompt(at))
            for at in range(choices)
        )

    def chunks(self, batch: Sequence[Delta], usage: Usage | None) -> bytes:
        parts = (part for delta in batch for part in delta.told)
        return b"".join(self._part(part, usage) for part in parts)

    def _part(self, delta: Delta, usage: Usage | None) -> bytes:
        content: Json = {"reasoning_content": delta.thought} if delta.thought else {}
        if delta.text:
            content["content"] = delta.text
        if delta.calls:
            content["tool_calls"] = [{"index": call.index, **_call(call)} for call in delta.calls]
        choice = self._choice(delta.index, content, self._scores(delta.scored), delta.finish)
        return self._chunk(choice | self._told.ids(delta), usage)

    def closing(self, usage: Usage) -> bytes:
        return _usage_chunk(self._head.body("chat.completion.chunk", []), usage, self._told)

    def failure(self, error: Json) -> bytes:
        return _event({"error": error})

    def _message(self, delta: Delta) -> Json:
        message: Json = {"role": "assistant", "content": delta.text, "refusal": None}
        if delta.thought:
            message["reasoning_content"] = delta.thought
        if not delta.calls:
            return message
        calls = [_call(call) for call in delta.calls]
        return {**message, "content": delta.text or None, "tool_calls": calls}

    def _chunk(self, choice: Json, usage: Usage | None, prompt: Json | None = None) -> bytes:
        body = self._head.body("chat.completion.chunk", [choice]) | self._told.usage(usage)
        return _event(body | (prompt or {}))

    def _choice(self, index: int, delta: Json, logprobs: Json | None, finish: str | None) -> Json:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _scores(self, scored: Sequence[Scored]) -> Json | None:
        return {"content": self._tokens(scored), "refusal": None} if self._told.logprobs else None

    def _tokens(self, scored: Sequence[Scored]) -> list[Json]:
        return token_scores(self._names, scored)


def _event(body: Json) -> bytes:
    return event(encode(body))


def _usage_chunk(body: Json, usage: Usage, told: Told) -> bytes:
    return _event({**body, "usage": usage_body(usage)}) if told.include_usage else b""


def _whole(fields: Json, choices: Iterable[bytes], usage: Usage) -> bytes:
    return written(fields, choices=b"[%s]" % b",".join(choices), usage=encode(usage_body(usage)))


def _call(placed: PlacedCall) -> Json:
    if not placed.id:
        return {"function": {"arguments": placed.arguments}}
    function = {"name": placed.name, "arguments": placed.arguments}
    return {"id": placed.id, "type": "function", "function": function}
