"""Object stores through fsspec's memory://: prefixes hold, sizes bound, changes are noticed."""

import io

import fsspec
import pytest

from fader_adapters.cache import DiskCache
from fader_adapters.errors import (
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.limits import Limits, Patience
from fader_adapters.mlx import in_peft_terms
from fader_adapters.source import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, RawAdapter
from fader_adapters.urls import UrlSource
from tests.adapters.mlx_files import MLX_WEIGHTS_FILE, mlx_files
from tests.adapters.peft_files import make_raw, make_tensors

RAW = make_raw()
NEWER = make_raw(tensors=make_tensors(seed=1))
PREFIX = "memory://bucket/adapters/"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put(memory, folder: str, raw: RawAdapter = RAW) -> str:
    memory.pipe(f"{folder}/{CONFIG_FILE}", raw.config)
    memory.pipe(f"{folder}/{WEIGHTS_FILE}", raw.weights)
    return folder


class Counting:
    """A file system that counts openings and can be made to fail."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.opened = 0
        self.failure: Exception | None = None
        self.content: bytes | None = None

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def open(self, path: str, mode: str, **options):
        self.opened += 1
        if self.failure is not None:
            raise self.failure
        return self.inner.open(path, mode) if self.content is None else io.BytesIO(self.content)


def source(system, **options) -> UrlSource:
    return UrlSource((PREFIX,), file_systems=lambda protocol: system, **options)


def test_a_folder_under_a_prefix_is_read(memory):
    put(memory, PREFIX + "team/tone")
    for url in (PREFIX + "team/tone", PREFIX + "team/tone/"):
        raw = UrlSource((PREFIX,)).fetch(url)
        assert (raw.config, raw.weights) == (RAW.config, RAW.weights)


@pytest.mark.parametrize(
    "url",
    ["memory://bucket/other/tone", "memory://bucket/adapters-evil/tone", "s3://bucket/adapters/t",
     PREFIX + "../other/tone", PREFIX + "a/../../x", PREFIX + "a//b", PREFIX + ".hidden",
     PREFIX + "a?versionId=1", PREFIX + "a#b", PREFIX + "a%2e%2e/b", PREFIX + "*", PREFIX + "a b",
     PREFIX + "a::file://etc", "simplecache::" + PREFIX + "a", PREFIX, PREFIX + "a\\b",
     PREFIX + "a\0b", "file:///etc", "MEMORY://bucket/adapters/tone"],
)  # fmt: skip
def test_what_is_not_plainly_under_a_prefix_is_forbidden(memory, url):
    counting = Counting(memory)
    with pytest.raises(SourceForbidden):
        source(counting).fetch(url)
    assert counting.opened == 0


@pytest.mark.parametrize("prefix", ["file:///srv/", "local://x/", "s3", "s3://", "/srv", "a b://c"])
def test_prefixes_that_are_refused(prefix):
    with pytest.raises(SourceForbidden):
        UrlSource((prefix,))


def test_a_missing_package_is_one_clear_error():
    def missing(protocol: str):
        raise ImportError("Install s3fs to access S3")

    with pytest.raises(SourceUnavailable, match=r"s3:// .* pip install 'fader\[remote\]'"):
        UrlSource(("s3://bucket/x/",), file_systems=missing)
    with pytest.raises(SourceForbidden, match="fsspec"):
        UrlSource(("nosuch://bucket/",))


def test_absent_folders_and_files_are_not_found_and_pickle_is_refused(memory):
    with pytest.raises(SourceNotFound):
        source(memory).fetch(PREFIX + "absent")
    put(memory, PREFIX + "tone")
    memory.rm(f"{PREFIX}tone/{WEIGHTS_FILE}")
    with pytest.raises(SourceNotFound):
        source(memory).fetch(PREFIX + "tone")
    memory.pipe(f"{PREFIX}tone/{PICKLE_FILE}", b"x")
    with pytest.raises(AdapterInvalid, match="safe_serialization"):
        source(memory).fetch(PREFIX + "tone")


def test_sizes_are_checked_before_anything_is_opened(memory):
    put(memory, PREFIX + "tone")
    counting = Counting(memory)
    for limits in (Limits(file_bytes=len(RAW.weights) - 1), Limits(config_bytes=9)):
        with pytest.raises(AdapterTooLarge):
            source(counting, limits=limits).fetch(PREFIX + "tone")
    assert counting.opened == 0
    exact = Limits(file_bytes=len(RAW.weights), config_bytes=len(RAW.config))
    assert source(counting, limits=exact).fetch(PREFIX + "tone")


@pytest.mark.parametrize("content", [b"", b"short", RAW.config + b"longer"])
def test_a_file_of_another_size_than_told_is_unavailable(memory, content):
    put(memory, PREFIX + "tone")
    counting = Counting(memory)
    counting.content = content
    with pytest.raises(SourceUnavailable, match="damaged"):
        source(counting).fetch(PREFIX + "tone")


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (OSError("secret://host"), SourceUnavailable),
        (TimeoutError(), SourceUnavailable),
        (RuntimeError("secret://host"), SourceUnavailable),
        (PermissionError("secret://host"), SourceNotFound),
        (FileNotFoundError(), SourceNotFound),
    ],
)
def test_failures_of_the_store_are_told_without_its_words(memory, failure, kind):
    put(memory, PREFIX + "tone")
    counting = Counting(memory)
    counting.failure = failure
    with pytest.raises(kind) as caught:
        source(counting).fetch(PREFIX + "tone")
    assert "secret" not in str(caught.value)


def test_a_slow_store_ends_at_the_deadline(memory):
    put(memory, PREFIX + "tone")
    with pytest.raises(SourceUnavailable, match="0 seconds"):
        source(memory, patience=Patience(total=0.0)).fetch(PREFIX + "tone")


def test_the_cache_serves_until_the_store_has_something_else(memory, tmp_path):
    put(memory, PREFIX + "tone")
    cache, counting = DiskCache(tmp_path, max_bytes=1 << 30), Counting(memory)
    for _ in range(3):
        found = source(counting, cache=cache).fetch(PREFIX + "tone")
        assert found.weights == RAW.weights
    assert counting.opened == 2
    put(memory, PREFIX + "tone", NEWER)
    assert source(counting, cache=cache).fetch(PREFIX + "tone").weights == NEWER.weights
    assert counting.opened == 4


def test_a_change_while_reading_is_refused(memory):
    put(memory, PREFIX + "tone")
    counting = Counting(memory)
    opened = counting.open

    def swap(path: str, mode: str, **options):
        file = opened(path, mode, **options)
        if path.endswith(WEIGHTS_FILE):
            content = file.read()
            put(memory, PREFIX + "tone", NEWER)
            return io.BytesIO(content)
        return file

    counting.open = swap
    with pytest.raises(AdapterInvalid, match="changed"):
        source(counting).fetch(PREFIX + "tone")


def test_an_adapter_of_mlx_is_read_in_peft_terms(memory):
    config, weights = mlx_files()
    memory.pipe(f"{PREFIX}tone/{CONFIG_FILE}", config)
    memory.pipe(f"{PREFIX}tone/{MLX_WEIGHTS_FILE}", weights)
    raw = UrlSource((PREFIX,)).fetch(PREFIX + "tone")
    assert (raw.config, raw.weights) == in_peft_terms(config, weights, Limits())
    put(memory, PREFIX + "tone")  # PEFT's name comes first
    assert UrlSource((PREFIX,)).fetch(PREFIX + "tone").weights == RAW.weights
