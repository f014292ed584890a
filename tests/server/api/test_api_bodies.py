import asyncio
import contextlib
import gzip
import json
import time
from collections.abc import Coroutine

import httpx
import pytest

from tests.server.api.api_fakes import TEXT, World, build_world
from tests.server.api.conftest import asgi, listening

GOOD = {
    "/v1/completions": {"model": "base", "prompt": "x"},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"model": "base", "input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "p"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}
RAW = {
    "empty": b"",
    "not json": b"{",
    "not utf-8": b'{"model":"\xff"}',
    "an array": b"[]",
    "a string": b'"x"',
    "deep": b'{"model":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "very deep": b"[" * 500_000,
    "just too deep": b'{"x":' + b"[" * 40 + b"]" * 40 + b"}",
    "deep objects": b'{"a":' * 20000 + b"1" + b"}" * 20000,
    "NaN": b'{"temperature":NaN}',
    "Infinity": b'{"temperature":-Infinity}',
    "many digits": b'{"seed":' + b"1" * 5000 + b"}",
    "same key twice": b'{"model":"base","model":"tone"}',
    "same key twice inside": b'{"x":{"a":1,"a":2}}',
    "bom": b"\xef\xbb\xbf{}",
    "nul": b'{"model":"\x00"}',
    "too large": b'{"prompt":"' + b"x" * (1 << 20) + b'"}',
}


def check_envelope(answer) -> dict:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] is None or isinstance(body["error"]["code"], str)
    return body["error"]


@pytest.mark.parametrize("path", GOOD)
@pytest.mark.parametrize("name", RAW)
async def test_malformed_bodies_get_an_envelope(client, world: World, path, name):
    answer = await client.post(
        path, content=RAW[name], headers={"content-type": "application/json"}
    )
    assert answer.status_code == (413 if name == "too large" else 400)
    error = check_envelope(answer)
    assert "Traceback" not in answer.text
    assert len(error["message"]) < 300
    assert world.engine.seen == []


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_other_content_types_are_refused(client, media):
    """A browser sends these across origins without asking."""
    headers = {"content-type": media} if media else {}
    answer = await client.post("/v1/completions", content=b"{}", headers=headers)
    assert answer.status_code == 415
    check_envelope(answer)


@pytest.mark.parametrize(("encoding", "status"), [("gzip", 415), ("br", 415), ("identity", 200)])
async def test_a_compressed_body_is_refused_as_what_it_is(client, encoding, status):
    body = json.dumps(GOOD["/v1/completions"]).encode()
    answer = await client.post(
        "/v1/completions",
        content=gzip.compress(body) if status == 415 else body,
        headers={"content-type": "application/json", "content-encoding": encoding},
    )
    assert answer.status_code == status
    if status == 415:
        assert "content-encoding" in check_envelope(answer)["message"]


