"""Which trace a request is part of (W3C Trace Context), and who takes spans of requests."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_PARENT = re.compile(
    rb"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})"
    rb"-(?!0{16})(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})(?P<more>-.*)?"
)
_MOST_STATE = 512
"""Bytes of tracestate; a longer one is not passed on."""


@dataclass(frozen=True, slots=True)
class Parent:
    """The caller's span, which the request belongs under."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""
    flags: int
    state: str = ""
    """tracestate as it came."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that is over."""

    began: int
    """Nanoseconds since the epoch, as `ended`."""
    ended: int
    fields: Mapping[str, Any]
    """What its log line says."""


class Spans(Protocol):
    """Takes the spans of requests."""

    def add(self, answered: Answered, parent: Parent | None) -> tuple[str, str] | None:
        """The ids of its trace and its span, in hexadecimal; None: it has none. Never waits."""
        ...


def parent_of(headers: Iterable[tuple[bytes, bytes]]) -> Parent | None:
    """What `traceparent` says, in any version; None where it is absent, twice there, or wrong."""
    given = [value.strip() for name, value in headers if name == b"traceparent"]
    found = _PARENT.fullmatch(given[0]) if len(given) == 1 else None
    if found is None or (found["version"] == b"00" and found["more"]):
        return None
    state = b",".join(value for name, value in headers if name == b"tracestate")
    return Parent(
        found["trace"].decode(),
        found["span"].decode(),
        int(found["flags"], 16),
        state.decode("latin-1") if len(state) <= _MOST_STATE else "",
    )
