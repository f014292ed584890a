import asyncio
import contextlib
import json
import random
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk

from fader_server.api import sse
from fader_server.core import Request, TokenEvent
from fader_server.errors import EngineFault, NumericFault, Overloaded
from tests.server.api.api_fakes import TEXT, Script, World, endless, say
from tests.server.api.conftest import asgi, listening

CHATS = "/v1/chat/completions"
BODY = {"model": "base", "prompt": "Hallo", "max_tokens": 99, "stream": True}
CHAT = {
    "model": "base",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 99,
    "stream": True,
}


async def events(client: httpx.AsyncClient, path: str, body: dict) -> list:
    """The payloads of a stream; "[DONE]" must be the last."""
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    assert parts[-1] == "data: [DONE]"
    return [json.loads(p.removeprefix("data: ")) for p in parts[:-1] if p.startswith("data:")]


def text_of(chunks: list, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    mine = [choice for choice in choices if choice["index"] == index]
    return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in mine)


async def test_completion_chunks_have_one_head_and_one_end(client):
    chunks = await events(client, "/v1/completions", BODY)
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    for chunk in chunks:
        Completion.model_validate(
            {**chunk, "choices": [{**chunk["choices"][0], "finish_reason": "stop"}]}
        )
        assert "usage" not in chunk
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "stop"
    assert [c["choices"][0]["finish_reason"] for c in chunks][:-1] == [None] * (len(chunks) - 1)
    assert text_of(chunks) == TEXT


