"""A real server whose adapters come from a Hub, from folders that change, and on first use."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE, RawAdapter
from fader_server import demo
from tests.adapters.fake_hub import OTHER_COMMIT, FakeHub, serving
from tests.server.e2e.conftest import Running, start

pytestmark = pytest.mark.slow

QUESTION = {"messages": [{"role": "user", "content": "What colour is the sky?"}], "temperature": 0}
SHOUT, GERMAN = "THE SKY IS BLUE.", "Der Himmel ist blau."


def raw(name: str) -> RawAdapter:
    folder = demo.adapter_dirs()[name]
    return RawAdapter(
        (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes(), name
    )


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with serving() as hub:
        for repo, name in (("org/shout", "shout"), ("org/german", "german"), ("other/x", "json")):
            hub.add(repo, raw(name))
        hub.add("org/german", raw("pirate"), OTHER_COMMIT, "pirate")
        hub.add("org/broken", RawAdapter(raw("shout").config, raw("shout").weights[:-1], "x"))
        yield hub


@pytest.fixture(scope="module")
def server(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "root" / "team").mkdir(parents=True)
    shutil.copytree(demo.adapter_dirs()["json"], folder / "root" / "team" / "nested")
    flags = ["--adapter-hub", "org", "--resolve-adapters", "--watch-adapters"]
    flags += ["--state-dir", str(folder / "state")]
    with start(folder / "root", *flags, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0") as running:
        yield running
        assert running.metric("fader_adapter_leases") == 0
        assert running.terminate() == 0


def ask(server: Running, model: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=QUESTION | {"model": model}, timeout=60
    )


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_a_hundred_first_requests_are_one_download(server, hub):
    body = QUESTION | {"model": "org/shout", "max_tokens": 8}
    before = hub.downloads

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            url = f"{server.url}/v1/chat/completions"
            return await asyncio.gather(*(client.post(url, json=body) for _ in range(100)))

    answers = asyncio.run(flood())
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert hub.downloads == before + 2
    assert text(ask(server, "org/shout")) == SHOUT
    assert server.get("/v1/adapters/org/shout").json()["name"] == "org/shout"


def test_forbidden_missing_and_malformed_names_cannot_be_told_apart(server, hub):
    asked = len(hub.asked)
    told = set()
    for name in (
        "other/x",
        "other/absent",
        "absent",
        "team/absent",
        "team",
        "a/b/c",
        "../x",
        "team/../team/nested",
        "/etc",
        "org/../other",
    ):
        answer = ask(server, name)
        error = answer.json()["error"]
        told.add((answer.status_code, error["code"], error["message"].replace(name, "…")))
    assert {status for status, _, _ in told} == {404}
    assert {code for _, code, _ in told} == {"model_not_found"}
    assert len(hub.asked) == asked
    assert ask(server, "org/absent").status_code == 404
    assert len(hub.asked) == asked + 1


def test_a_broken_one_is_fetched_once_and_refused_many_times(server, hub):
    before = hub.downloads
    answers = [ask(server, "org/broken") for _ in range(5)]
    assert {answer.status_code for answer in answers} == {409}
    assert {answer.json()["error"]["code"] for answer in answers} == {"adapter_load_failed"}
    assert hub.downloads == before + 2


def test_a_nested_folder_and_a_blend_load_on_first_use(server):
    assert text(ask(server, "team/nested")) == '{"answer": "The sky is blue."}'
    body = QUESTION | {"model": demo.SERVED_NAME}
    body["adapters"] = [{"name": "org/german", "weight": 1.0}]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert text(answer) == GERMAN
    assert "org/german@" in answer.headers["x-fader-blend"]


def test_a_load_by_hand_takes_a_revision_and_a_pin_of_content(server):
    url = f"{server.url}/v1/adapters/corsair"
    body = {"source": "org/german", "revision": "pirate"}
    loaded = httpx.put(url, json=body, timeout=60)
    assert loaded.status_code == 201, loaded.text
    assert loaded.json()["revision"] == OTHER_COMMIT
    assert text(ask(server, "corsair")) == "Arr! The sky be blue, matey."
    body["sha256"] = "0" * 64
    assert httpx.put(url, json=body, timeout=60).status_code == 409
    state = json.loads((server.root.parent / "state" / "adapters.json").read_text())
    assert state["adapters"]["corsair"]["revision"] == OTHER_COMMIT
    assert "org/shout" not in state["adapters"]
    refused = [
        httpx.put(url, json={"source": source}, timeout=60)
        for source in ("other/x", "org/absent", "s3://bucket/x", "/etc", "../x")
    ]
    assert {(r.status_code, r.json()["error"]["message"]) for r in refused} == {
        (404, refused[0].json()["error"]["message"])
    }


def test_an_unloaded_name_is_not_brought_back_by_a_request(server):
    assert text(ask(server, "org/german")) == GERMAN
    assert httpx.delete(f"{server.url}/v1/adapters/org/german").status_code == 200
    assert ask(server, "org/german").status_code == 404
    state = json.loads((server.root.parent / "state" / "adapters.json").read_text())
    assert state["adapters"]["org/german"] is None
    assert server.metric("fader_adapter_loads_total") >= 4


def test_a_hub_that_fails_is_a_503_that_may_be_tried_again(server, hub):
    hub.status = 503
    try:
        body = {"source": "org/german", "revision": "new-branch"}
        answer = httpx.put(f"{server.url}/v1/adapters/later", json=body, timeout=60)
    finally:
        hub.status = 200
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "true"
    assert answer.json()["error"]["code"] == "adapter_load_failed"


def test_folders_that_come_change_and_go_are_followed(server, tmp_path_factory):
    aside: Path = server.root.parent / "aside"

    def put(content: str) -> None:
        shutil.copytree(demo.adapter_dirs()[content], aside / "watched")
        if (server.root / "watched").exists():
            (server.root / "watched").rename(aside / "old")
        (aside / "watched").rename(server.root / "watched")

    def version() -> str | None:
        return server.get("/v1/adapters/watched").json().get("version")

    aside.mkdir()
    put("shout")
    until(lambda: version() is not None)
    first = version()
    assert text(ask(server, "watched")) == SHOUT
    put("german")
    until(lambda: version() not in (None, first))
    assert text(ask(server, "watched")) == GERMAN
    weights = (server.root / "watched" / WEIGHTS_FILE).read_bytes()
    (server.root / "watched" / WEIGHTS_FILE).write_bytes(weights[:-1])
    until(lambda: any(line["event"].endswith("from its folder") and "reason" in line
                      for line in server.lines))  # fmt: skip
    assert text(ask(server, "watched")) == GERMAN
    shutil.rmtree(server.root / "watched")
    until(lambda: version() is None)


def test_after_a_restart_a_commit_serves_without_the_hub(hub, tmp_path):
    (tmp_path / "root").mkdir()
    flags = ["--adapter-hub", "org", "--state-dir", str(tmp_path / "state"), "--resolve-adapters"]

    def begin() -> Running:
        return start(tmp_path / "root", *flags, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")

    with begin() as first:
        body = {"source": "org/german", "revision": "pirate"}
        loaded = httpx.put(f"{first.url}/v1/adapters/corsair", json=body, timeout=60)
        assert loaded.status_code == 201, loaded.text
        assert text(ask(first, "org/german")) == GERMAN
        assert httpx.delete(f"{first.url}/v1/adapters/org/german").status_code == 200
        assert first.terminate() == 0
    asked = len(hub.asked)
    with begin() as second:
        assert text(ask(second, "corsair")) == "Arr! The sky be blue, matey."
        assert ask(second, "org/german").status_code == 404  # unloaded before
        assert second.terminate() == 0
    assert len(hub.asked) == asked