NAN = float("nan")
BAD = [
    *[("model", v) for v in (None, "", 1, True, [], "x" * 600)],
    *[("prompt", v) for v in (None, "", [], [[]], [""], 1, True, {}, [True], [1, True], [1, "a"],
      ["a", 1], [-1], [257], [[1], []], [[1.0]], "\ud800", [["a"]], [None])],
    *[("max_tokens", v) for v in (0, -1, "1", 1.5, True, 10**400, [])],
    *[("n", v) for v in (0, 17, True, "2", 10**6)],
    *[("temperature", v) for v in (-0.1, 2.1, "1", True, 10**400, [])],
    *[("top_p", v) for v in (-0.1, 1.1, True)],
    *[("top_k", v) for v in (-2, 1.5, True)],
    *[("min_p", v) for v in (-1, 2)],
    *[("presence_penalty", v) for v in (-3, 3, True)],
    *[("repetition_penalty", v) for v in (0, -1, 1e-50, 3e-38, 9e-4)],
    *[("seed", v) for v in (2**63, -(2**63) - 1, "1", True)],
    *[("logprobs", v) for v in (-1, 21, True)],
    *[("stop", v) for v in ("", [""], ["a"] * 33, [1], 1, {}, ["\ud800"], "x" * 1025)],
    ("stop", ["x" * 1024] * 4 + ["x"]),
    *[("stop_token_ids", v) for v in ([True], [257], "1")],
    *[("logit_bias", v) for v in ({"x": 1}, {"257": 1}, {"1": 101}, {"1": True}, {"1": "1"}, [],
      {"-1": 1}, {"1": 1, "01": 1})],
    *[("echo", v) for v in (1, "true")],
    *[("stream", v) for v in (1, "true")],
    *[("stream_options", v) for v in ({"include_usage": True}, 1)],
    ("stream_options", {"continuous_usage_stats": True}),
    *[("best_of", v) for v in (2, True)],
    *[("suffix", v) for v in ("x", "")],
    *[("min_tokens", v) for v in (17, -1)],
    *[("ignore_eos", v) for v in (1,)],
    *[("cache_salt", v) for v in (1, "x" * 300)],
    *[(k, v) for k, v in (("gama", 1), ("adapter", "tone"), ("adapter_id", "tone"),
      ("max_token", 1), ("temprature", 1), ("tempersture", 1))],
    *[("lora_path", v) for v in (1, ["tone"], "../x", "tone@12", "x" * 600)],
    *[("adapters", v) for v in ([], {}, "tone", [1], ["tone"], [{"name": "tone"}] * 9,
      [{"name": "tone", "weight": 17}], [{"name": "tone", "weight": "1"}],
      [{"name": "tone", "weight": True}], [{"name": "tone", "gamma": 1}], [{"weight": 1}],
      [{"name": "../x", "weight": 1}], [{"name": "tone", "weight": 10**400}],
      [{"name": "tone", "weight": 1}, {"name": "tone", "weight": 2}],
      [{"name": "tone@12", "weight": 1}], [{"name": None, "weight": 1}])],
    ("response_format", {"type": "regex"}), ("guided_choice", ["yes", ""]),
    ("structured_outputs", {"grammar": 3}), ("grammar", ["root ::= x"]),
    *[("bad_words", v) for v in ("x", [""], [1], ["\ud800"], ["x" * 129], ["x"] * 257, {})],
    *[("allowed_token_ids", v) for v in ([257], [-1], [True], ["1"], "1", 1, {})],
    ("use_beam_search", True), ("include_stop_str_in_output", "yes"),
    *[("max_completion_tokens", v) for v in (0, "5", True)],
    ("models", ["tone"]), ("models", "tone"), ("models", False),
    ("top_logprobs", 2), ("top_logprobs", False),
    ("add_special_tokens", False), ("skip_special_tokens", False), ("truncate_prompt_tokens", 3),
    ("truncate_prompt_tokens", -1), ("prompt_logprobs", 0), ("length_penalty", 0.5),
    ("length_penalty", True), ("skip_special_tokens", 1), ("detokenize", False),
    ("return_token_ids", 1), ("return_tokens_as_token_ids", 1),
    *[("lora", v) for v in ([{"id": 0, "scale": 1}], [{"id": "tone", "name": "tone", "scale": 1}])],
]  # fmt: skip


@pytest.mark.parametrize("option", ["include_usage", "continuous_usage_stats"])
@pytest.mark.parametrize("value", [1, "true", [], ...])
async def test_stream_options_are_true_or_false(client, world: World, option, value):
    options = True if value is ... else {option: value}
    body = {**GOOD["/v1/completions"], "stream": True, "stream_options": options}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert check_envelope(answer)["param"] == "stream_options"
    assert world.engine.seen == []


@pytest.mark.parametrize(("field", "value"), BAD)
async def test_bad_fields_are_named(client, world: World, field, value):
    body = json.dumps({**GOOD["/v1/completions"], field: value})
    answer = await client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert check_envelope(answer)["param"] == field
    assert world.engine.seen == []


