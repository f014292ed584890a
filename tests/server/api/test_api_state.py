import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fader_server.api.ports import LoadOrder
from fader_server.errors import ConfigInvalid
from fader_server.state import RememberedAdapters, StateFile, Wanted
from tests.server.api.api_fakes import FakeAdapters, digest

ONE = Wanted("one", None, digest("one"), True)


def remembered(tmp_path) -> RememberedAdapters:
    file = StateFile(tmp_path)
    return RememberedAdapters(FakeAdapters(), file, file.read())


async def test_loads_pins_and_unloads_come_back_after_a_restart(tmp_path):
    before = remembered(tmp_path)
    await before.load(LoadOrder("a", "one", pin=True))
    await before.load(LoadOrder("b", "two"))
    await before.load(LoadOrder("c", "three"))
    before.unload("c")
    before.unload("tone")
    before.pin("b", pinned=True)
    before.close()
    after = remembered(tmp_path)
    await after.restore()
    kept = {info.name: (info.version, info.pinned) for info in after.list()}
    assert kept == {
        "a": (digest("one"), True),
        "b": (digest("two"), True),
        "domain": (digest("domain"), False),
    }
    after.close()


async def test_names_that_come_and_go_do_not_grow_the_file(tmp_path):
    adapters = remembered(tmp_path)
    for n in range(50):
        await adapters.load(LoadOrder(f"run-{n}", "one"))
        adapters.unload(f"run-{n}")
    adapters.close()
    assert StateFile(tmp_path).read() == {}


async def test_what_the_next_start_would_offer_again_stays_unloaded(tmp_path):
    adapters = remembered(tmp_path)
    await adapters.load(LoadOrder("new", "/roots/new"))  # the folder has the name: it is found
    await adapters.load(LoadOrder("tone", "one"))
    for name in ("new", "tone", "domain"):
        adapters.unload(name)
    adapters.close()
    assert StateFile(tmp_path).read() == {"new": None, "tone": None, "domain": None}


async def test_a_refused_load_is_not_remembered(tmp_path):
    from fader_adapters.errors import AdapterInvalid

    adapters = remembered(tmp_path)
    with pytest.raises(AdapterInvalid):
        await adapters.load(LoadOrder("a", "broken"))
    adapters.close()
    assert StateFile(tmp_path).read() == {}


async def test_what_cannot_be_restored_is_reported_and_kept(tmp_path, caplog):
    file = StateFile(tmp_path)
    file.write({"gone": Wanted("missing", None, "0" * 64, False), "a": ONE})
    adapters = remembered(tmp_path)
    await adapters.restore()
    assert [record.fields["adapter"] for record in caplog.records] == ["gone"]
    assert "a" in {info.name for info in adapters.list()}
    assert set(file.read()) == {"a", "gone"}
    adapters.close()


@pytest.mark.parametrize("damage", ["", "{}", "[]", "half", "value"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = StateFile(tmp_path)
    file.write({"a": ONE})
    path = tmp_path / "adapters.json"
    whole = path.read_text()
    changes = {"half": whole[: len(whole) // 2], "value": whole.replace("one", "two")}
    path.write_text(changes.get(damage, damage))
    with pytest.raises(ConfigInvalid, match="damaged"):
        file.read()
    path.write_text(whole)
    assert file.read() == {"a": ONE}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_list(tmp_path, monkeypatch, step):
    file = StateFile(tmp_path)
    file.write({"a": ONE})

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, step, fail)
        else:
            patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(OSError, match="No space"):
            file.write({})
    assert file.read() == {"a": ONE}


async def test_a_load_serves_even_when_it_cannot_be_written(tmp_path, monkeypatch, caplog):
    adapters = remembered(tmp_path)
    monkeypatch.setattr(
        StateFile, "write", lambda self, entries: (_ for _ in ()).throw(OSError(5, "x"))
    )
    assert (await adapters.load(LoadOrder("a", "one"))).info.version == digest("one")
    assert "state cannot be written" in caplog.text
    adapters.close()


WRITER = """
import sys
from pathlib import Path
from fader_server.state import StateFile, Wanted
file = StateFile(Path(sys.argv[1]))
print("ready", flush=True)
n = 0
while True:
    n += 1
    file.write({f"a{k}": Wanted("s", None, str(n), False) for k in range(50)})
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_list(tmp_path):
    choose = random.Random(1)
    paths = os.pathsep.join(filter(None, sys.path))
    for _ in range(30):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(choose.random() * 0.02)
            process.send_signal(signal.SIGKILL)
        entries = StateFile(tmp_path).read()
        assert len({wanted and wanted.version for wanted in entries.values()}) <= 1
    assert json.loads((tmp_path / "adapters.json").read_text())["format"] == 1
