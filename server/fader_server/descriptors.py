"""File descriptors: as many as the connections need, and fewer connections where there are less.

Knows the process's limit and counts; nothing of HTTP.
"""

import asyncio
import logging
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_log = logging.getLogger(__name__)

ACCEPTS = 16
"""Connections taken in one turn of the event loop: the bound counts them a few turns later."""
MOST_REFUSED = 256
"""Connections over the bound that may be open, until their clients have heard it."""
_KEPT = 64 + 8 * ACCEPTS
"""For files of adapters and downloads, and for connections that are taken, or closed, but not yet
counted so."""
_TELL_SECONDS = 10.0
"""The log has a line of connections that cannot be taken no more often."""
_OUT = "socket.accept() out of system resource"
"""What asyncio says when a listener finds no descriptor."""


@dataclass(frozen=True, slots=True)
class Places:
    """How many connections may be open at a time, and how many more while they are refused."""

    connections: int
    refused: int


def places_in(limit: int, *, used: int, wanted: int) -> Places:
    """What fits in a limit of descriptors, of which `used` are open for other things."""
    free = max(0, limit - used)
    room = free - min(_KEPT, free // 2)
    refused = min(MOST_REFUSED, max(room - wanted, room // 8))
    return Places(max(1, min(wanted, room - refused)), refused)


def make_places(wanted: int) -> Places:
    """Raise the process's own limit as far as `wanted` connections need it and the system lets it;
    less is told."""
    used = _open_now()
    limit = _raise_limit(wanted + MOST_REFUSED + _KEPT + used)
    places = places_in(limit, used=used, wanted=wanted)
    if places.connections < wanted:
        fields = {
            "max_connections": wanted,
            "connections": places.connections,
            "open_files": limit,
        }
        _log.warning(
            "open files are limited (ulimit -n): fewer connections", extra={"fields": fields}
        )
    return places


def _raise_limit(needed: int) -> int:
    """The limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return needed
    wanted = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a sandbox, or a system with a bound of its own
        return soft
    return wanted


def _open_now() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return _KEPT


def told_seldom() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An event loop's exception handler that tells of a listener without descriptors now and then:
    asyncio would write a traceback for each try."""
    told_at = -_TELL_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told_at
        if context.get("message") != _OUT:
            loop.default_exception_handler(context)
        elif loop.time() >= told_at + _TELL_SECONDS:
            told_at = loop.time()
            fields = {"reason": str(context.get("exception"))}
            _log.warning("no connection can be taken for now", extra={"fields": fields})

    return handle