CHAT_BAD = [
    *[("messages", v) for v in (None, [], {}, [1], [{}], [{"role": "user"}],
      [{"role": "root", "content": "x"}], [{"role": "user", "content": 1}],
      [{"role": "user", "content": []}],
      [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
      [{"role": "user", "content": "\ud800"}], [{"role": 1, "content": "x"}])],
    ("top_logprobs", 1), ("logprobs", 1), ("logprobs", "0"), ("logprobs", []),
    ("models", ["tone"]), ("top_logprobs", 21), ("tools", [{"type": "function"}]),
    ("tool_choice", "required"), ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("function_call", {"name": "f"}), ("response_format", {"type": "grammar"}),
    ("chat_template", "x"), ("chat_template_kwargs", {"a": 1}), ("max_completion_tokens", 0),
    ("functions", [{}]), ("guided_json", "object"), ("guided_regex", 7),
    ("continue_final_message", True), ("add_generation_prompt", "no"),
    ("echo", True), ("suffix", "x"), ("best_of", 2), ("add_special_tokens", True),
    ("skip_special_tokens", False), ("truncate_prompt_tokens", 3), ("prompt_logprobs", 1),
    ("length_penalty", 2), ("detokenize", False), ("return_token_ids", "yes"),
    *[("prediction", v) for v in ("x", [], {}, {"type": "content"}, {"type": "x", "content": "x"},
      {"type": "content", "content": 1}, {"type": "content", "content": ["x"]},
      {"type": "content", "content": [{"type": "image_url", "text": "x"}]},
      {"type": "content", "content": "\ud800"})],
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), CHAT_BAD)
async def test_bad_chat_fields_are_named(client, field, value):
    body = json.dumps({**GOOD["/v1/chat/completions"], field: value})
    answer = await client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400, answer.text
    assert check_envelope(answer)["param"] == field


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "metadata": {}, "store": False, "service_tier": "auto"},
        {"parallel_tool_calls": True, "something_new": 1, "stream_options": None},
        {"best_of": 1, "n": 1, "logprobs": 0, "max_tokens": 16.0, "stop": []},
        {"use_beam_search": False, "guided_json": None, "bad_words": [], "structured_outputs": {}},
        {"response_format": {"type": "text"}, "include_stop_str_in_output": False, "grammar": ""},
        {"seed": -(2**63), "temperature": 0, "top_k": -1, "logit_bias": {}},
        {"add_special_tokens": True, "skip_special_tokens": True, "length_penalty": 1},
        {"max_completion_tokens": None, "top_logprobs": 0, "truncate_prompt_tokens": None},
        {"length_penalty": 1.0, "prompt_logprobs": None, "detokenize": True},
        {"logprobs": False, "models": []},
        {"temprature": None, "adapter": None, "gamma": None, "max_token": None, "models": None},
    ],
)
async def test_harmless_fields_pass(client, extra):
    answer = await client.post("/v1/completions", json={**GOOD["/v1/completions"], **extra})
    assert answer.status_code == 200, answer.text


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False},
        {"functions": [{"name": "f"}], "function_call": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "tool_choice": None, "max_tokens": None, "reasoning_effort": None},
        {"logprobs": False, "top_logprobs": 0, "modalities": ["text"], "store": True},
        {"logprobs": 0, "top_logprobs": 0, "models": []},
        {"temprature": None, "adapter": None, "gamma": None, "tool": None, "models": None},
        {"verbosity": "low", "prompt_cache_retention": "24h"},
        {"echo": False, "suffix": None, "best_of": 1, "n": 1, "add_special_tokens": False},
        {"skip_special_tokens": True, "truncate_prompt_tokens": None, "length_penalty": 1.0},
        {
            "chat_id": "a",
            "session_id": "b",
            "features": {},
            "background_tasks": {},
            "variables": {},
        },
    ],
)
async def test_what_changes_nothing_in_a_chat_is_plain_chat(client, world: World, extra):
    bare = GOOD["/v1/chat/completions"] | {"seed": 1}
    answers = [
        (await client.post("/v1/chat/completions", json=bare | more)).json() for more in ({}, extra)
    ]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert world.engine.seen[0].prompt == world.engine.seen[1].prompt
    assert world.engine.seen[0].params == world.engine.seen[1].params


@pytest.mark.parametrize("value", [None, "auto"])
async def test_functions_of_the_old_form_are_refused(client, value):
    body = GOOD["/v1/chat/completions"] | {"functions": [{"name": "f"}], "function_call": value}
    error = check_envelope(await client.post("/v1/chat/completions", json=body))
    assert error["param"] == "functions"
    assert 'function_call is "none"' in error["message"]


