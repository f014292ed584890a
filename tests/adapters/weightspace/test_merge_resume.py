import hashlib
import os
import shutil

import pytest

from fader_adapters.errors import TargetTaken
from fader_adapters.weightspace import disk
from fader_adapters.weightspace import merge as merging
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.weightspace import models

SHARD = 250_000


def contents(directory) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def run(made, out, **changed):
    given = {"form": "nf4", "shard_bytes": SHARD} | changed
    return merge(made.base, [Ingredient(made.tone, 0.7)], out, **given)


class Camera:
    """Keeps what a kill would leave behind at every instant the disk could be looked at."""

    def __init__(self, out, shots) -> None:
        self.out, self.shots, self.count = out, shots, 0

    def take(self) -> None:
        if self.out.exists():
            shutil.copytree(self.out, self.shots / f"{self.count:04d}")
            self.count += 1

    def around(self, function):
        def wrapped(*given, **more):
            self.take()
            result = function(*given, **more)
            self.take()
            return result

        return wrapped


@pytest.mark.parametrize("form", ["nf4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(files, tmp_path, monkeypatch, form):
    made = files("llama")
    out, shots = tmp_path / "out", tmp_path / "shots"
    shots.mkdir()
    camera = Camera(out, shots)
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", camera.around(os.fsync))
        patch.setattr(disk.os, "replace", camera.around(os.replace))
        add = disk.ShardWriter.add

        def noted(self, name, *given, **more):
            add(self, name, *given, **more)
            if "mlp.up_proj" in name:
                self._file.flush()
                camera.take()

        patch.setattr(disk.ShardWriter, "add", noted)
        whole = run(made, out, form=form)
    assert whole.shards >= 3
    wanted, kept = contents(out), set()
    taken = sorted(shots.iterdir())
    assert len(taken) > 30
    for shot in taken:
        unfinished = not (shot / "config.json").exists()
        again = run(made, shot, form=form)
        kept.add(again.kept)
        assert contents(shot) == wanted, shot.name
        assert again.report == whole.report
        if not unfinished:
            assert again.kept == whole.shards
    assert kept == set(range(whole.shards + 1)), "finished shards are not written again"


def test_finished_shards_are_not_computed_again_but_damaged_ones_are(files, tmp_path, monkeypatch):
    made = files("llama")
    out = tmp_path / "out"
    whole = run(made, out)
    wanted = contents(out)
    written = []
    original = merging._write
    monkeypatch.setattr(
        merging,
        "_write",
        lambda job, shard, *rest: written.append(shard.name) or original(job, shard, *rest),
    )
    assert run(made, out).kept == whole.shards
    assert written == []
    first, second = sorted(out.glob("*.safetensors"))[:2]
    with first.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    second.unlink()
    assert run(made, out).kept == whole.shards - 2
    assert written == [first.name, second.name]
    assert contents(out) == wanted


def test_other_inputs_are_refused_and_what_is_there_stays(files, tmp_path):
    made = files("llama")
    out = tmp_path / "out"
    run(made, out)
    wanted = contents(out)

    def nudge(tensors):
        tensors["model.norm.weight"][0] += 1

    other = models.rewrite(made.base, tmp_path / "other", nudge)
    with pytest.raises(TargetTaken, match="another base;"):
        merge(other, [Ingredient(made.tone, 0.7)], out, form="nf4", shard_bytes=SHARD)
    with pytest.raises(TargetTaken, match="another blend;"):
        merge(made.base, [Ingredient(made.tone, 0.8)], out, form="nf4", shard_bytes=SHARD)
    with pytest.raises(TargetTaken, match="another blend;"):
        merge(made.base, [Ingredient(made.domain, 0.7)], out, form="nf4", shard_bytes=SHARD)
    with pytest.raises(TargetTaken, match="another dtype and another shard bytes"):
        run(made, out, form="bf16", shard_bytes=SHARD + 1)
    assert contents(out) == wanted
    assert run(made, out).kept > 0


def test_foreign_folders_and_files_are_refused(files, tmp_path):
    made = files("llama")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(TargetTaken, match=r"thesis\.txt"):
        run(made, tmp_path / "mine")
    with pytest.raises(TargetTaken, match="is a file"):
        run(made, tmp_path / "mine/thesis.txt")
    assert contents(tmp_path / "mine").keys() == {"thesis.txt"}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/merge_manifest.json").write_text('{"format": "other"}')
    with pytest.raises(TargetTaken, match="cannot be read"):
        run(made, tmp_path / "odd")


def test_two_runs_do_not_write_one_folder(files, tmp_path):
    with disk.sole_writer(tmp_path / "out"), pytest.raises(TargetTaken, match="another run"):
        run(files("llama"), tmp_path / "out")
    assert run(files("llama"), tmp_path / "out").kept == 0


def test_progress_only_grows_and_ends_complete(files, tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    run(
        files("llama"),
        tmp_path / "out",
        progress=lambda what, done, total: seen.setdefault(what, []).append((done, total)),
    )
    assert seen.keys() == {"reading the base", "merging"}
    for steps in seen.values():
        assert steps == sorted(steps)
        assert len(steps) > 2
        assert steps[-1][0] == steps[-1][1] > 0