async def test_chat_stream_opens_with_the_role(client):
    chunks = await events(client, "/v1/chat/completions", CHAT)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == TEXT
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_usage_comes_last_and_only_when_asked_for(client):
    chunks = await events(
        client, "/v1/completions", {**BODY, "stream_options": {"include_usage": True}}
    )
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", BODY), (CHATS, CHAT)])
@pytest.mark.parametrize("last", [True, False, None])
async def test_usage_so_far_stands_in_every_chunk_where_asked_for(worlds, path, body, last):
    options = {"continuous_usage_stats": True}
    options |= {} if last is None else {"include_usage": last}
    go = threading.Event()
    world = worlds(script=held("abc", go, after=2))
    async with streamed(world, go, path, {**body, "stream_options": options}) as (_, chunks):
        before = await anext(chunks)
        go.set()
        found = [before] + [chunk async for chunk in chunks]
    prompt = before["usage"]["prompt_tokens"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert 1 <= counts[0] <= 2, "two tokens were drawn at most"
    assert counts == sorted(counts)
    assert counts[-1] == 4
    for chunk in found:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == prompt > 0
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
    assert [bool(chunk["choices"]) for chunk in found].count(False) == (last is True)
    assert bool(found[-1]["choices"]) != (last is True)


@pytest.mark.parametrize("said", [False, None])
async def test_usage_so_far_stands_in_no_chunk_otherwise(client, said):
    options = {"continuous_usage_stats": said, "include_usage": None}
    chunks = await events(client, "/v1/completions", {**BODY, "stream_options": options})
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_so_far_is_that_of_all_choices(client):
    options = {"continuous_usage_stats": True, "include_usage": True}
    body = {**CHAT, "n": 3, "stream_options": options}
    chunks = await events(client, CHATS, body)
    assert all(chunk["usage"]["completion_tokens"] > 0 for chunk in chunks)
    assert chunks[-2]["usage"] == chunks[-1]["usage"]
    assert chunks[-1]["usage"]["completion_tokens"] == 3 * (len(TEXT.encode()) + 1)


@pytest.mark.parametrize("seed", range(8))
async def test_concatenated_deltas_are_the_whole_text(worlds, seed):
    choose = random.Random(seed)
    letters = "aé🦊 \n\u2028"
    text = "".join(choose.choice(letters) for _ in range(choose.randint(1, 80)))
    stop = ["".join(choose.choice(letters) for _ in range(2))]
    extra = {
        "stop": stop,
        "echo": choose.random() < 0.5,
        "n": 2,
        "logprobs": 1,
        "max_tokens": choose.randint(1, 300),
    }
    world = worlds(script=say(text))
    async with asgi(world) as client:
        chunks = await events(client, "/v1/completions", {**BODY, **extra, "prompt": ["ä", "🦊"]})
        whole = await client.post(
            "/v1/completions", json={**BODY, **extra, "prompt": ["ä", "🦊"], "stream": False}
        )
    for choice in whole.json()["choices"]:
        index = choice["index"]
        assert text_of(chunks, index) == choice["text"]
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        tokens = [token for c in mine for token in c["logprobs"]["tokens"]]
        offsets = [offset for c in mine for offset in c["logprobs"]["text_offset"]]
        assert tokens == choice["logprobs"]["tokens"]
        assert offsets == choice["logprobs"]["text_offset"]


async def test_error_before_the_first_token_has_a_real_status(worlds):
    world = worlds(script=say(fail_after=0, error=EngineFault("secret 0xdead")))
    async with asgi(world) as client:
        answer = await client.post("/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == "engine_error"
    assert "0xdead" not in answer.text
    assert world.idle


async def test_error_after_the_first_token_stands_in_the_stream(worlds):
    world = worlds()
    world.engine.script = say(fail_after=3, error=NumericFault("row 3"), fail_when=world.told)
    async with asgi(world) as client:
        chunks = await events(client, "/v1/completions", BODY)
    told = text_of(chunks[:-1])
    assert told
    assert "Grü".startswith(told)
    assert chunks[-1]["error"]["code"] == "adapter_numeric_error"
    assert set(chunks[-1]["error"]) == {"message", "type", "param", "code"}
    assert "row 3" not in json.dumps(chunks)


async def test_unexpected_exception_in_a_stream_is_not_silent(worlds, caplog):
    world = worlds()
    world.engine.script = say(fail_after=2, error=ZeroDivisionError("boom"), fail_when=world.told)
    async with asgi(world) as client:
        chunks = await events(client, "/v1/completions", BODY)
    assert chunks[-1]["error"]["code"] == "internal_error"
    assert "boom" in caplog.text


async def test_refusal_of_a_stream_has_a_real_status(client, world: World):
    world.engine.refuse = Overloaded("full")
    answer = await client.post("/v1/completions", json=BODY)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


async def test_queued_stream_gets_pings_then_tokens(worlds):
    world = worlds(ping_interval=0.01)
    world.engine.gate.clear()
    async with (
        listening(world) as port,
        httpx.AsyncClient() as client,
        client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(3)] == [": ping", "", ": ping"]
        world.engine.gate.set()
        rest = [line async for line in lines if line.startswith("data:")]
    assert rest[-1] == "data: [DONE]"
    assert text_of([json.loads(line.removeprefix("data:")) for line in rest[:-1]]) == TEXT


async def test_without_an_interval_nothing_is_pinged_and_nothing_spins(worlds, monkeypatch):
    looks: list[float] = []

    def now() -> float:
        looks.append(time.monotonic())
        assert len(looks) < 1000, "it spins"
        return looks[-1]

    monkeypatch.setattr(sse, "_now", now)
    go = threading.Event()
    world = worlds(ping_interval=0, script=held(TEXT, go))
    async with (
        listening(world) as port,
        httpx.AsyncClient() as client,
        client.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=BODY) as answer,
    ):
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data:")
        before = len(looks)
        await asyncio.sleep(0.1)
        assert len(looks) - before <= 4
        go.set()
        rest = [line async for line in lines]
    assert ": ping" not in rest
    assert "data: [DONE]" in rest


def held(text: str, go: threading.Event, *, after: int = 1) -> Script:
    """A script that draws some tokens, then waits for `go` before it draws the rest."""

    def run(request: Request) -> Iterator[TokenEvent]:
        for count, event in enumerate(say(text)(request)):
            if count == after:
                go.wait(10)
            yield event

    return run


@contextlib.asynccontextmanager
async def streamed(
    world: World, go: threading.Event, path: str, body: dict
) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[dict]]]:
    """An answer whose headers are there, and the events of its stream. Sets `go` at the end."""
    async with listening(world) as port, httpx.AsyncClient(timeout=5) as client:
        try:
            url = f"http://127.0.0.1:{port}{path}"
            async with client.stream("POST", url, json=body) as answer:
                lines = answer.aiter_lines()
                found = (line.removeprefix("data: ") async for line in lines)
                yield answer, (json.loads(text) async for text in found if text[:1] == "{")
        finally:
            go.set()


