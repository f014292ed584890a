"""One choice that may call tools: what Choice does, and its calls with their ids."""

import secrets
import string
from dataclasses import replace

from fader_server.api.choice import Choice, Delta, PlacedCall
from fader_server.api.ports import Thought, ToolStream
from fader_server.core import Request, TokenEvent

_ID = string.ascii_letters + string.digits
_LENGTH = 9
"""Some chat templates, Mistral's, take no ids but of nine letters and digits; all take those."""


class CallingChoice(Choice):
    """Ends with `tool_calls` where a choice without tools would with `stop`, once it called one."""

    def __init__(
        self,
        index: int,
        request: Request,
        text: ToolStream,
        *,
        ids: bool,
        thought: Thought | None = None,
    ) -> None:
        super().__init__(index, request, text, ids=ids, thought=thought)
        self._calls = text
        self._made = 0

    def take(self, event: TokenEvent) -> Delta:
        delta = super().take(event)
        calls = [
            PlacedCall(at, _id(), call) for at, call in enumerate(self._calls.taken(), self._made)
        ]
        self._made += len(calls)
        finish = "tool_calls" if self._made and delta.finish == "stop" else delta.finish
        return replace(delta, calls=tuple(calls), finish=finish)


def _id() -> str:
    return "".join(secrets.choice(_ID) for _ in range(_LENGTH))
