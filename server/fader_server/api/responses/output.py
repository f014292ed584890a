"""What a response puts out: thoughts, words and calls as items, and the events that tell them.

Knows deltas and OpenAI's items; nothing about requests or HTTP.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fader_server.api.choice import Delta, Finish, PlacedCall, Scored
from fader_server.api.pieces import Json, encode, event, written

Scores = Callable[[Sequence[Scored]], list[Json]]
Status = Literal["in_progress", "completed", "incomplete"]


class Events:
    """Those of one stream, numbered."""

    def __init__(self, *, streamed: bool) -> None:
        self._streamed = streamed
        self._number = 0
        self._told: list[bytes] = []

    @property
    def begun(self) -> bool:
        return self._number > 0

    def tell(self, kind: str, fields: Json, **rest: Callable[[], bytes]) -> None:
        """One more. rest: fields that are written where somebody reads them."""
        if not self._streamed:
            return
        body = {"type": kind, "sequence_number": self._number, **fields}
        whole = {name: write() for name, write in rest.items()}
        self._number += 1
        self._told.append(event(written(body, **whole) if whole else encode(body), kind))

    def taken(self) -> bytes:
        """Those since this was asked."""
        told, self._told = self._told, []
        return b"".join(told)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How items of one type are told."""

    type: str
    prefix: str
    event: str
    """Of the text that grows."""
    key: str
    """Of the whole text, when it is."""
    part: str = ""
    """The type of its one part; empty: it has none."""


_THOUGHT = _Kind("reasoning", "rs", "response.reasoning_text", "text", "reasoning_text")
_MESSAGE = _Kind("message", "msg", "response.output_text", "text", "output_text")
_CALL = _Kind("function_call", "fc", "response.function_call_arguments", "arguments")


@dataclass(slots=True)
class _Item:
    """One that grows, until it ends."""

    kind: _Kind
    index: int
    own: Json
    """Fields beside its text."""
    call: int = -1
    """Of a call: which one."""
    id: str = ""
    texts: list[str] = field(default_factory=list)
    scores: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.id = f"{self.kind.prefix}_{secrets.token_hex(12)}"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def logprobs(self) -> bytes:
        return b"[%s]" % b",".join(self.scores)

    def part(self) -> bytes:
        fields = {"type": self.kind.part, "text": self.text}
        if self.kind is not _MESSAGE:
            return encode(fields)
        return written(fields | {"annotations": []}, logprobs=self.logprobs)

    def whole(self, status: Status) -> bytes:
        fields = {"id": self.id, "type": self.kind.type, **self.own}
        if not self.kind.part:
            return encode(fields | {"arguments": self.text, "status": status})
        content = b"[]" if status == "in_progress" else b"[%s]" % self.part()
        return written(fields | {"status": status}, content=content)


