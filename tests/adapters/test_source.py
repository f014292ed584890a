"""Files from disk: nothing outside the roots, nothing but regular files, nothing read twice."""

import errno
import os
import threading

import pytest

from fader_adapters.errors import (
    AdapterInvalid,
    AdapterTooLarge,
    SourceForbidden,
    SourceIncomplete,
    SourceNotFound,
    SourceUnavailable,
)
from fader_adapters.limits import Limits
from fader_adapters.source import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE, LocalSources
from fader_adapters.spec import Digest
from tests.adapters.peft_files import make_config, make_raw, make_tensors, read, write_files


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def sources(root):
    return LocalSources((root,))


def test_relative_and_absolute_references_inside_a_root_are_read(root, sources):
    raw = make_raw()
    write_files(root / "team" / "tone", raw)
    for reference in ("team/tone", "./team/tone/", str(root / "team" / "tone")):
        found = sources.fetch(reference)
        assert (found.config, found.weights) == (raw.config, raw.weights)


def test_roots_are_tried_in_order(tmp_path):
    first, second = make_raw(), make_raw(tensors=make_tensors(seed=1))
    write_files(tmp_path / "a" / "one", first)
    write_files(tmp_path / "b" / "one", second)
    write_files(tmp_path / "b" / "two", second)
    sources = LocalSources((tmp_path / "a", tmp_path / "b"))
    assert sources.fetch("one").weights == first.weights
    assert sources.fetch("two").weights == second.weights
    assert LocalSources((tmp_path / "b", tmp_path / "a")).fetch("one").weights == second.weights


@pytest.mark.parametrize(
    "reference",
    ["", ".", "/", "..", "../outside", "tone/../../outside", "a\0b", "/etc", "/proc/self/environ"],
)
def test_references_that_leave_the_roots_are_forbidden(root, sources, reference):
    write_files(root.parent / "outside")
    with pytest.raises(SourceForbidden):
        sources.fetch(reference)


@pytest.mark.parametrize("reference", ["absent", "%2e%2e/outside", "~", "x" * 300, "absent/deep"])
def test_references_to_nothing_are_not_found(root, sources, reference):
    write_files(root.parent / "outside")
    with pytest.raises(SourceNotFound):
        sources.fetch(reference)


def test_a_sibling_whose_name_starts_like_the_root_is_outside(root, sources):
    evil = write_files(root.parent / "root-evil")
    with pytest.raises(SourceForbidden):
        sources.fetch(str(evil))


def test_symlinks_are_not_followed(root, sources):
    outside = write_files(root.parent / "outside")
    inside = write_files(root / "inside")
    (root / "link").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "to-inside").symlink_to(inside)
    for reference in ("link", "loop", "to-inside", f"{root}/link"):
        with pytest.raises(SourceForbidden):
            sources.fetch(reference)
    (inside / WEIGHTS_FILE).unlink()
    (inside / WEIGHTS_FILE).symlink_to(outside / WEIGHTS_FILE)
    with pytest.raises(SourceForbidden):
        sources.fetch("inside")


def test_a_root_may_itself_be_a_symlink(root, tmp_path):
    write_files(root / "tone")
    (tmp_path / "alias").symlink_to(root)
    sources = LocalSources((tmp_path / "alias",))
    assert sources.fetch("tone")
    assert sources.fetch(str(tmp_path / "alias" / "tone"))
    assert sources.fetch(str(root / "tone"))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_fifos_and_directories_in_place_of_files_do_not_hang(root, sources, name):
    tone = write_files(root / "tone")
    (tone / name).unlink()
    os.mkfifo(tone / name)
    for fetch in (lambda: sources.fetch("tone"), lambda: sources.fetch_trusted(tone)):
        with pytest.raises(SourceForbidden):
            fetch()
    (tone / name).unlink()
    (tone / name).mkdir()
    with pytest.raises(SourceForbidden):
        sources.fetch("tone")


