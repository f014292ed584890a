"""The disk tier: the files of remote adapters by sha256, bounded, least recently used leave first.

Several processes may share a directory. Knows no network; what cannot be kept is fetched again.
"""

import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fader_adapters.source import RawAdapter

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Entry:
    """What one key stands for."""

    key: str
    config: str
    """sha256 of the file."""
    weights: str
    origin: str
    revision: str | None


class DiskCache:
    """blobs/SHA256 holds the bytes, refs/SHA256-OF-KEY.json says which a key means.

    Nothing is read that does not have the hash it is named by. Safe to use from any thread.
    """

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """Makes the directory, for its owner only, and clears what a crash left. Raises OSError."""
        self._max_bytes = max_bytes
        self._lock_path = directory / "lock"
        self._blobs, self._refs, self._scratch = (
            directory / name for name in ("blobs", "refs", "scratch")
        )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (self._blobs, self._refs, self._scratch):
            part.mkdir(mode=0o700, exist_ok=True)
        with self._locked():
            self._clear_scratch()
            self._sweep(incoming=0)

    @property
    def used_bytes(self) -> int:
        """Of all files kept."""
        return sum(path.stat().st_size for path in self._blobs.iterdir())

    def get(self, key: str) -> RawAdapter | None:
        """The files of a key; None: not here, or damaged and therefore dropped."""
        path = self._ref(key)
        try:
            entry = _read_entry(path, key)
            if entry is None:
                return None
            config, weights = self._blob(entry.config), self._blob(entry.weights)
            if config is None or weights is None:
                self._forget(path, entry)
                return None
            os.utime(path)  # the least recently used leaves first
        except OSError as error:
            _log.warning("the adapter cache cannot be read", extra=_reason(error))
            return None
        return RawAdapter(config, weights, entry.origin, entry.revision)

    def put(self, key: str, raw: RawAdapter) -> None:
        """Keep the files under the key, if they fit at all; a full disk is only logged."""
        size = len(raw.config) + len(raw.weights)
        if size > self._max_bytes:
            return
        try:
            with (
                self._written(raw.config) as config,
                self._written(raw.weights) as weights,
                self._locked(),
            ):
                self._sweep(incoming=size)
                names = [self._adopt(config, raw.config), self._adopt(weights, raw.weights)]
                self._write_ref(_Entry(key, names[0], names[1], raw.origin, raw.revision))
        except OSError as error:
            _log.warning("the adapter cache cannot be written", extra=_reason(error))

    def link(self, key: str, to: str) -> None:
        """Let a second key mean what `to` means now; nothing when that is not kept."""
        try:
            with self._locked():
                entry = _read_entry(self._ref(to), to)
                if entry is not None and key != to:
                    self._write_ref(replace(entry, key=key))
        except OSError as error:
            _log.warning("the adapter cache cannot be written", extra=_reason(error))

    def _forget(self, path: Path, entry: _Entry) -> None:
        """Drop a key whose files are not there, unless somebody has put them anew since."""
        with self._locked():
            there = all((self._blobs / name).exists() for name in (entry.config, entry.weights))
            if not there and _read_entry(path) == entry:
                path.unlink(missing_ok=True)

    def _blob(self, name: str) -> bytes | None:
        path = self._blobs / name
        with suppress(FileNotFoundError), path.open("rb") as file:
            data = file.read()
            if hashlib.sha256(data).hexdigest() == name:
                return data
            _log.warning("a damaged file of the adapter cache is dropped", extra={"fields": {}})
            with self._locked():  # the very file that was read: a sound one may be there by now
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    path.unlink()
        return None

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """`data` in a scratch file that is locked as long as its writer lives."""
        with self._locked():
            number, name = tempfile.mkstemp(dir=self._scratch)
            fcntl.flock(number, fcntl.LOCK_EX)
        with open(number, "wb", buffering=0) as file:
            try:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                os.fsync(number)
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)

    def _adopt(self, scratch: Path, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        scratch.replace(self._blobs / name)
        return name

    def _write_ref(self, entry: _Entry) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self._scratch, delete=False) as file:
            json.dump(asdict(entry), file)
        os.replace(file.name, self._ref(entry.key))

    def _ref(self, key: str) -> Path:
        return self._refs / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _sweep(self, *, incoming: int) -> None:
        """Drop keys, longest unused first, until their files and `incoming` bytes fit; then files
        that no key means. What fits beside all that is here drops nothing."""
        if incoming and self.used_bytes + incoming <= self._max_bytes:
            return
        kept: list[tuple[float, Path, dict[str, int]]] = []
        for path in self._refs.iterdir():
            entry, sizes = _read_entry(path), {}
            for name in (entry.config, entry.weights) if entry else ():
                with suppress(FileNotFoundError):
                    sizes[name] = (self._blobs / name).stat().st_size
            if entry is None or len(sizes) < len({entry.config, entry.weights}):
                path.unlink(missing_ok=True)
            else:
                kept.append((path.stat().st_mtime, path, sizes))
        kept.sort(key=lambda item: item[0], reverse=True)
        wanted: dict[str, int] = {}
        room = self._max_bytes - incoming
        for _, path, sizes in kept:
            room -= sum(size for name, size in sizes.items() if name not in wanted)
            if room < 0:  # so it stays for those used longer ago
                path.unlink(missing_ok=True)
            else:
                wanted |= sizes
        for path in self._blobs.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def _clear_scratch(self) -> None:
        for path in self._scratch.iterdir():
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused: its writer lives
                path.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process and thread at a time. Held for directory entries, never for contents."""
        number = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            yield
        finally:
            os.close(number)


def _read_entry(path: Path, key: str | None = None) -> _Entry | None:
    """None: absent, damaged, or of another key. Raises OSError."""
    try:
        stored: dict[str, Any] = json.loads(path.read_bytes())
        entry = _Entry(**stored)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None
    sound = all(
        isinstance(name, str) and len(name) == 64 and name.isalnum()
        for name in (entry.config, entry.weights)
    )
    return entry if sound and key in (None, entry.key) else None


def _reason(error: OSError) -> dict[str, Any]:
    return {"fields": {"reason": error.strerror or type(error).__name__}}
