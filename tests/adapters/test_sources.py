"""One resolver: what a reference means, and that a folder comes before the Hub."""

import os

import pytest

from fader_adapters.errors import AdapterInvalid, SourceForbidden, SourceNotFound
from fader_adapters.hub import HubSource
from fader_adapters.source import LocalSources
from fader_adapters.sources import Sources
from tests.adapters.fake_hub import COMMIT, serving
from tests.adapters.peft_files import make_raw, make_tensors, write_files

HERE = make_raw()
THERE = make_raw(tensors=make_tensors(seed=1))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def hub():
    with serving() as hub:
        hub.add("org/tone", THERE)
        yield hub


@pytest.fixture
def sources(root, hub):
    return Sources(LocalSources((root,)), hub=HubSource(("org",), endpoint=hub.url, offline=False))


def test_a_folder_comes_before_a_hub_repository_of_its_name(root, hub, sources):
    assert sources.fetch("org/tone").weights == THERE.weights
    write_files(root / "org" / "tone", HERE)
    asked = len(hub.asked)
    assert sources.fetch("org/tone").weights == HERE.weights
    assert len(hub.asked) == asked


def test_an_unfinished_folder_is_not_replaced_by_the_hub(root, hub, sources):
    (root / "org" / "tone").mkdir(parents=True)
    with pytest.raises(SourceNotFound):
        sources.fetch("org/tone")
    assert hub.asked == []


def test_a_symlink_in_the_way_is_forbidden_not_passed_by(root, hub, sources):
    (root / "org").symlink_to("/etc")
    with pytest.raises(SourceForbidden):
        sources.fetch("org/tone")
    assert not sources.offers("org/tone")
    assert hub.asked == []


def test_revisions_belong_to_the_hub(root, sources):
    assert sources.fetch("org/tone", "main").revision == COMMIT
    assert sources.fetch(f"org/tone@{COMMIT}", COMMIT).weights == THERE.weights
    write_files(root / "flat")
    write_files(root / "org" / "local")
    for reference in ("flat", "org/local", "absent"):
        with pytest.raises(AdapterInvalid, match="revision"):
            sources.fetch(reference, "main")


@pytest.mark.parametrize("reference", ["memory://x/y", "other/tone", "org/absent", "absent", "..",
                                       "/etc", "a/b/c", "s3://bucket/tone"])  # fmt: skip
def test_everything_else_is_refused(sources, reference):
    with pytest.raises((SourceForbidden, SourceNotFound)):
        sources.fetch(reference)


def test_offers_asks_nobody(root, hub, sources):
    write_files(root / "tone")
    write_files(root / "team" / "tone")
    offered = {"tone", "team/tone", "org/tone", "org/never-looked-at"}
    refused = {"absent", "other/tone", "../root/tone", "s3://x/y", "", "/etc", "tone\0"}
    assert {name for name in offered | refused if sources.offers(name)} == offered
    assert hub.asked == []


def test_without_a_hub_an_id_is_only_a_path(root):
    closed = Sources(LocalSources((root,)))
    assert not closed.offers("org/tone")
    with pytest.raises(SourceNotFound):
        closed.fetch("org/tone")


def test_the_operator_may_name_any_folder_and_any_repository(root, hub, sources, monkeypatch):
    hub.add("other/tone", THERE)
    assert sources.fetch_trusted("other/tone").weights == THERE.weights
    outside = write_files(root.parent / "outside", HERE)
    assert sources.fetch_trusted(str(outside)).weights == HERE.weights
    write_files(root.parent / "other" / "tone", HERE)
    monkeypatch.chdir(root.parent)
    assert sources.fetch_trusted("other/tone").weights == HERE.weights


def test_stamps_tell_one_content_from_the_next(root, sources):
    tone = write_files(root / "tone", HERE)
    (before,) = sources.discover()
    assert before.complete
    assert sources.discover() == [before]
    os.utime(tone / "adapter_model.safetensors", ns=(1, 1))
    (after,) = sources.discover()
    assert after.stamp != before.stamp
    (tone / "adapter_model.safetensors").unlink()
    (partial,) = sources.discover()
    assert not partial.complete
