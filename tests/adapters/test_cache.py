"""The disk tier: what it gives is what was put, whatever happened to the disk meanwhile."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from fader_adapters.cache import DiskCache
from fader_adapters.source import RawAdapter


def raw(seed: int, size: int = 1000) -> RawAdapter:
    return RawAdapter(b"config %d" % seed, bytes([seed]) * size, f"origin {seed}", "c" * 40)


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path, max_bytes=10_000)


def files(tmp_path, part: str) -> list:
    return sorted((tmp_path / part).iterdir())


def use(tmp_path, cache: DiskCache, key: str, at: int) -> None:
    """Read `key` as if at this second."""
    assert cache.get(key)
    os.utime(cache._ref(key), (at, at))


def test_what_is_put_comes_back_in_this_and_the_next_process(tmp_path, cache):
    cache.put("a", raw(1))
    for reader in (cache, DiskCache(tmp_path, max_bytes=10_000)):
        assert reader.get("a") == raw(1)
        assert reader.get("b") is None


def test_equal_files_are_kept_once(tmp_path, cache):
    cache.put("a", raw(1))
    cache.put("b", RawAdapter(raw(2).config, raw(1).weights, "x"))
    assert len(files(tmp_path, "blobs")) == 3
    assert cache.get("a") == raw(1)


def test_a_link_means_what_its_target_meant(tmp_path, cache):
    cache.put("commit", raw(1))
    cache.link("branch", "commit")
    cache.link("other", "absent")
    assert cache.get("branch") == raw(1)
    assert cache.get("other") is None
    cache.put("newer", raw(2))
    cache.link("branch", "newer")
    assert cache.get("branch") == raw(2)
    assert cache.get("commit") == raw(1)


@pytest.mark.parametrize("which", ["config", "weights"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_file_is_dropped_never_given(tmp_path, cache, which, damage):
    cache.put("a", raw(1))
    content = getattr(raw(1), which)
    (path,) = [p for p in files(tmp_path, "blobs") if p.read_bytes() == content]
    if damage == "gone":
        path.unlink()
    else:
        bad = {"flip": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "empty": b""}
        path.write_bytes(bad[damage])
    assert cache.get("a") is None
    assert not path.exists()
    cache.put("a", raw(1))
    assert cache.get("a") == raw(1)


@pytest.mark.parametrize("damage", ["gone", "flip"])
def test_what_another_process_puts_while_a_damaged_key_is_read_stays(tmp_path, cache, damage):
    other = DiskCache(tmp_path, max_bytes=10_000)
    cache.put("a", raw(1))
    (path,) = [p for p in files(tmp_path, "blobs") if p.read_bytes() == raw(1).weights]
    path.unlink() if damage == "gone" else path.write_bytes(b"?")
    locked = cache._locked

    @contextmanager
    def after_the_other():
        other.put("a", raw(1))
        with locked():
            yield

    cache._locked = after_the_other
    assert cache.get("a") is None
    assert other.get("a") == raw(1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"key": 1}', "\xff", '{"key": "a"}'])
def test_a_damaged_key_is_a_miss(tmp_path, cache, text):
    cache.put("a", raw(1))
    cache._ref("a").write_text(text, encoding="latin-1")
    assert cache.get("a") is None
    DiskCache(tmp_path, max_bytes=10_000)
    assert files(tmp_path, "refs") == files(tmp_path, "blobs") == []


def test_a_key_that_names_a_path_reads_nothing(tmp_path, cache):
    cache.put("a", raw(1))
    path = cache._ref("a")
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    path.write_text(path.read_text().replace(files(tmp_path, "blobs")[0].name, "../secret"))
    assert cache.get("a") is None
    assert secret.exists()


def test_the_longest_unused_leaves_first(tmp_path, cache):
    for n in range(4):
        cache.put(f"k{n}", raw(n, 2400))
    for at, key in enumerate(("k1", "k0", "k3", "k2")):
        use(tmp_path, cache, key, 1000 + at)
    cache.put("k4", raw(4, 4000))
    assert [key for key in ("k0", "k1", "k2", "k3", "k4") if cache.get(key)] == ["k2", "k3", "k4"]
    assert cache.used_bytes <= 10_000


def test_reading_counts_as_use(tmp_path, cache):
    for at, key in enumerate(("old", "middle", "young")):
        cache.put(key, raw(at, 3000))
        os.utime(cache._ref(key), (1000 + at, 1000 + at))
    assert cache.get("old")
    cache.put("new", raw(9, 3000))
    assert [key for key in ("old", "middle", "young", "new") if cache.get(key)] == [
        "old", "young", "new",
    ]  # fmt: skip


def test_the_limit_holds_for_any_sequence(tmp_path, cache):
    for n in range(60):
        cache.put(f"k{n % 7}", raw(n, 1 + (n * 977) % 9000))
        assert cache.used_bytes <= 10_000
        assert cache.get(f"k{n % 7}") == raw(n, 1 + (n * 977) % 9000)


def test_what_never_fits_is_not_kept_and_evicts_nobody(tmp_path, cache):
    cache.put("a", raw(1))
    cache.put("b", raw(2, 10_001))
    assert cache.get("b") is None
    assert cache.get("a") == raw(1)


def test_leftovers_of_a_crash_are_cleared_at_start_and_those_of_the_living_are_not(tmp_path, cache):
    cache.put("a", raw(1))
    (tmp_path / "scratch" / "left").write_bytes(b"x" * 100)
    (tmp_path / "blobs" / ("0" * 64)).write_bytes(b"x" * 100)
    with cache._written(b"under way") as alive:
        DiskCache(tmp_path, max_bytes=10_000)
        assert files(tmp_path, "scratch") == [alive]
    assert files(tmp_path, "scratch") == []
    assert len(files(tmp_path, "blobs")) == 2
    assert cache.get("a") == raw(1)


def test_a_smaller_limit_at_the_next_start_is_obeyed(tmp_path, cache):
    for n in range(4):
        cache.put(f"k{n}", raw(n, 2000))
    assert DiskCache(tmp_path, max_bytes=5000).used_bytes <= 5000


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace", "os.replace"])
def test_a_full_disk_keeps_nothing_and_breaks_nothing(tmp_path, cache, monkeypatch, caplog, call):
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(call, fail)
        cache.put("a", raw(1))
    assert "cannot be written" in caplog.text
    assert cache.get("a") is None
    cache.put("a", raw(1))
    assert cache.get("a") == raw(1)


def test_the_folder_is_for_its_owner_only(tmp_path):
    DiskCache(tmp_path / "new" / "cache", max_bytes=1)
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o077 == 0


WORKER = """
import random, sys
from pathlib import Path
from fader_adapters.cache import DiskCache
from fader_adapters.source import RawAdapter
cache, seed = DiskCache(Path(sys.argv[1]), max_bytes=10_000), int(sys.argv[2])
choose, hits = random.Random(seed), 0
for turn in range(200):
    n = choose.randrange(8)
    raw = RawAdapter(b"config %d" % n, bytes([n]) * (500 * n), "x", None)
    found = cache.get(str(n))
    assert found in (None, raw)
    hits += found is not None
    if found is None:
        cache.put(str(n), raw)
print(hits)
"""


def test_processes_and_threads_share_one_folder(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, env=environment)
        for n in range(2)
    ]
    cache = DiskCache(tmp_path, max_bytes=10_000)
    wrong: list[int] = []

    def work(n: int) -> None:
        for _ in range(50):
            if cache.get(f"t{n}") not in (None, raw(n)):
                wrong.append(n)
            cache.put(f"t{n}", raw(n))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hits = [int(worker.communicate()[0]) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert min(hits) > 0
    assert wrong == []
    assert cache.used_bytes <= 10_000
    assert files(tmp_path, "scratch") == []
