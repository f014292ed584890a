"""A real server that is killed, and what the next one serves; driven by the command line."""

import json
import shutil
from pathlib import Path

import httpx
import pytest

from fader_server import demo
from fader_server.cli import main
from fader_server.errors import ConfigInvalid
from fader_server.state_file import StateFile
from tests.server.e2e.conftest import Running, start

QUESTION = {"messages": [{"role": "user", "content": "What colour is the sky?"}], "temperature": 0}


def stop(running: Running, *, kill: bool) -> None:
    if kill:
        running.process.kill()
        running.process.wait(30)
    else:
        assert running.terminate() == 0
    assert running.process.stderr is not None
    running.process.stderr.close()


def ask(running: Running, model: str) -> tuple[str, str]:
    """What the server says and which versions said it."""
    url = f"{running.url}/v1/chat/completions"
    answer = httpx.post(url, json=QUESTION | {"model": model}, timeout=60)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["message"]["content"]
    return text, answer.headers["x-fader-blend"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("shout", "german", "pirate"):
        shutil.copytree(demo.adapter_dirs()[name], tmp_path / "root" / "team" / name)
    return tmp_path / "root"


@pytest.mark.slow
def test_after_a_kill_the_next_server_has_adapters_pins_recipes_and_their_versions(root, capsys):
    state = root.parent / "state"
    flags = ["--state-dir", str(state)]
    first = start(root, *flags)

    def run(*arguments: str) -> dict:
        capsys.readouterr()
        code = main(["adapters", *arguments, "--url", first.url, "--json"])
        told = capsys.readouterr()
        assert code == 0, told.err
        return json.loads(told.out)

    old = run("load", "voice", "team/shout", "--pin")["version"]
    run("recipe", "set", "fixed", f"voice@{old[:12]}")
    run("recipe", "set", "mixed", "voice:0.5", "json:0.5")
    run("swap", "voice", "team/german")
    run("load", "guest", "team/pirate")
    run("unload", "guest")
    run("pin", "json")
    run("unload", "polite")
    before = (run("list"), run("recipe", "list"))
    said = {model: ask(first, model) for model in ("voice", "fixed", "mixed", "json")}
    assert said["fixed"] == ("THE SKY IS BLUE.", f"voice@{old[:12]}=1")
    assert said["voice"][0] == "Der Himmel ist blau."
    with pytest.raises(ConfigInvalid, match="another server"), StateFile(state).locked():
        pass
    stop(first, kill=True)
    with StateFile(state).locked():
        pass

    first = start(root, *flags)
    try:
        after = (run("list"), run("recipe", "list"))
        for reports in (before[0], after[0]):
            for report in reports:
                for moving in ("created", "tier"):
                    del report[moving]
        assert after == before
        assert "polite" not in {report["name"] for report in after[0]}
        assert {model: ask(first, model) for model in said} == said
    finally:
        stop(first, kill=False)
