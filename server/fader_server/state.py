"""What administrators asked for at run time, kept over restarts in one file of --state-dir.

Knows names, sources and versions; what an adapter is, and where it lives, is not its business.
"""

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fader_adapters.claims import Claims
from fader_adapters.errors import AdapterError, AdapterNotFound
from fader_server.api.blends import AdapterRef, NamedTerm
from fader_server.api.ports import (
    AdapterInfo,
    Adapters,
    AdapterTotals,
    Lease,
    Loaded,
    LoadOrder,
)
from fader_server.errors import ConfigInvalid

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One adapter that shall be there; its version, so that a changed source is noticed."""

    source: str
    revision: str | None
    version: str
    pin: bool


Entries = Mapping[str, Wanted | None]
"""None: the name was unloaded, though the command line or a root may offer it."""


class StateFile:
    """adapters.json: replaced as a whole, so that a crash leaves the old list or the new one."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigInvalid when the directory cannot be made."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigInvalid(f"--state-dir {directory}: {error.strerror}") from None
        self._path = directory / "adapters.json"

    def read(self) -> dict[str, Wanted | None]:
        """Empty when there is no file. Raises ConfigInvalid when it is damaged."""
        try:
            stored = json.loads(self._path.read_bytes())
            if stored["sha256"] != _hash(stored["adapters"]):
                raise ValueError("its content does not match its hash")
            return {
                name: None if entry is None else Wanted(**entry)
                for name, entry in stored["adapters"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigInvalid(
                f"{self._path} is damaged ({type(error).__name__}); mend it or remove it"
            ) from None

    def write(self, entries: Entries) -> None:
        """Durable when this returns. Raises OSError, and then the old file stands."""
        adapters = {name: wanted and asdict(wanted) for name, wanted in sorted(entries.items())}
        stored = {"format": 1, "sha256": _hash(adapters), "adapters": adapters}
        scratch = self._path.with_suffix(".new")
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(stored, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _hash(adapters: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(adapters, sort_keys=True).encode()).hexdigest()


class RememberedAdapters:
    """Adapters whose run-time changes are written down. A load answers once it is on disk."""

    def __init__(self, inner: Adapters, file: StateFile, entries: Entries) -> None:
        self._inner = inner
        self._file = file
        self._entries = dict(entries)
        self._offered = {info.name for info in inner.list()}  # by flags and folders, at every start
        self._writer = ThreadPoolExecutor(1, "fader-state")  # one: writes keep their order

    async def restore(self) -> None:
        """Bring back what was asked for before; what cannot be is reported and skipped."""
        for name, wanted in self._entries.items():
            try:
                if wanted is None:
                    self._inner.unload(name)
                else:
                    await self._inner.load(_order(name, wanted))
            except AdapterNotFound:
                continue  # unloaded, and nothing offers it any more
            except AdapterError as error:
                fields = {"adapter": name, "reason": str(error)}
                _log.warning("adapter not restored", extra={"fields": fields})

    async def load(self, order: LoadOrder) -> Loaded:
        loaded = await self._inner.load(order)
        revision = loaded.info.revision or order.revision  # a branch moves, a commit does not
        wanted = Wanted(order.source, revision, loaded.info.version, order.pin)
        await asyncio.wrap_future(self._remember(order.name, wanted))
        return loaded

    def unload(self, name: str) -> None:
        source = self._inner.get(AdapterRef(name)).source
        self._inner.unload(name)
        if name in self._offered or name in (source, PurePosixPath(source).name):
            self._remember(name, None)  # or the next start would bring it back
        else:
            self._entries.pop(name, None)
            self._save()

    def pin(self, name: str, *, pinned: bool) -> AdapterInfo:
        info = self._inner.pin(name, pinned=pinned)
        wanted = self._entries.get(name)
        if wanted is not None:
            self._remember(name, Wanted(wanted.source, wanted.revision, wanted.version, pinned))
        return info

    async def revive(self, order: LoadOrder) -> None:
        await self._inner.revive(order)

    def claim(self, claims: Claims) -> None:
        self._inner.claim(claims)

    async def saved(self) -> None:
        await self._inner.saved()

    def acquire(self, terms: Sequence[NamedTerm]) -> Lease:
        return self._inner.acquire(terms)

    async def lease(self, terms: Sequence[NamedTerm]) -> Lease:
        return await self._inner.lease(terms)

    def get(self, ref: AdapterRef) -> AdapterInfo:
        return self._inner.get(ref)

    def list(self) -> Sequence[AdapterInfo]:
        return self._inner.list()

    def totals(self) -> AdapterTotals:
        return self._inner.totals()

    def close(self) -> None:
        """Wait for the last write."""
        self._writer.shutdown()

    def _remember(self, name: str, wanted: Wanted | None) -> "Future[None]":
        self._entries[name] = wanted
        return self._save()

    def _save(self) -> "Future[None]":
        return self._writer.submit(self._write, dict(self._entries))

    def _write(self, entries: Entries) -> None:
        try:
            self._file.write(entries)
        except OSError as error:
            # The adapter serves; only a restart would not know of it.
            fields = {"reason": error.strerror}
            _log.error("the state cannot be written", extra={"fields": fields})


def _order(name: str, wanted: Wanted) -> LoadOrder:
    return LoadOrder(name, wanted.source, wanted.revision, sha256=wanted.version, pin=wanted.pin)