def test_a_fifo_put_in_place_after_the_check_does_not_hang_either(root, sources, monkeypatch):
    tone = write_files(root / "tone")
    regular = os.stat(tone / CONFIG_FILE)
    (tone / CONFIG_FILE).unlink()
    os.mkfifo(tone / CONFIG_FILE)
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: regular)
    with pytest.raises(SourceForbidden, match="regular"):
        sources.fetch("tone")


def test_a_file_in_place_of_a_directory_is_forbidden(root, sources):
    (root / "plain").write_bytes(b"")
    with pytest.raises(SourceForbidden):
        sources.fetch("plain")


def test_a_huge_sparse_file_is_refused_before_it_is_read(root, sources):
    tone = write_files(root / "tone")
    os.truncate(tone / WEIGHTS_FILE, 9 << 30)
    with pytest.raises(AdapterTooLarge, match="limit"):
        sources.fetch("tone")


def test_the_size_limit_is_inclusive(root):
    raw = make_raw()
    write_files(root / "tone", raw)
    exact = Limits(file_bytes=len(raw.weights), config_bytes=len(raw.config))
    assert LocalSources((root,), exact).fetch("tone").weights == raw.weights
    for less in (
        Limits(file_bytes=len(raw.weights) - 1),
        Limits(config_bytes=len(raw.config) - 1),
    ):
        with pytest.raises(AdapterTooLarge):
            LocalSources((root,), less).fetch("tone")


def test_pickle_files_are_refused_with_a_hint_and_never_opened(root, sources):
    tone = write_files(root / "tone")
    os.mkfifo(tone / PICKLE_FILE)  # opening it would hang
    assert sources.fetch("tone")
    (tone / WEIGHTS_FILE).unlink()
    with pytest.raises(AdapterInvalid, match="safe_serialization"):
        sources.fetch("tone")
    (tone / PICKLE_FILE).unlink()
    with pytest.raises(SourceNotFound):
        sources.fetch("tone")


def test_trusted_paths_may_lie_anywhere_and_be_symlinks(root, sources):
    outside = write_files(root.parent / "outside")
    (root.parent / "link").symlink_to(outside)
    assert sources.fetch_trusted(root.parent / "link").weights == make_raw().weights
    with pytest.raises(SourceNotFound):
        sources.fetch_trusted(root.parent / "absent")


def test_a_root_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(SourceNotFound):
        LocalSources((tmp_path / "absent",))


def test_discovery_lists_adapters_directly_under_the_roots(tmp_path):
    for path in ("a/tone", "a/nested/deep", "b/tone", "b/domain", "b/.hidden", "b/bad name"):
        write_files(tmp_path / path)
    (tmp_path / "b" / "empty").mkdir()
    (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "tone")
    sources = LocalSources((tmp_path / "a", tmp_path / "b"))
    found = sources.discover()
    assert [item.name for item in found] == ["domain", "tone"]
    assert all(sources.fetch(item.reference) for item in found)


def test_folders_that_cannot_become_adapters_are_told_with_their_reason(tmp_path):
    root = tmp_path / "root"
    for name in ("tone", "bad name", "at@x", "größe", "n" * 200, ".hidden", "linked", "pipe"):
        write_files(root / name)
    write_files(root / "team" / "nested")
    (root / "empty").mkdir()
    (root / "link").symlink_to(root / "tone")
    (root / "loop").symlink_to(root / "loop")
    (root / "file").write_text("of nobody")
    for name in ("linked", "pipe"):
        (root / name / CONFIG_FILE).unlink()
    (root / "linked" / CONFIG_FILE).symlink_to(root / "tone" / CONFIG_FILE)
    os.mkfifo(root / "pipe" / CONFIG_FILE)
    os.mkdir(os.fsencode(root) + b"/\xff")
    sources = LocalSources((root,))
    told = {folder.name: folder.reason for folder in sources.passed_over()}
    named = {"bad name", "at@x", "größe", "n" * 200, "\\udcff"}
    assert told.keys() == named | {"empty", "link", "linked", "pipe"}
    assert all("rename the folder" in told[name] for name in named)
    assert "symlink" in told["link"]
    assert f"no {CONFIG_FILE}" in told["empty"]
    assert "not a regular file" in told["linked"]
    assert "not a regular file" in told["pipe"]
    assert [found.name for found in sources.discover()] == ["tone"]


