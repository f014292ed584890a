"""Follows the adapter roots: a new folder loads, a changed one swaps, a removed one unloads.

Knows folders by their stamps and names by their versions; only names that came from a folder move.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from watchfiles import awatch

from fader_adapters.errors import (
    AdapterError,
    AdapterNotFound,
    ArenaFull,
    NameReserved,
    SourceForbidden,
    SourceUnavailable,
    VersionConflict,
)
from fader_adapters.roots import Found
from fader_server.api.adapter_ports import AdapterInfo, Loaded, LoadOrder
from fader_server.api.blends import AdapterRef

_log = logging.getLogger(__name__)

QUIET_MS = 300
"""A root is looked at when nothing changed in it for this long."""
BUSY_MS = 2000
"""And at the latest after this."""
ANYWAY_SECONDS = 30.0
"""And when nothing was told for this long: not every file system tells."""
GONE_SECONDS = 1.0
"""A folder that vanished is looked for once more after this: it may be on its way back."""
BLIND_SECONDS = 5.0
"""Between two looks when the system refuses to tell of changes."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A folder as it was when it was last loaded, or last failed to."""

    stamp: tuple[int, ...]
    version: str
    """What its name was moved to; empty: it could not be loaded."""


class Names(Protocol):
    """The part of the registry that moves names."""

    async def load(self, order: LoadOrder) -> Loaded: ...
    def unload(self, name: str) -> None: ...
    def get(self, ref: AdapterRef) -> AdapterInfo: ...


class Folders(Protocol):
    """The part of the sources that knows the roots."""

    def discover(self) -> list[Found]: ...
    def holds(self, reference: str) -> bool: ...


class Watcher:
    """Keeps names and folders in step. Belongs to the event loop; disks are read on threads."""

    def __init__(
        self,
        names: Names,
        folders: Folders,
        *,
        seen: Mapping[str, Seen],
        reserved: Collection[str],
        gone_seconds: float = GONE_SECONDS,
    ) -> None:
        """`seen`: folders loaded before; `reserved`: names that no folder may have."""
        self._names = names
        self._folders = folders
        self._seen = dict(seen)
        self._reserved = frozenset(reserved)
        self._gone_seconds = gone_seconds

    async def run(self, changes: Callable[[], AsyncIterator[object]]) -> None:
        """Look now and after each change, until cancelled."""
        while True:
            try:
                await self.look()
                async for _ in changes():
                    await self.look()
            except (OSError, RuntimeError) as error:  # RuntimeError: watchfiles' own
                fields = {"reason": str(error)}
                _log.warning("the adapter roots cannot be watched", extra={"fields": fields})
            await asyncio.sleep(BLIND_SECONDS)

    async def look(self) -> None:
        """Compare the roots with what was seen, and load, swap and unload what differs."""
        found = await self._discover()
        if found is None:
            return
        for folder in found:
            try:
                await self._follow(folder)
            except Exception:  # noqa: BLE001 - one folder ends no watching of all
                self._remember(folder)
                fields = {"adapter": folder.name}
                _log.exception("a folder could not be followed", extra={"fields": fields})
        gone = await self._gone({folder.name for folder in found})
        if gone:
            await asyncio.sleep(self._gone_seconds)
            for name in await self._gone(set(self._seen) - gone):
                self._drop(name)

    async def _discover(self) -> list[Found] | None:
        try:
            return await asyncio.to_thread(self._folders.discover)
        except OSError as error:  # a root that cannot be read says nothing about its folders
            fields = {"reason": error.strerror}
            _log.warning("an adapter root cannot be listed", extra={"fields": fields})
            return None

    async def _follow(self, folder: Found) -> None:
        seen = self._seen.get(folder.name)
        if not folder.complete or folder.name in self._reserved:
            return
        if seen is not None and seen.stamp == folder.stamp:
            return
        info = self._info(folder.name)
        current = info.version if info else ""
        if seen is None and info is not None and info.source != folder.reference:
            return  # the name came from elsewhere
        if seen is not None and current != seen.version:
            return  # an administrator moved or unloaded it: it is theirs until the folder goes
        order = LoadOrder(
            folder.name,
            folder.reference,
            if_version=current,
            pin=info.pinned if info else False,
        )
        try:
            loaded = await self._names.load(order)
        except (VersionConflict, ArenaFull, NameReserved, SourceUnavailable) as error:
            self._tell("adapter not loaded yet", folder.name, reason=str(error))
            return  # the next look tries again
        except AdapterError as error:
            self._remember(folder)
            self._tell("adapter not loaded from its folder", folder.name, reason=str(error))
            return
        version = loaded.info.version
        self._seen[folder.name] = Seen(folder.stamp, version)
        if version != current:
            _log.info(
                "adapter loaded from its folder",
                extra={"fields": {"adapter": folder.name, "version": version}},
            )

    def _remember(self, folder: Found) -> None:
        """These files are not tried again: the name stays at what it means now."""
        info = self._info(folder.name)
        self._seen[folder.name] = Seen(folder.stamp, info.version if info else "")

    async def _gone(self, here: set[str]) -> set[str]:
        """Names seen before that are not `here`, and whose folder does not stand any more."""
        gone: set[str] = set()
        for name in self._seen.keys() - here:
            try:
                if await asyncio.to_thread(self._folders.holds, name):
                    continue
            except SourceUnavailable:
                continue  # a disk that fails says nothing about its folders
            except SourceForbidden:
                pass  # something else stands there now
            gone.add(name)
        return gone

    def _drop(self, name: str) -> None:
        seen = self._seen.pop(name)
        info = self._info(name)
        if info is None or info.version != seen.version:
            return
        self._names.unload(name)
        _log.info("adapter unloaded with its folder", extra={"fields": {"adapter": name}})

    def _info(self, name: str) -> AdapterInfo | None:
        try:
            return self._names.get(AdapterRef(name))
        except AdapterNotFound:
            return None

    def _tell(self, event: str, name: str, *, reason: str) -> None:
        _log.warning(event, extra={"fields": {"adapter": name, "reason": reason}})


def changes_in(roots: Sequence[Path]) -> Callable[[], AsyncIterator[object]]:
    """What `run` takes: something for each burst of changes under the roots, when it is over."""

    def changes() -> AsyncIterator[object]:
        return awatch(
            *roots,
            watch_filter=None,
            debounce=BUSY_MS,
            step=QUIET_MS,
            rust_timeout=int(ANYWAY_SECONDS * 1000),
            yield_on_timeout=True,
        )

    return changes
