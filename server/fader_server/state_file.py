"""The file of --state-dir: what administrators asked for, replaced as a whole.

Knows how to write a list so that a crash leaves the old one or the new one; its entries are
another's business.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fader_server.errors import ConfigInvalid
from fader_server.state_entries import State, as_json, from_json

_FORMAT = 2


class StateFile:
    """adapters.json and its neighbours in one directory."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigInvalid when the directory cannot be made."""
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigInvalid(f"--state-dir {directory}: {error.strerror}") from None
        self._directory = directory
        self._path = directory / "adapters.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other servers from the directory; the lock ends with the process, however it ends.

        Raises ConfigInvalid when another one has it.
        """
        try:
            lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigInvalid(f"--state-dir {self._directory}: {error.strerror}") from None
        try:
            self._take(lock)
            yield
        finally:
            os.close(lock)

    def _take(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigInvalid(
                f"--state-dir {self._directory}: another server uses it; give each its own"
            ) from None

    def read(self) -> State:
        """Empty when there is no file; entries that cannot be read are told and skipped.

        Raises ConfigInvalid when the file as a whole is damaged.
        """
        try:
            stored = json.loads(self._path.read_bytes())
            form, content = stored["format"], _content(stored)
            if form > _FORMAT:
                raise ConfigInvalid(
                    f"{self._path} has format {form}, this version reads up to {_FORMAT}: use a "
                    "newer one, or remove the file"
                )
            if stored["sha256"] != _hash(content if form > 1 else content["adapters"]):
                raise ValueError("its content does not match its hash")
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigInvalid(
                f"{self._path} is damaged ({type(error).__name__}); mend it or remove it"
            ) from None
        return from_json(content)

    def write(self, state: State) -> None:
        """Durable when this returns. Raises OSError, and then the old file stands.

        The one cost that grows with the list, by some microseconds an entry.
        """
        content = as_json(state)
        stored = {"format": _FORMAT, "sha256": _hash(content), **content}
        scratch = self._path.with_suffix(".new")
        with _descriptor(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as file:
            # Lines without `indent`, which Python's slow encoder would have to write.
            rest = memoryview(json.dumps(stored, separators=(",\n", ": ")).encode())
            while rest:
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        os.replace(scratch, self._path)
        with _descriptor(self._directory, os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    found = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield found
    finally:
        os.close(found)


def _content(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: stored[name] for name in stored if name not in ("format", "sha256")}


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