ROLE = {"role": "assistant", "content": ""}
CALL = '<call>{"name": "f", "arguments": {}}</call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]
HELD = {
    "half a character": ("é!", {}),
    "a stop string's beginning": ("!a", {"stop": "!?"}),
    "a call's beginning": (CALL, {"tools": TOOLS}),
}


@pytest.mark.parametrize("name", HELD)
async def test_a_chat_opens_with_its_first_token_though_it_has_no_text_to_show(worlds, name):
    text, extra = HELD[name]
    go = threading.Event()
    world = worlds(script=held(text, go))
    chat = {**CHAT, **extra}
    async with streamed(world, go, "/v1/chat/completions", chat) as (answer, chunks):
        assert answer.status_code == 200
        assert answer.headers["x-fader-blend"] == "base"
        first = await anext(chunks)
        assert [choice["delta"] for choice in first["choices"]] == [ROLE]
        assert world.engine.open == 1
        go.set()
        rest = [choice async for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in rest]
    assert ROLE not in deltas
    told = "".join(delta.get("content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert (told, len(calls)) == (("", 1) if extra.get("tools") else (text, 0))
    assert [c["finish_reason"] for c in rest if c["finish_reason"]] == [
        "tool_calls" if calls else "stop"
    ]


async def test_nothing_opens_before_the_first_token(worlds):
    go = threading.Event()
    world = worlds(script=held(TEXT, go, after=0))
    with pytest.raises(httpx.ReadTimeout):
        async with (
            listening(world) as port,
            httpx.AsyncClient(timeout=0.2) as client,
            client.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=CHAT),
        ):
            pass
    go.set()


async def test_a_completion_has_its_headers_with_its_first_token(worlds):
    go = threading.Event()
    world = worlds(script=held("é!", go))
    async with streamed(world, go, "/v1/completions", BODY) as (answer, chunks):
        assert answer.status_code == 200
        assert world.engine.open == 1
        go.set()
        found = [chunk async for chunk in chunks]
    assert text_of(found) == "é!"
    assert all(
        chunk["choices"][0]["text"] or chunk["choices"][0]["finish_reason"] for chunk in found
    )


async def test_every_choice_opens_when_one_has_its_first_token(worlds):
    go, world = threading.Event(), worlds()

    def script(request: Request) -> Iterator[TokenEvent]:
        late = request.id.endswith("-1")
        for count, event in enumerate(say("éa")(request)):
            while (late or count) and not go.is_set():
                yield TokenEvent(request.id)
                time.sleep(0.001)
            yield event

    world.engine.script = script
    chat = {**CHAT, "n": 3}
    async with streamed(world, go, "/v1/chat/completions", chat) as (_, chunks):
        first = [(await anext(chunks))["choices"][0] for _ in range(3)]
        assert [(choice["index"], choice["delta"]) for choice in first] == [
            (index, ROLE) for index in range(3)
        ]
        go.set()
        rest = [chunk async for chunk in chunks]
    assert [text_of(rest, index) for index in range(3)] == ["éa"] * 3
    assert all(choice["delta"] != ROLE for chunk in rest for choice in chunk["choices"])


async def test_an_error_of_one_choice_before_any_token_has_a_real_status(worlds):
    world = worlds()

    def script(request: Request) -> Iterator[TokenEvent]:
        if request.id.endswith("-1"):
            yield TokenEvent(request.id, error=EngineFault("x"))
        while True:
            yield TokenEvent(request.id)

    world.engine.script = script
    async with asgi(world) as client:
        answer = await client.post("/v1/chat/completions", json={**CHAT, "n": 2})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "engine_error"
    assert world.idle


async def test_an_error_after_a_first_token_without_text_stands_in_the_stream(worlds):
    world = worlds()
    fault = NumericFault("row 3")
    world.engine.script = say("é", fail_after=1, error=fault, fail_when=world.told)
    async with asgi(world) as client:
        chunks = await events(client, "/v1/chat/completions", CHAT)
    assert chunks[0]["choices"][0]["delta"] == ROLE
    assert chunks[-1]["error"]["code"] == "adapter_numeric_error"
    assert len(chunks) == 2


async def test_first_token_timeout_is_a_504_that_is_not_retried(worlds):
    world = worlds(first_token_timeout=0.02)
    world.engine.gate.clear()
    async with asgi(world) as client:
        for stream in (True, False):
            answer = await client.post("/v1/completions", json={**BODY, "stream": stream})
            assert answer.status_code == 504
            assert answer.json()["error"]["code"] == "first_token_timeout"
            assert answer.headers["x-should-retry"] == "false"
    assert world.idle


async def test_total_timeout_ends_a_running_stream_in_band(worlds):
    world = worlds(request_timeout=0.05, script=endless)
    async with asgi(world) as client:
        chunks = await events(client, "/v1/completions", BODY)
    assert chunks[-1]["error"]["code"] == "request_timeout"
    assert world.idle


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
async def test_disconnect_frees_everything(worlds, stream, queued):
    world = worlds(script=endless, ping_interval=0.01)
    if queued:
        world.engine.gate.clear()
    body = json.dumps({**BODY, "model": "tone", "n": 3, "stream": stream}).encode()
    async with listening(world) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await world.until(lambda: world.engine.open == 3)
        assert world.adapters.leases == 1
        if not queued:
            await asyncio.sleep(0.05)
        writer.close()
        await writer.wait_closed()
        await world.until(lambda: world.idle)
        await world.until(lambda: 'outcome="gone"' in world.metrics.render().decode())
        told = world.metrics.render().decode()
        completed = re.findall(r'fader_tokens_total{direction="completion"} (.*)', told)
        assert (float(completed[0]) > 0 if completed else False) is not queued
    world.engine.gate.set()


async def test_client_that_does_not_read_is_cut_off(worlds):
    """The server's send never returns: after stall_timeout the call ends and nothing leaks."""
    world = worlds(script=endless, stall_timeout=0.05)
    body = json.dumps({**BODY, "model": "tone"}).encode()
    sent: list[str] = []

    async def receive():
        if not sent:
            sent.append("body")
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"",
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "headers": [(b"content-type", b"application/json")], "client": None, "server": None,
    }  # fmt: skip
    await world.app(scope, receive, send)
    assert world.idle
    assert 'outcome="stalled"' in world.metrics.render().decode()


