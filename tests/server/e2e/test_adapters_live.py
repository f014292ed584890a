"""Loading, swapping and unloading over HTTP while answers are under way."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from fader_server import demo
from tests.server.e2e.conftest import Running, start

QUESTION = {"messages": [{"role": "user", "content": "What colour is the sky?"}], "temperature": 0}


def _ask(server: Running, model: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=QUESTION | {"model": model}, timeout=60
    )


def _text(server: Running, model: str) -> str:
    return _ask(server, model).json()["choices"][0]["message"]["content"]


@contextmanager
def _loaded(server: Running, name: str, source: str) -> Iterator[dict]:
    response = httpx.put(f"{server.url}/v1/adapters/{name}", json={"source": source}, timeout=60)
    assert response.status_code in (200, 201), response.text
    yield response.json()
    httpx.delete(f"{server.url}/v1/adapters/{name}")


def test_vllm_endpoints_word_for_word(server):
    url = f"{server.url}/v1/load_lora_adapter"
    body = {"lora_name": "loud", "lora_path": "copy-of-shout"}
    first = httpx.post(url, json=body, timeout=60)
    assert (first.status_code, first.text) == (
        200,
        "Success: LoRA adapter 'loud' added successfully.",
    )
    assert _text(server, "loud") == "THE SKY IS BLUE."
    again = httpx.post(url, json=body)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    missing = httpx.post(url, json={"lora_name": "x", "lora_path": "not-there"})
    assert missing.status_code == 404
    unload = f"{server.url}/v1/unload_lora_adapter"
    gone = httpx.post(unload, json={"lora_name": "loud"})
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'loud' removed successfully.",
    )
    assert _ask(server, "loud").status_code == 404
    assert httpx.post(unload, json={"lora_name": "loud"}).status_code == 404


def test_a_swap_moves_the_name_and_a_failed_one_leaves_the_old_version(server):
    with _loaded(server, "moving", "copy-of-shout") as first:
        assert _text(server, "moving") == "THE SKY IS BLUE."
        broken = httpx.put(f"{server.url}/v1/adapters/moving", json={"source": "nothing"})
        assert broken.status_code == 404
        assert _text(server, "moving") == "THE SKY IS BLUE."
        body = {"source": "copy-of-german", "if_version": "0" * 12}
        stale = httpx.put(f"{server.url}/v1/adapters/moving", json=body)
        assert stale.status_code == 409
        assert stale.headers["x-should-retry"] == "false"
        body["if_version"] = first["version"]
        swapped = httpx.put(f"{server.url}/v1/adapters/moving", json=body, timeout=60)
        assert swapped.status_code == 200
        assert swapped.json()["version"] != first["version"]
        assert _text(server, "moving") == "Der Himmel ist blau."


def test_a_running_stream_finishes_on_its_version_while_the_name_moves_and_goes(server):
    def collect(into: dict[int, list], started: threading.Event) -> None:
        body = QUESTION | {"model": "held", "stream": True, "n": 16, "max_tokens": 200}
        body |= {"ignore_eos": True, "logprobs": True}
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line[6:])["choices"]:
                    content = (choice["logprobs"] or {"content": []})["content"]
                    told = [(item["token"], item["logprob"]) for item in content]
                    into.setdefault(choice["index"], []).extend(told)
                started.set()

    def run(disturb: bool) -> dict[int, list]:
        with _loaded(server, "held", "copy-of-shout"):
            choices: dict[int, list] = {}
            started = threading.Event()
            reader = threading.Thread(target=collect, args=(choices, started))
            reader.start()
            assert started.wait(30)
            if disturb:
                with _loaded(server, "held", "copy-of-german"):
                    assert _text(server, "held") == "Der Himmel ist blau."
                assert _ask(server, "held").status_code == 404
                assert reader.is_alive(), "the stream was over before the swap"
            reader.join(60)
            return choices

    quiet, disturbed = run(False), run(True)
    assert [len(quiet[i]) for i in range(16)] == [200] * 16
    assert disturbed == quiet
    assert server.metric("fader_adapter_leases") == 0


@pytest.mark.parametrize(
    ("there", "not_there"),
    [
        ("../{root}/copy-of-shout", "../{root}/no-such-thing"),
        ("/etc", "/no-such-thing"),
        ("/proc/self/environ", "/proc/self/no-such-thing"),
        ("copy-of-shout/..", "no-such-thing/.."),
        ("copy-of-shout/adapter_config.json", "copy-of-shout/no-such-thing"),
    ],
)
def test_what_lies_outside_the_roots_cannot_be_told_from_what_does_not_exist(
    server, there, not_there
):
    answers = []
    for source in (there, not_there):
        body = {"source": source.format(root=server.root.name)}
        response = httpx.put(f"{server.url}/v1/adapters/sly", json=body)
        error = response.json()["error"]
        answers.append((response.status_code, error["code"], error["param"]))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404


def test_a_client_that_leaves_frees_everything_within_a_second(server):
    body = QUESTION | {"model": "german", "stream": True, "max_tokens": 900, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.metric("fader_adapter_leases") == 1
    deadline = time.monotonic() + 1.0
    while server.metric("fader_adapter_leases") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.metric("fader_adapter_leases") == 0
    assert server.metric("fader_requests_running") == 0


@pytest.mark.slow
def test_sigterm_ends_what_runs_and_exits_with_zero(tmp_path):
    body = QUESTION | {"model": demo.SERVED_NAME, "stream": True, "max_tokens": 120}
    body["ignore_eos"] = True
    with start(tmp_path) as running:
        url = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            running.process.terminate()
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert running.process.wait(30) == 0