def test_what_is_read_is_one_of_the_files_ever_written(root, sources):
    """A writer swaps the weights all the time: every read is whole, old or new, or refused."""
    good = [make_raw(make_config(), make_tensors(seed=seed)) for seed in (1, 2)]
    versions = {read(raw).spec.version for raw in good}
    tone = write_files(root / "tone", good[0])
    done = threading.Event()

    def swap():
        turn = 0
        while not done.is_set():
            turn += 1
            (tone / "new").write_bytes(good[turn % 2].weights)
            os.replace(tone / "new", tone / WEIGHTS_FILE)

    writer = threading.Thread(target=swap)
    writer.start()
    try:
        seen: set[Digest] = {read(sources.fetch("tone")).spec.version for _ in range(100)}
    finally:
        done.set()
        writer.join()
    assert seen <= versions


def test_bytes_do_not_change_when_the_file_does(root, sources):
    tone = write_files(root / "tone")
    raw = sources.fetch("tone")
    before = bytes(raw.weights)
    (tone / WEIGHTS_FILE).write_bytes(b"\0" * 10)
    assert raw.weights == before


def test_no_descriptor_is_left_open(root, sources):
    write_files(root / "tone")
    (root / "empty").mkdir()
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        sources.fetch("tone")
        for bad in ("empty", "absent", "tone/adapter_config.json"):
            with pytest.raises((SourceNotFound, SourceForbidden)):
                sources.fetch(bad)
    assert len(os.listdir("/proc/self/fd")) == count