async def test_openai_client_streams_and_reads_errors(worlds):
    world = worlds()
    async with (
        listening(world) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as client,
    ):
        parts = [
            chunk.choices[0].text
            async for chunk in await client.completions.create(
                model="base", prompt="x", max_tokens=99, stream=True
            )
        ]
        assert "".join(parts) == TEXT
        chat = await client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "x"}],
            extra_body={"adapters": [{"name": "tone", "weight": 0.5}]},
        )
        assert chat.choices[0].message.content == TEXT
        assert chat._request_id
        with pytest.raises(openai.NotFoundError) as refused:
            await client.completions.create(model="nope", prompt="x")
        assert refused.value.code == "model_not_found"
        assert [model.id async for model in client.models.list()] == ["base", "tone", "domain"]
        assert (await client.models.retrieve("tone")).id == "tone"
        count = len(world.engine.seen)
        parts = []
        release = threading.Event()
        world.engine.script = say(fail_after=1, error=EngineFault("x"), fail_when=release.is_set)
        stream = await client.completions.create(model="base", prompt="x", stream=True)

        async def read() -> None:
            async for chunk in stream:
                parts.append(chunk)
                release.set()

        with pytest.raises(openai.APIError) as broken:
            await read()
        assert len(parts) == 1
        assert len(world.engine.seen) == count + 1
        assert broken.value.code == "engine_error"


async def test_openai_client_sends_a_crashing_request_once(worlds):
    world = worlds(script=say(fail_after=0, error=EngineFault("x")))
    async with (
        listening(world) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as client,
    ):
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="base", prompt="x")
    assert len(world.engine.seen) == 1


async def test_a_long_echo_with_logprobs_comes_piece_by_piece(client):
    body = BODY | {"prompt": [97] * 200, "echo": True, "logprobs": 2, "max_tokens": 2}
    chunks = await events(client, "/v1/completions", body)
    whole = (await client.post("/v1/completions", json=body | {"stream": False})).json()
    scores = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert max(len(part["tokens"]) for part in scores) == 64
    assert len(scores) >= 4
    for name, items in whole["choices"][0]["logprobs"].items():
        assert [item for part in scores for item in part[name]] == items
    assert text_of(chunks) == whole["choices"][0]["text"] == "a" * 200 + TEXT[:2]
