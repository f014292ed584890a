"""An answer of /v1/responses: the object, and the events of its stream.

Knows the frame around the items; what they are is `output`'s business.
"""

import time
from collections.abc import Sequence

from fader_server.api.answers import Gathered, Head, TokenNames, Told, token_scores
from fader_server.api.choice import Delta, Scored
from fader_server.api.generate import Usage
from fader_server.api.pieces import Json, written
from fader_server.api.responses.asked import Asked
from fader_server.api.responses.output import Events, Output


class ResponseRenderer:
    """Of one choice; every event is numbered and has its name."""

    last = b""

    def __init__(self, head: Head, names: TokenNames, told: Told, asked: Asked) -> None:
        self._head = head
        self._names = names
        self._asked = asked
        self._events = Events(streamed=asked.streamed)
        scores = self._scores if told.logprobs else None
        self._output = Output(self._events, scores, asked.namespaces)

    def gather(self, gathered: Gathered, delta: Delta) -> None:
        """The items keep what there is."""
        self._output.add(delta)

    def whole(self, choices: Sequence[Gathered], usage: Usage) -> bytes:
        return self._ended(usage)

    def opening(self, choices: int, usage: Usage | None) -> bytes:
        for kind in ("response.created", "response.in_progress"):
            self._events.tell(kind, {}, response=lambda: self._response("in_progress"))
        return self._events.taken()

    def chunks(self, batch: Sequence[Delta], usage: Usage | None) -> bytes:
        for delta in batch:
            self._output.add(delta)
        self._output.tell()
        return self._events.taken()

    def closing(self, usage: Usage) -> bytes:
        kind = "incomplete" if self._output.finish == "length" else "completed"
        self._events.tell(f"response.{kind}", {}, response=lambda: self._ended(usage))
        return self._events.taken()

    def failure(self, error: Json) -> bytes:
        """OpenAI's event has the error inside, its client's type beside: both are told."""
        told = b"" if self._events.begun else self.opening(1, None)
        beside = {name: error[name] for name in ("code", "message", "param")}
        self._events.tell("error", {**beside, "error": error})
        failed = {"code": "server_error", "message": error["message"]}
        self._events.tell(
            "response.failed", {}, response=lambda: self._response("failed", error=failed)
        )
        return told + self._events.taken()

    def _ended(self, usage: Usage) -> bytes:
        if self._output.finish == "length":
            why = {"reason": "max_output_tokens"}
            return self._response("incomplete", why=why, usage=_usage(usage))
        return self._response("completed", usage=_usage(usage))

    def _response(
        self,
        status: str,
        *,
        why: Json | None = None,
        error: Json | None = None,
        usage: Json | None = None,
    ) -> bytes:
        head = self._head
        fields = {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
            "status": status,
            "error": error,
            "incomplete_details": why,
            "usage": usage,
        }
        return written(fields, output=self._output.written, **self._asked.repeats)

    def _scores(self, scored: Sequence[Scored]) -> list[Json]:
        return token_scores(self._names, scored, none=[])


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.thought},
        "total_tokens": usage.prompt + usage.completion,
    }
