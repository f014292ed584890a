"""A server's file of tenants is read again on SIGHUP; whoever is being answered is answered."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from fader_server import demo
from tests.server.e2e.conftest import Running, start

FIRST = '[acme]\nkeys = ["sk-old"]\n[other]\nkeys = ["sk-other"]\nadapters = ["german"]\n'
SECOND = '[acme]\nkeys = ["sk-new"]\n[other]\nkeys = ["sk-other"]\nadapters = ["shout"]\n'


def models(server: Running, key: str) -> tuple[int, list[str]]:
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.get(f"{server.url}/v1/models", headers=headers)
    return answer.status_code, [card["id"] for card in answer.json().get("data", [])][1:]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def told(server: Running, event: str) -> list[dict]:
    return [line for line in server.lines if line.get("event") == event]


@pytest.mark.slow
def test_keys_come_and_go_on_sighup_while_streams_run(tmp_path: Path):
    root, file = tmp_path / "adapters", tmp_path / "tenants.toml"
    root.mkdir()
    file.write_text(FIRST)
    body = {"model": demo.SERVED_NAME, "prompt": "x", "stream": True, "max_tokens": 150}
    headers = {"authorization": "Bearer sk-old"}
    with start(root, "--tenants", str(file)) as server:
        assert models(server, "sk-new")[0] == 401
        assert models(server, "sk-other") == (200, ["german"])
        url = f"{server.url}/v1/completions"
        with httpx.stream(
            "POST", url, json=body | {"ignore_eos": True}, headers=headers, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            file.write_text(SECOND)
            server.process.send_signal(signal.SIGHUP)
            until(lambda: len(told(server, "tenants read")) == 1)
            assert models(server, "sk-old")[0] == 401
            assert models(server, "sk-new")[0] == 200
            assert models(server, "sk-other") == (200, ["shout"])
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        file.write_text("[acme]\nkeys = []\n")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: len(told(server, "tenants stay as they are")) == 1)
        assert "sk-" not in str(server.lines)
        assert models(server, "sk-new")[0] == 200
        server.process.terminate()
        assert server.process.wait(30) == 0
