"""Adapters in object stores, by URL under allowed prefixes, through fsspec. Parses nothing."""

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fader_adapters.cache import DiskCache
from fader_adapters.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.limits import Limits, Patience
from fader_adapters.roots import CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES
from fader_adapters.source import PICKLE_FILE, RawAdapter, only_pickle
from fader_adapters.spec import LOCAL_PROTOCOLS, URL_PREFIX

_SEGMENT = re.compile(r"[A-Za-z0-9_=+@,-][A-Za-z0-9_.=+@,-]*", re.ASCII)
_CHUNK = 16 << 20

FileSystems = Callable[[str], Any]
"""A protocol → an fsspec file system. Raises ImportError when its package is missing."""


class UrlSource:
    """Reads adapters under URL prefixes that the operator allowed. Safe to use from any thread."""

    def __init__(
        self,
        prefixes: Sequence[str],
        *,
        cache: DiskCache | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
        file_systems: FileSystems | None = None,
    ) -> None:
        """Raises SourceForbidden for a prefix that is not one, SourceUnavailable when the package
        for its protocol is missing."""
        self._cache = cache
        self._limits = limits or Limits()
        self._patience = patience or Patience()
        self._file_systems = file_systems or self._open
        self._prefixes: list[str] = []
        for prefix in prefixes:
            whole = prefix if prefix.endswith("/") else prefix + "/"
            match = URL_PREFIX.fullmatch(whole)
            if match is None or match[1] in LOCAL_PROTOCOLS:
                raise SourceForbidden(f"expected a prefix like s3://bucket/folder/, got {prefix!r}")
            self._require(match[1])
            self._prefixes.append(whole)

    def fetch(self, url: str) -> RawAdapter:
        """The two files of a folder under a prefix.

        Raises SourceForbidden, SourceNotFound, SourceUnavailable, AdapterTooLarge, and
        AdapterInvalid for pickle files and files that change while they are read.
        """
        self._check(url)
        folder = url.rstrip("/")
        deadline = time.monotonic() + self._patience.total
        with _translated():
            system = self._file_systems(url.partition("://")[0])
            name = _weights_file(system, folder)
            config, weights = self._sizes(system, folder, name)
            state = _state(system, folder, name)
            key = f"url:{folder}#{state}"
            kept = self._cache.get(key) if self._cache else None
            if kept is not None:
                return kept
            files = (
                self._read(system, f"{folder}/{CONFIG_FILE}", config, deadline),
                self._read(system, f"{folder}/{name}", weights, deadline),
            )
            if _state(system, folder, name) != state:
                raise AdapterInvalid("the adapter changed while it was read; read it again")
            raw = RawAdapter.of(files, url, self._limits)
        if self._cache:
            self._cache.put(key, raw)
        return raw

    def _check(self, url: str) -> None:
        prefix = next((item for item in self._prefixes if url.startswith(item)), None)
        if prefix is None:
            raise SourceForbidden("the source lies outside the allowed URL prefixes")
        segments = url.removeprefix(prefix).rstrip("/").split("/")
        if not all(_SEGMENT.fullmatch(segment) for segment in segments):
            raise SourceForbidden("a source below a URL prefix is plain names joined by '/'")

    def _sizes(self, system: Any, folder: str, name: str) -> tuple[int, int]:  # noqa: ANN401 - fsspec is untyped
        config = self._size(system, folder, CONFIG_FILE, self._limits.config_bytes)
        try:
            weights = self._size(system, folder, name, self._limits.file_bytes)
        except FileNotFoundError:
            if system.exists(f"{folder}/{PICKLE_FILE}"):
                raise only_pickle() from None
            raise
        return config, weights

    def _size(self, system: Any, folder: str, name: str, cap: int) -> int:  # noqa: ANN401
        info = system.info(f"{folder}/{name}")
        size = info.get("size")
        if info.get("type") != "file" or not isinstance(size, int):
            raise SourceNotFound(f"{name} is not a file of known size")
        if size > cap:
            raise AdapterTooLarge(f"{name} has {size} bytes, the limit is {cap}")
        return size

    def _read(self, system: Any, path: str, size: int, deadline: float) -> bytes:  # noqa: ANN401
        pieces: list[bytes] = []
        received = 0
        with system.open(path, "rb", cache_type="none") as file:
            while received <= size:
                piece = file.read(min(_CHUNK, size + 1 - received))
                if not piece:
                    break
                pieces.append(piece)
                received += len(piece)
                if time.monotonic() > deadline:
                    raise SourceUnavailable(
                        f"the adapter did not arrive in {self._patience.total:g} seconds"
                    )
        if received != size:
            raise SourceUnavailable(
                f"a file arrived damaged: {received} bytes of {size}; try again"
            )
        return b"".join(pieces)

    def _require(self, protocol: str) -> None:
        try:
            self._file_systems(protocol)
        except ImportError:
            raise SourceUnavailable(
                f"{protocol}:// needs a package that is not installed: pip install 'fader[remote]'"
            ) from None
        except ValueError:
            raise SourceForbidden(f"{protocol}:// is no protocol that fsspec knows") from None

    def _open(self, protocol: str) -> Any:  # noqa: ANN401
        import fsspec  # optional: the extra `remote`

        options: dict[str, Any] = {"use_listings_cache": False}
        if protocol in ("s3", "s3a"):
            silence = self._patience.silence
            options["config_kwargs"] = {
                "connect_timeout": silence,
                "read_timeout": silence,
                "retries": {"max_attempts": 2},
            }
        return fsspec.filesystem(protocol, **options)


def _weights_file(system: Any, folder: str) -> str:  # noqa: ANN401
    """The first name that is there, or PEFT's."""
    there = (name for name in WEIGHTS_FILES if system.exists(f"{folder}/{name}"))
    return next(there, WEIGHTS_FILE)


def _state(system: Any, folder: str, weights_file: str) -> str:  # noqa: ANN401
    """Changes when a file does: by the store's own tags and times."""
    marks = [system.ukey(f"{folder}/{name}") for name in (CONFIG_FILE, weights_file)]
    return hashlib.sha256("\n".join(map(str, marks)).encode()).hexdigest()


@contextmanager
def _translated() -> Iterator[None]:
    """A store's errors as ours; addresses and keys stay out of the messages."""
    try:
        yield
    except AdapterError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError):
        raise SourceNotFound("the store has no adapter there, or not for this server") from None
    except Exception as error:  # noqa: BLE001 - a store's client may raise anything
        raise SourceUnavailable(
            f"the store cannot be read ({type(error).__name__}); try again"
        ) from None