@pytest.mark.parametrize("stop", [["x" * 1024] * 4, [f"{n:02}" for n in range(31)] + ["jumps"]])
async def test_up_to_32_stop_strings_of_4096_characters_count(client, stop):
    body = {**GOOD["/v1/completions"], "stop": stop, "max_tokens": 99}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    assert text == (TEXT.partition("jumps")[0] if "jumps" in stop else TEXT)


async def test_unknown_fields_are_counted(client, world: World):
    await client.post("/v1/completions", json={**GOOD["/v1/completions"], "zzz": 1, "yyy": 2})
    assert "fader_ignored_fields_total 2.0" in world.metrics.render().decode()


async def test_a_field_that_is_null_is_not_there(client, world: World):
    nothing = dict.fromkeys([f"k{n}" for n in range(100)])
    answer = await client.post("/v1/completions", json={**GOOD["/v1/completions"], **nothing})
    assert answer.status_code == 200, answer.text
    assert "fader_ignored_fields_total 0.0" in world.metrics.render().decode()


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({"max_completion_tokens": 5}, 5),
        ({"max_completion_tokens": 5, "max_tokens": 9}, 5),
        ({"max_completion_tokens": None, "max_tokens": 9}, 9),
        ({"max_completion_tokens": None}, 16),
        ({"max_completion_tokens": 0, "echo": True}, 0),
    ],
)
async def test_max_completion_tokens_of_completions_are_max_tokens(client, world, given, most):
    answer = await client.post("/v1/completions", json={**GOOD["/v1/completions"], **given})
    assert answer.status_code == 200, answer.text
    assert world.engine.seen[0].params.max_tokens == most


@pytest.mark.parametrize(
    ("path", "value"), [("/v1/completions", False), ("/v1/chat/completions", 0)]
)
async def test_logprobs_in_the_other_routes_words_are_none(client, world, path, value):
    answer = await client.post(path, json={**GOOD[path], "logprobs": value})
    assert answer.json()["choices"][0]["logprobs"] is None
    assert world.engine.seen[0].params.logprobs is None


async def test_at_most_three_problems_and_no_echo(client):
    bad = dict.fromkeys(("n", "seed", "top_p", "top_k", "min_p", "max_tokens"), "SECRET")
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x", **bad})
    message = answer.json()["error"]["message"]
    assert message.count(";") == 2
    assert "(and 3 more)" in message
    assert "SECRET" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["x"] * 257},
        {"prompt": ["x"] * 100, "n": 16},
        {"prompt": ["x"] * 10, "n": 16, "max_tokens": 100_000},
        {"prompt": ["x"] * 100_000},
    ],
)
async def test_one_budget_for_prompts_n_and_max_tokens(client, world: World, body):
    answer = await client.post("/v1/completions", json={"model": "base", **body})
    assert answer.status_code == 400
    assert world.engine.seen == []


async def test_what_no_queue_could_hold_is_not_told_to_come_again(worlds):
    world = worlds(max_waiting=3)
    async with asgi(world) as client:
        body = {"model": "base", "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json={**body, "n": 4})).status_code == 400
        assert (await client.post("/v1/completions", json={**body, "n": 3})).status_code == 200


def many_names(at: str) -> dict:
    """Tools that have 64 unknown names each, at a level of theirs, none of them twice."""
    extras = [{f"param{n}x{k}": 1 for k in range(64)} for n in range(128)]
    named = [{"name": f"f{n}", **(extra if at else {})} for n, extra in enumerate(extras)]
    items = [{"type": "function", "function": function} for function in named]
    return {"tools": items if at else [a | b for a, b in zip(items, extras, strict=True)]}


CALLS = [{"function": {"name": "f"}, "id": f"{n}"} for n in range(128)]
HOSTILE = [
    json.dumps({"model": "base", "prompt": [True] * 150_000}).encode(),
    json.dumps({"model": "base", "prompt": [1] * 300_000}).encode(),
    b'{"a":[' + b",".join([b"{}"] * 300_000) + b"]}",
    json.dumps({f"k{n}": 1 for n in range(60_000)}).encode(),
    json.dumps({f"prompt{n}": 1 for n in range(50_000)}).encode(),
    json.dumps({"prompt": "x", "logit_bias": {str(n): 1 for n in range(80_000)}}).encode(),
    json.dumps({"model": "base", "prompt": "ä" * 150_000}).encode(),
]  # fmt: skip
HOSTILE_CHATS = [
    many_names(""),
    many_names("function"),
    {"messages": [
        *[{"role": "assistant", "tool_calls": CALLS}] * 120,
        *[{"role": "tool", "tool_call_id": "x"}] * 3900, {"role": "tool"},
    ]},
    {"messages": [{"role": "user", "content": [""] * 200_000 + [1]}]},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HOSTILE) + len(HOSTILE_CHATS)))