@pytest.mark.parametrize("most", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("change", [-1, 0, 1, 9])
def test_a_file_that_comes_in_pieces_is_whole_or_seen_to_change(
    root, sources, monkeypatch, most, change
):
    """The system gives two gigabytes at a time; here it gives less."""
    file = write_files(root / "tone") / WEIGHTS_FILE
    written = file.read_bytes()[:300]
    file.write_bytes(written)
    read_all, readv, asked = os.read, os.readv, []

    def grow(fd: int) -> None:
        """After the size was looked at, before the last piece."""
        if not asked and os.fstat(fd).st_size == len(written):
            os.truncate(file, len(written) + change)
            asked.append(fd)

    def one(fd: int, size: int) -> bytes:
        grow(fd)
        return read_all(fd, min(size, most))

    def into(fd: int, views: list[memoryview]) -> int:
        grow(fd)
        return readv(fd, [views[0][:most]])

    monkeypatch.setattr("fader_adapters.source.os.read", one)
    monkeypatch.setattr("fader_adapters.source.os.readv", into)
    if not change:
        assert sources.fetch("tone").weights == written
        return
    with pytest.raises(AdapterInvalid, match="changed while it was read"):
        sources.fetch("tone")


@pytest.mark.parametrize("call", ["fstat", "read", "readv"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_an_error_of_the_source_and_leaves_no_descriptor(
    root, sources, monkeypatch, call, code
):
    write_files(root / "tone")
    whole, read_all = sources.fetch("tone").weights, os.read
    count = len(os.listdir("/proc/self/fd"))

    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("fader_adapters.source.os.read", lambda fd, size: read_all(fd, 9))
        patch.setattr(f"fader_adapters.source.os.{call}", fail)
        for fetch in (lambda: sources.fetch("tone"), lambda: sources.fetch_trusted(root / "tone")):
            with pytest.raises(SourceUnavailable, match=rf"{errno.errorcode[code]}.*mend the disk"):
                fetch()
    assert len(os.listdir("/proc/self/fd")) == count
    assert sources.fetch("tone").weights == whole


def test_a_file_that_memory_has_no_room_for_is_too_large(root, sources, monkeypatch):
    write_files(root / "tone")

    def fail(fd: int, size: int) -> bytes:
        raise MemoryError

    monkeypatch.setattr("fader_adapters.source.os.read", fail)
    with pytest.raises(AdapterTooLarge, match="memory"):
        sources.fetch("tone")


PASSING = ["EMFILE", "ENFILE", "ENOMEM", "EIO", "ESTALE", "EINTR", "EAGAIN"]


@pytest.mark.parametrize("call", ["open", "stat"])
@pytest.mark.parametrize("code", [*PASSING, "EACCES", "ELOOP", "ENXIO"])
def test_what_passes_is_told_from_what_is_forbidden(root, sources, monkeypatch, call, code):
    write_files(root / "tone")

    def fail(*arguments: object, **options: object) -> int:
        raise OSError(getattr(errno, code), "no")

    error = SourceUnavailable if code in PASSING else SourceForbidden
    with monkeypatch.context() as patch:
        patch.setattr(f"fader_adapters.source.os.{call}", fail)
        with pytest.raises(error) as caught:
            sources.fetch("tone")
        assert call == "stat" or code in str(caught.value)
        if call == "open":
            with pytest.raises(error):
                sources.holds("tone")
    assert sources.holds("tone")


def test_a_root_that_cannot_be_opened_for_now_gives_its_names_to_no_other(tmp_path, monkeypatch):
    write_files(tmp_path / "a" / "tone")
    write_files(tmp_path / "b" / "tone", make_raw(tensors=make_tensors(seed=1)))
    sources, really = LocalSources((tmp_path / "a", tmp_path / "b")), os.open

    def fail(path, *arguments, **options):
        if path == tmp_path / "a":
            raise OSError(errno.ESTALE, "stale")
        return really(path, *arguments, **options)

    monkeypatch.setattr("fader_adapters.source.os.open", fail)
    with pytest.raises(SourceUnavailable):
        sources.fetch("tone")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "has no adapter_config.json$"),
        ({"README.md"}, "has no adapter_config.json$"),
        ({"checkpoint-500/adapter_config.json"}, "its folders checkpoint-500 have one"),
        ({f"epoch_{i}/adapter_config.json" for i in range(6)}, "epoch_3, … have one"),
        ({"adapter.gguf"}, "GGUF"),
        ({"config.json", "model.safetensors"}, "a whole model"),
        ({WEIGHTS_FILE}, "beside its weights"),
        ({CONFIG_FILE}, "has no adapter_model.safetensors$"),
        ({CONFIG_FILE, "model.safetensors"}, "; model.safetensors: rename it"),
        ({CONFIG_FILE, f"{WEIGHTS_FILE}.index.json", "a-1-of-2.safetensors"}, "in shards"),
    ],
)
def test_a_folder_without_an_adapter_says_what_it_has_instead(root, sources, files, told):
    (root / "tone").mkdir()
    for name in files:
        (root / "tone" / name).parent.mkdir(exist_ok=True)
        (root / "tone" / name).write_bytes(b"")
    for fetch in (lambda: sources.fetch("tone"), lambda: sources.fetch_trusted(root / "tone")):
        with pytest.raises(SourceIncomplete, match=told):
            fetch()
    with pytest.raises(SourceNotFound) as absent:
        sources.fetch("absent")
    assert not isinstance(absent.value, SourceIncomplete)


def test_a_folder_without_an_adapter_hides_none_under_a_later_root(tmp_path):
    (tmp_path / "a" / "tone").mkdir(parents=True)
    write_files(tmp_path / "b" / "tone")
    sources = LocalSources((tmp_path / "a", tmp_path / "b"))
    assert sources.fetch("tone").origin == str(tmp_path / "b" / "tone")


def test_a_link_to_another_folder_tells_nothing_of_it(root, sources):
    (root.parent / "outside").mkdir()
    (root.parent / "outside" / "config.json").write_bytes(b"")
    (root / "link").symlink_to(root.parent / "outside")
    with pytest.raises(SourceForbidden):
        sources.fetch("link")