class Output:
    """The items of one answer."""

    def __init__(
        self, events: Events, scores: Scores | None, namespaces: Mapping[str, str]
    ) -> None:
        """scores: tokens with logprobs as JSON, where they are asked for. namespaces: of functions
        that are in one."""
        self.finish: Finish | None = None
        self._events = events
        self._scores = scores
        self._namespaces = namespaces
        self._ended: list[bytes] = []
        self._item: _Item | None = None
        self._kinds: set[_Kind] = set()
        self._gained: list[str] = []
        self._gained_scores: list[Json] = []
        self._unplaced: list[Scored] = []
        """Tokens that no text has come of so far."""

    @property
    def written(self) -> bytes:
        """All items that have ended, as a list."""
        return b"[%s]" % b",".join(self._ended)

    def add(self, delta: Delta) -> None:
        """What one token gave; where it ends the answer, that."""
        for one in delta.scored if self._scores is not None else ():
            if one.of == "call":
                self._unplaced = []
            if one.of == "text" or (one.of == "call" and delta.text):
                self._unplaced.append(one)
        if delta.thought:
            self._grow(self._of(_THOUGHT, {"summary": []}), delta.thought)
        new = [call for call in delta.calls if not self._goes_on(call)]
        if delta.text:
            self._say(delta.text)
        for call in new:
            if not self._goes_on(call):  # one token may begin a call and go on with it
                self._begin_call(call)
        if delta.finish is not None:
            self._end(delta.finish)

    def tell(self) -> None:
        """What the item under way gained since this was asked."""
        item, gained, scores = self._item, self._gained, self._gained_scores
        if item is None or not (gained or scores):
            return
        self._gained, self._gained_scores = [], []
        fields = self._place(item) | {"delta": "".join(gained)}
        if item.kind is _MESSAGE:
            fields["logprobs"] = scores
        self._events.tell(f"{item.kind.event}.delta", fields)

    def _goes_on(self, call: PlacedCall) -> bool:
        """Whether it is the call under way; then it has grown."""
        item = self._item
        if item is None or item.call != call.index:
            return False
        self._grow(item, call.arguments)
        return True

    def _begin_call(self, call: PlacedCall) -> None:
        own = {"call_id": call.id, "name": call.name}
        if call.name in self._namespaces:
            own["namespace"] = self._namespaces[call.name]
        self._grow(self._open(_CALL, own, call.index), call.arguments)

    def _say(self, text: str) -> None:
        if _MESSAGE in self._kinds and not (self._item and self._item.kind is _MESSAGE):
            text = text.removeprefix("\n")  # parts what it says in one text: here it is an item
        item = self._of(_MESSAGE, {"role": "assistant"})
        scored, self._unplaced = self._unplaced, []
        scores = self._scores(scored) if self._scores is not None and scored else []
        if scores:
            item.scores.append(encode(scores)[1:-1])
            self._gained_scores += scores
        self._grow(item, text)

    def _of(self, kind: _Kind, own: Json) -> _Item:
        """The item under way if it is of this kind, else a new one."""
        if self._item is not None and self._item.kind is kind:
            return self._item
        return self._open(kind, own)

    def _open(self, kind: _Kind, own: Json, call: int = -1) -> _Item:
        self._close("completed")
        self._item = item = _Item(kind, len(self._ended), own, call)
        self._kinds.add(kind)
        fields = {"output_index": item.index}
        self._events.tell(
            "response.output_item.added", fields, item=lambda: item.whole("in_progress")
        )
        if item.kind.part:
            self._events.tell("response.content_part.added", self._place(item), part=item.part)
        return item

    def _grow(self, item: _Item, text: str) -> None:
        if text:
            item.texts.append(text)
            self._gained.append(text)

    def _close(self, status: Status) -> None:
        """The item under way, if there is one."""
        self.tell()
        item, self._item = self._item, None
        if item is None:
            return
        self._ended.append(item.whole(status))
        place, tell = self._place(item), self._events.tell
        text = place | {item.kind.key: item.text}
        if item.kind is _MESSAGE:
            tell(f"{item.kind.event}.done", text, logprobs=lambda: item.logprobs)
        else:
            own = {"name": item.own["name"]} if item.kind is _CALL else {}
            tell(f"{item.kind.event}.done", text | own)
        if item.kind.part:
            tell("response.content_part.done", place, part=item.part)
        index = {"output_index": item.index}
        tell("response.output_item.done", index, item=lambda: item.whole(status))

    def _place(self, item: _Item) -> Json:
        place: Json = {"item_id": item.id, "output_index": item.index}
        return place | {"content_index": 0} if item.kind.part else place

    def _end(self, finish: Finish) -> None:
        cut = finish == "length"
        said = self._kinds - {_THOUGHT} if not cut else self._kinds
        if not said:
            self._of(_MESSAGE, {"role": "assistant"})
        if self._unplaced and self._item is not None and self._item.kind is _MESSAGE:
            self._say("")
        self._close("incomplete" if cut else "completed")
        self.finish = finish