async def test_hostile_bodies_do_not_stop_the_loop(client, number):
    path, body = "/v1/completions", (HOSTILE + [b""] * len(HOSTILE_CHATS))[number]
    if not body:
        path = "/v1/chat/completions"
        body = json.dumps(GOOD[path] | HOSTILE_CHATS[number - len(HOSTILE)]).encode()
    answer, stalled = await beside_a_heart(
        client.post(path, content=body, headers={"content-type": "application/json"})
    )
    assert answer.status_code in ((400, 413) if number < len(HOSTILE) else (400,))
    check_envelope(answer)
    assert stalled < 0.1


async def beside_a_heart(
    call: Coroutine[None, None, httpx.Response],
) -> tuple[httpx.Response, float]:
    """The answer, and the longest that the loop worked on before anybody else's turn, in seconds of
    its own: what other programs take does not count."""
    stalls: list[float] = []

    async def beat() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            stalls.append(time.thread_time() - before)

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0.005)
    answer = await call
    await asyncio.sleep(0.005)  # the stall shows when the heart beats again
    heart.cancel()
    return answer, max(stalls)


MANY_SCORES = {
    "model": "base",
    "prompt": [[97] * 1000] * 16,
    "n": 3,
    "echo": True,
    "logprobs": 20,
    "max_tokens": 1,
}
"""A million logprobs."""


async def test_an_answer_of_many_logprobs_does_not_stop_the_loop(client):
    answer, stalled = await beside_a_heart(client.post("/v1/completions", json=MANY_SCORES))
    assert answer.status_code == 200
    assert len(answer.content) > 5 * 10**6
    assert stalled < 0.4  # all of it at once takes more than a second


async def test_more_logprobs_than_that_are_refused(client, world):
    answer = await client.post("/v1/completions", json=MANY_SCORES | {"n": 4})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "logprobs"
    assert "got 1344000" in answer.json()["error"]["message"]
    assert not world.engine.seen
    fewer = MANY_SCORES | {"n": 4, "logprobs": None}
    assert (await client.post("/v1/completions", json=fewer)).status_code == 200


