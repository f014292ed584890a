"""Adapters on the Hugging Face Hub: two files of an allowed repository, at one commit.

Sizes are checked before a byte is fetched, contents against the Hub's own hashes. Parses nothing.
"""

import hashlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from huggingface_hub import HfApi, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from fader_adapters.cache import DiskCache
from fader_adapters.errors import (
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.limits import Limits, Patience
from fader_adapters.roots import CONFIG_FILE, WEIGHTS_FILE, WEIGHTS_FILES
from fader_adapters.source import PICKLE_FILE, RawAdapter, only_pickle
from fader_adapters.spec import NESTED_NAME

_REVISION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,126}[A-Za-z0-9_-])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubRef:
    """`org/name` or `org/name@revision`."""

    repo: str
    revision: str | None

    @classmethod
    def read(cls, reference: str) -> "HubRef | None":
        """None when it is not spelled like one."""
        repo, at, revision = reference.partition("@")
        if not NESTED_NAME.fullmatch(repo) or ".." in repo or "--" in repo:
            return None
        if at and (not _REVISION.fullmatch(revision) or ".." in revision):
            return None
        return cls(repo, revision or None)


class HubSource:
    """Reads adapters of the repositories that are allowed. Safe to use from any thread."""

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        cache: DiskCache | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
        endpoint: str | None = None,
        offline: bool | None = None,
    ) -> None:
        """`allowed`: globs of `org/name`, or of `org` alone; none: only what the operator names.

        `endpoint` and `offline` are by default what HF_ENDPOINT and HF_HUB_OFFLINE say.
        """
        self._allowed = tuple(item if "/" in item else f"{item}/*" for item in allowed)
        self._cache = cache
        self._limits = limits or Limits()
        self._patience = patience or Patience()
        self._endpoint = endpoint
        self._offline = is_offline_mode() if offline is None else offline

    def allows(self, repo: str) -> bool:
        return any(fnmatchcase(repo, glob) for glob in self._allowed)

    def fetch(self, ref: HubRef, *, trusted: bool = False) -> RawAdapter:
        """The two files at the commit that the revision means now; `trusted`: no allow-list.

        Raises SourceForbidden, SourceNotFound, SourceUnavailable, AdapterTooLarge, and
        AdapterInvalid for a repository that has pickle files only.
        """
        if not trusted and not self.allows(ref.repo):
            raise SourceForbidden(f"{ref.repo!r} is not on the list of allowed Hub repositories")
        revision = ref.revision or "main"
        if self._offline or _COMMIT.fullmatch(revision):  # a commit never changes
            kept = self._cache.get(_key(ref.repo, revision)) if self._cache else None
            if kept is not None:
                return kept
        if self._offline:
            return self._from_library(ref.repo, revision)
        deadline = time.monotonic() + self._patience.total
        with _translated(ref.repo):
            api = HfApi(endpoint=self._endpoint)
            info = api.model_info(
                ref.repo, revision=revision, files_metadata=True, timeout=self._patience.silence
            )
            commit = self._commit(info, ref.repo, trusted=trusted)
            kept = self._cache.get(_key(ref.repo, commit)) if self._cache else None
            raw = kept or self._download(info, ref.repo, commit, deadline)
        if self._cache:
            if kept is None:
                self._cache.put(_key(ref.repo, commit), raw)
            self._cache.link(_key(ref.repo, revision), _key(ref.repo, commit))
        return raw

    def _commit(self, info: ModelInfo, repo: str, *, trusted: bool) -> str:
        if info.id != repo and not (trusted or self.allows(info.id)):
            raise SourceForbidden(f"{repo!r} was moved to {info.id[:200]!r}, which is not allowed")
        if info.sha is None or not _COMMIT.fullmatch(info.sha):
            raise SourceUnavailable("the Hub named no commit; try again")
        return info.sha

    def _download(self, info: ModelInfo, repo: str, commit: str, deadline: float) -> RawAdapter:
        files = {item.rfilename: item for item in info.siblings or ()}
        weights_file = next((name for name in WEIGHTS_FILES if name in files), WEIGHTS_FILE)
        if weights_file not in files and PICKLE_FILE in files:
            raise only_pickle()
        caps = {CONFIG_FILE: self._limits.config_bytes, weights_file: self._limits.file_bytes}
        for name, cap in caps.items():
            size = files[name].size if name in files else None
            if size is None:
                raise SourceNotFound(f"{repo!r} has no {name} at {commit[:12]}")
            if size > cap:
                raise AdapterTooLarge(f"{name} has {size} bytes, the limit is {cap}")
        config, weights = (self._file(files[name], repo, commit, deadline) for name in caps)
        return RawAdapter.of((config, weights), f"{repo}@{commit}", self._limits, commit)

    def _file(self, file: RepoSibling, repo: str, commit: str, deadline: float) -> bytes:
        assert file.size is not None
        url = hf_hub_url(repo, file.rfilename, revision=commit, endpoint=self._endpoint)
        headers = build_hf_headers() | {"accept-encoding": "identity"}
        pieces: list[bytes] = []
        received = 0
        with get_session().stream(
            "GET", url, headers=headers, timeout=self._patience.silence, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            for piece in response.iter_bytes():  # as it comes: a trickle must not hide in a buffer
                pieces.append(piece)
                received += len(piece)
                if received > file.size:
                    break
                if time.monotonic() > deadline:
                    raise SourceUnavailable(
                        f"{file.rfilename} did not arrive in {self._patience.total:g} seconds"
                    )
        data = b"".join(pieces)
        if len(data) != file.size or not _is(file, data):
            raise SourceUnavailable(
                f"{file.rfilename} arrived damaged: {received} bytes of {file.size}; try again"
            )
        return data

    def _from_library(self, repo: str, revision: str) -> RawAdapter:
        """What huggingface_hub itself has kept, for machines without a network."""
        kept = (try_to_load_from_cache(repo, name, revision=revision) for name in WEIGHTS_FILES)
        weights_path = next((path for path in kept if isinstance(path, str)), None)
        paths = [try_to_load_from_cache(repo, CONFIG_FILE, revision=revision), weights_path]
        if not all(isinstance(path, str) for path in paths):
            raise SourceNotFound(
                f"HF_HUB_OFFLINE is set and {repo!r} is in no cache of this machine"
            )
        caps = (self._limits.config_bytes, self._limits.file_bytes)
        for path, cap in zip(paths, caps, strict=True):
            if Path(str(path)).stat().st_size > cap:
                raise AdapterTooLarge(f"a file of {repo!r} is over the limit of {cap} bytes")
        config, weights = (Path(str(path)).read_bytes() for path in paths)
        commit = Path(str(paths[1])).parent.name  # snapshots/COMMIT/FILE
        commit = commit if _COMMIT.fullmatch(commit) else revision
        return RawAdapter.of((config, weights), f"{repo}@{commit}", self._limits, commit)


def with_revision(ref: HubRef, revision: str | None) -> HubRef:
    """Join a revision given beside a reference. Raises AdapterInvalid when they differ."""
    if revision is None or revision == ref.revision:
        return ref
    if ref.revision is not None:
        raise AdapterInvalid("the source names a revision already; give one of the two")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise AdapterInvalid("a revision is a branch, a tag or a commit of the repository")
    return HubRef(ref.repo, revision)


def _key(repo: str, revision: str) -> str:
    return f"hub:{repo}@{revision}"


def _is(file: RepoSibling, data: bytes) -> bool:
    """Whether `data` has the hash the Hub gives for the file, git's or the large file store's."""
    if file.lfs is not None:
        return hashlib.sha256(data).hexdigest() == file.lfs.sha256
    if file.blob_id is None:
        return True
    blob = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    blob.update(data)
    return blob.hexdigest() == file.blob_id


def hub_transport() -> ModuleType:
    """The library that the Hub's own calls by: httpx2, or httpx before its version 2."""
    own = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return sys.modules[own.__module__.partition(".")[0]]


def _network_faults() -> tuple[type[Exception], ...]:
    http = hub_transport()
    return http.HTTPError, http.InvalidURL, http.StreamError


@contextmanager
def _translated(repo: str) -> Iterator[None]:
    """The Hub's and the network's errors as ours; no address or token in any message."""
    try:
        yield
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        EntryNotFoundError,
        DisabledRepoError,
        HFValidationError,
    ):
        raise SourceNotFound(
            f"the Hub has no {repo!r} at this revision, or not for this token"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if 400 <= status < 500 and status not in (408, 429):
            raise SourceNotFound(f"the Hub refuses {repo!r} with status {status}") from None
        raise SourceUnavailable(f"the Hub answered with status {status}; try again") from None
    except (*_network_faults(), OSError) as error:
        raise SourceUnavailable(
            f"the Hub cannot be reached ({type(error).__name__}); try again"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise SourceUnavailable(
            f"the Hub's answer cannot be read ({type(error).__name__}); try again"
        ) from None
