"""One choice that may call tools: what Choice does, and its calls with their ids."""

import secrets
import string
from dataclasses import replace

from fader_server.api.choice import Choice, Delta, PlacedCall
from fader_server.api.ports import Thought, ToolStream
from fader_server.core import Request, TokenEvent
from fader_server.text.tools import CallPart

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
        parts = self._calls.taken()
        calls = tuple(self._placed(part) for part in parts if part.name or part.arguments)
        if parts and delta.scored:
            delta = replace(delta, scored=tuple(replace(one, of="call") for one in delta.scored))
        finish = "tool_calls" if self._made and delta.finish == "stop" else delta.finish
        return replace(delta, calls=calls, finish=finish)

    def _placed(self, part: CallPart) -> PlacedCall:
        self._made += bool(part.name)
        id = _id() if part.name else ""
        return PlacedCall(self._made - 1, id, part.name, part.arguments)


def _id() -> str:
    return "".join(secrets.choice(_ID) for _ in range(_LENGTH))