async def raw(port: int, *parts: bytes) -> bytes:
    """Send bytes as they are; the answer until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("wanted", ["h2c", "websocket"])
async def test_an_upgrade_nobody_needs_is_passed_over_in_silence(world: World, caplog, wanted):
    """Java's client asks for h2c in every request; uvicorn's advice then is an unsafe install."""
    ask = f"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: {wanted}\r\n\r\n"
    async with listening(world) as port:
        with caplog.at_level("WARNING"):
            answer = await raw(port, ask.encode(), b"no HTTP at all\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    told = [record.getMessage() for record in caplog.records if record.name == "uvicorn.error"]
    assert told == ["Invalid HTTP request received."]  # what is wrong is still told


async def test_slow_and_broken_requests_end(worlds):
    world = worlds(body_timeout=0.1)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    async with listening(world) as port:
        slow_body = await raw(port, head + b"content-length: 99\r\n\r\n{")
        assert slow_body.startswith(b"HTTP/1.1 408")
        assert b'"code":"request_timeout"' in slow_body
        assert await raw(port, head) == b""
        assert await raw(port) == b""
        huge = await raw(port, head + b"x-a: " + b"a" * 200_000 + b"\r\n\r\n")
        assert huge == b"" or huge.startswith(b"HTTP/1.1 400")
        vast = await raw(port, head + b"content-length: " + b"9" * 20 + b"\r\n\r\n{")
        assert vast.startswith(b"HTTP/1.1 413")  # at once, as any that is too large
        two = await raw(port, head + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}")
        assert two.startswith(b"HTTP/1.1 400")
        assert b'"code": "bad_request"' in two
        assert (await raw(port, b"no HTTP at all\r\n\r\n")).count(b'"error"') == 1
        chunked = (
            head
            + b"transfer-encoding: chunked\r\n\r\n"
            + b"fffff\r\n"
            + b"x" * 0xFFFFF
            + b"\r\n"
            + b"ff\r\n"
            + b"x" * 255
            + b"\r\n"
        )
        assert (await raw(port, chunked)).startswith(b"HTTP/1.1 413")


async def test_two_ways_to_tell_the_length_end_the_connection(worlds):
    lengths = [b"content-length: 5\r\n", b"transfer-encoding: chunked\r\n"]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    second = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    smuggled = b"\r\n2\r\n{}\r\n0\r\n\r\n" + second
    async with listening(worlds()) as port:
        both = await raw(port, head + b"".join(lengths) + smuggled)
        chunked = await raw(port, head + lengths[1] + smuggled)
    assert both.count(b"HTTP/1.1 ") == 1
    assert b'"code":"bad_request"' in both
    assert chunked.count(b"HTTP/1.1 ") == 2


GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


async def test_one_connection_too_many_hears_it(worlds):
    world = worlds(max_connections=2)
    async with listening(world) as port:
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await asyncio.sleep(0.05)
        answer = await raw(port, GET)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer.lower()
        assert b'"code": "overloaded"' in answer
        for _, writer in kept:
            writer.close()
        await asyncio.sleep(0.05)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_an_idle_connection_makes_place(worlds):
    """The one that waited longest; who is served keeps its own."""
    world = worlds(max_connections=2)
    world.engine.gate.clear()
    async with listening(world) as port:
        idle, busy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        idle[1].write(GET)
        await idle[0].readuntil(b"}")
        body = b'{"model": "base", "prompt": "x"}'
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        busy[1].write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + head + body)
        await world.until(lambda: world.engine.open == 1)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
        assert await idle[0].read() == b""
        world.engine.gate.set()
        assert (await busy[0].readline()).startswith(b"HTTP/1.1 200 ")
        for _, one in (idle, busy, (reader, writer)):
            one.close()


async def test_random_bodies_never_become_a_500():
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
        ),
        max_leaves=12,
    )
    from fader_server.api.choosing import Limits
    from fader_server.api.known import CHAT_FIELDS, COMPLETION_FIELDS
    from fader_server.api.schemas import read_chat, read_completion
    from fader_server.errors import RequestInvalid

    limits = Limits(max_n=16, max_choices=256, max_call_tokens=1 << 20, max_terms=8, vocab_size=257)
    names = st.sampled_from(sorted(CHAT_FIELDS | COMPLETION_FIELDS))

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names | st.text(max_size=6), json_values, max_size=8))
    def check(body: dict) -> None:
        for read in (read_completion, read_chat):
            with contextlib.suppress(RequestInvalid):
                read({"model": "base", "prompt": "x", **body}, limits)

    check()


async def test_what_a_call_may_generate_is_for_all_of_its_choices(worlds):
    world = worlds(max_call_tokens=100)
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "n": 8}
    async with asgi(world) as client:
        assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
        refused = await client.post("/v1/chat/completions", json=chat | {"max_tokens": 13})
    assert {request.params.max_tokens for request in world.engine.seen} == {12}
    assert refused.status_code == 400


async def test_a_calls_choices_are_one_call_to_the_engine(worlds):
    world, told = worlds(), []
    submit = world.engine.submit
    world.engine.submit = lambda *given, further: told.append(further) or submit(*given)
    async with asgi(world) as client:
        body = {"model": "base", "prompt": ["a", "b"], "n": 2}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert told == [False, True, True, True]


def test_two_worlds_share_nothing():
    first, second = build_world(), build_world()
    first.metrics.ignored(3)
    assert "fader_ignored_fields_total 0.0" in second.metrics.render().decode()
    for world in (first, second):
        world.engine.stop()


async def test_every_5xx_text_is_fixed(worlds):
    from tests.server.api.api_fakes import say

    world = worlds(script=say(fail_after=0, error=RuntimeError("/secret/path 0xdeadbeef")))
    async with asgi(world) as client:
        answer = await client.post("/v1/completions", json=GOOD["/v1/completions"])
    assert answer.status_code == 500
    assert check_envelope(answer)["code"] == "internal_error"
    assert "secret" not in answer.text
