"""JSON written piece by piece: a long answer's logprobs are work that others need not wait for.

Knows JSON, and how an event of a stream frames it, alone.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]


def encode(value: object) -> bytes:
    """Compact JSON; strict, so that a NaN is our fault and not the client's surprise."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def event(body: bytes, name: str = "") -> bytes:
    """One server-sent event. JSON escapes newlines, so one line is always enough."""
    head = b"event: %s\n" % name.encode() if name else b""
    return b"%sdata: %s\n\n" % (head, body)


def written(fields: Json, **rest: bytes) -> bytes:
    """An object of these fields and of others that are written already; one at least of each."""
    return b"%s,%s}" % (encode(fields)[:-1], _pairs(rest))


def _pairs(values: Mapping[str, bytes]) -> bytes:
    return b",".join(b'"%s":%s' % (name.encode(), value) for name, value in values.items())


class Columns:
    """An object of lists that grow."""

    def __init__(self) -> None:
        self._written: dict[str, list[bytes]] = {}

    def add(self, lists: Mapping[str, Sequence[object]]) -> None:
        """Behind what the lists of these names have."""
        for name, items in lists.items():
            pieces = self._written.setdefault(name, [])
            if items:
                pieces.append(encode(items)[1:-1])

    def written(self, **rest: bytes) -> bytes:
        """The object, with other fields that are written already."""
        lists = {name: b"[%s]" % b",".join(pieces) for name, pieces in self._written.items()}
        return b"{%s}" % _pairs(lists | rest)
