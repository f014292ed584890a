"""/v1/responses, whole and streamed: OpenAI's objects and events, as its client types them."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from fader_server.api.choice import Delta, PlacedCall
from fader_server.api.responses.output import Events, Output
from fader_server.core import Request, TokenEvent
from fader_server.errors import EngineFault, NumericFault, Overloaded
from tests.server.api.api_fakes import TEXT, World, say
from tests.server.api.conftest import asgi, listening
from tests.server.api.test_api_bodies import check_envelope

ROUTE = "/v1/responses"
BODY = {"model": "base", "input": "x", "max_output_tokens": 400}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": PARAMETERS}
CALL = '<call>{"name": "f", "arguments": {"city": "Köln"}}</call>'
OTHER = '<call>{"name": "f", "arguments": {}}</call>'
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
MISSING = {"conversation", "image", "input_transformations", "moderation", "prompt"}
"""Keys of OpenAI's object that tell of what is not here."""
MISSING |= {"prompt_cache_diagnostics", "prompt_cache_options", "prompt_cache_retention"}
MISSING |= {"tool_usage", "access_programs"}


async def ask(client: httpx.AsyncClient, **others: Any) -> dict[str, Any]:
    answer = await client.post(ROUTE, json=BODY | others)
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


async def told(client: httpx.AsyncClient, **others: Any) -> list[dict[str, Any]]:
    """The events of a stream, each of its type, in the order of their numbers."""
    answer = await client.post(ROUTE, json=BODY | {"stream": True} | others)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts.pop() == ""
    found = []
    for part in parts:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Their types, repeated ones once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if at == 0 or names[at - 1] != name]


def same(value: Any) -> Any:
    """Without what differs from answer to answer."""
    text = re.sub(r'"(resp|msg|rs|fc)_[0-9a-f]{24}"', r'"\1"', json.dumps(value))
    text = re.sub(r'"call_id": "[A-Za-z0-9]{9}"', '"call_id": ""', text)
    return json.loads(re.sub(r'"(created_at|completed_at)": \d+', r'"\1": 1', text))


def rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items that the deltas of a stream come to."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "content_part.added":
            items[-1]["content"] = [event["part"]]
        elif kind == "function_call_arguments.delta":
            items[-1]["arguments"] += event["delta"]
        elif kind.endswith(".delta"):
            (part,) = items[-1]["content"]
            part["text"] += event["delta"]
            if kind.startswith("output_text"):
                part["logprobs"] += event["logprobs"]
        if kind.endswith(".delta"):
            assert event["item_id"] == items[-1]["id"]
            assert event["output_index"] == len(items) - 1
    return items


async def test_an_answer_has_every_key_of_openais_object(client, world: World):
    answer = await ask(client, metadata={"a": "b"}, user="u", instructions="be kind")
    more = {"store", "system_fingerprint", "presence_penalty", "frequency_penalty"}
    assert answer.keys() - more == Response.model_fields.keys() - MISSING
    (item,) = answer["output"]
    assert item["content"] == [
        {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    ]
    assert (item["role"], item["status"], answer["status"]) == ("assistant", *["completed"] * 2)
    count = len(TEXT.encode()) + 1
    prompt = len(world.engine.seen[0].prompt)
    assert answer["usage"] == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
        "output_tokens": count,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + count,
    }
    assert (answer["metadata"], answer["user"]) == ({"a": "b"}, "u")
    assert (answer["instructions"], answer["store"]) == ("be kind", False)


async def test_adapters_blends_and_headers_are_as_in_chats(client, world: World):
    terms = [{"name": "tone", "weight": 0.5}, {"name": "domain", "weight": -1}]
    for body in ({"model": "tone"}, {"adapters": terms}, {"model": "base:domain"}):
        chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "seed": 1, **body}
        answers = [
            await client.post(ROUTE, json=BODY | {"seed": 1} | body),
            await client.post("/v1/chat/completions", json=chat | {"max_tokens": 400}),
        ]
        first, second = world.engine.seen[-2:]
        assert (first.prompt, first.params, first.blend) == (
            second.prompt, second.params, second.blend,
        )  # fmt: skip
        blends = [answer.headers["x-fader-blend"] for answer in answers]
        assert blends[0] == blends[1] != "base"
        assert len({answer.json()["system_fingerprint"] for answer in answers}) == 1


MADE = {
    "words": (TEXT, {}),
    "a thought": ("[\nhm 🦊\n]\n\nHello", {}),
    "nothing": ("", {}),
    "a thought alone": ("[hm]", {}),
    "a call": (CALL, {"tools": [TOOL]}),
    "all": ("[hm]Wait." + CALL + OTHER, {"tools": [TOOL]}),
    "words between": ("a" + CALL + "b" + OTHER + "c", {"tools": [TOOL]}),
    "a cut thought": ("[hm 🦊]Hello", {"max_output_tokens": 5}),
    "cut words": (TEXT, {"max_output_tokens": 3}),
    "a cut call": (CALL, {"tools": [TOOL], "tool_choice": "required", "max_output_tokens": 46}),
    "a stop string": (TEXT, {"stop": "jumps"}),
    "logprobs": ("[hm]é 🦊!", {"include": ["message.output_text.logprobs"], "top_logprobs": 2}),
}
ITEMS = {
    "words": ["message"],
    "a thought": ["reasoning", "message"],
    "nothing": ["message"],
    "a thought alone": ["reasoning", "message"],
    "a call": ["function_call"],
    "all": ["reasoning", "message", "function_call", "function_call"],
    "words between": ["message", "function_call", "message", "function_call", "message"],
    "a cut thought": ["reasoning"],
    "cut words": ["message"],
    "a cut call": ["function_call"],
    "a stop string": ["message"],
    "logprobs": ["reasoning", "message"],
}


@pytest.mark.parametrize("name", MADE)
async def test_a_stream_comes_to_the_whole_answer(worlds, name):
    text, extra = MADE[name]
    world = worlds(script=say(text))
    world.tokenizer.thinks = True
    async with asgi(world) as client:
        whole, events = await ask(client, **extra), await told(client, **extra)
    cut = "cut" in name
    assert kinds(events)[:2] == ["created", "in_progress"]
    assert kinds(events)[-1] == ("incomplete" if cut else "completed")
    last = events[-1]["response"]
    assert same(last) == same(whole)
    assert [item["type"] for item in last["output"]] == ITEMS[name]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert [i | {"status": "x"} for i in rebuilt(events)] == [i | {"status": "x"} for i in done]
    statuses = [item["status"] for item in done]
    assert statuses == ["completed"] * (len(done) - 1) + ["incomplete" if cut else "completed"]
    why = {"reason": "max_output_tokens"} if cut else None
    assert (last["incomplete_details"], last["status"]) == (why, kinds(events)[-1])


@pytest.mark.parametrize("seed", range(5))
async def test_random_answers_come_to_the_same_in_any_company(worlds, seed):
    choose = random.Random(seed)
    pieces = ("é", "🦊 ", "ab", "<", "<call>", CALL, OTHER, " ")
    text = choose.choice(("", "[hm 🦊]")) + "".join(choose.choices(pieces, k=12))
    world = worlds(script=say(text))
    world.tokenizer.thinks = True
    extra = {"tools": [TOOL], "top_logprobs": 1, "max_output_tokens": choose.randint(20, 400)}
    async with asgi(world) as client:
        whole, events = await ask(client, **extra), await told(client, **extra)
    assert same(events[-1]["response"]["output"]) == same(whole["output"])
    parts = [part for item in whole["output"] for part in item.get("content", ())]
    scored = [part for part in parts if part["type"] == "output_text" and part["text"]]
    assert all(part["logprobs"] for part in scored)


async def test_the_events_of_all_kinds_of_items_come_in_order(worlds):
    world = worlds(script=say("[hm]Wait." + CALL))
    world.tokenizer.thinks = True
    async with asgi(world) as client:
        events = await told(client, tools=[TOOL])
    added, done = ["output_item.added", "content_part.added"], ["content_part.done"]
    ended = ["output_item.done"]
    assert kinds(events) == [
        "created", "in_progress",
        *added, "reasoning_text.delta", "reasoning_text.done", *done, *ended,
        *added, "output_text.delta", "output_text.done", *done, *ended,
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        *ended, "completed",
    ]  # fmt: skip


async def test_logprobs_are_those_of_the_message(worlds):
    world = worlds(script=say("[hm]é!"))
    world.tokenizer.thinks = True
    async with asgi(world) as client:
        for extra in (MADE["logprobs"][1], {"top_logprobs": 2}):
            answer = await ask(client, **extra)
            scores = answer["output"][1]["content"][0]["logprobs"]
            assert [score["bytes"] for score in scores] == [[byte] for byte in "é!".encode()]
            assert {len(score["top_logprobs"]) for score in scores} == {2}
        without = await ask(client, include=["reasoning.encrypted_content"])
        stopped = await ask(client, top_logprobs=1, stop="!")
    assert without["output"][1]["content"][0]["logprobs"] == []
    (part,) = stopped["output"][1]["content"]
    assert (part["text"], len(part["logprobs"])) == ("é", 3)


async def test_logprobs_of_words_between_calls_are_not_those_of_the_calls(worlds):
    world = worlds(script=say("a" + CALL + "bc" + OTHER))
    async with asgi(world) as client:
        answer = await ask(client, tools=[TOOL], top_logprobs=1)
    parts = [item["content"][0] for item in answer["output"] if item["type"] == "message"]
    said = ["".join(score["token"] for score in part["logprobs"]) for part in parts]
    assert [part["text"] for part in parts] == said == ["a", "bc"]


def test_a_token_that_ends_a_call_and_begins_words_is_of_both():
    events = Events(streamed=True)
    output = Output(events, None, {})
    output.add(Delta(0, calls=(PlacedCall(0, "c1", "f", "{"),)))
    output.add(Delta(0, "b", calls=(PlacedCall(0, "", "", "}"),)))
    output.add(Delta(0, finish="tool_calls"))
    call, message = json.loads(output.written)
    assert (call["arguments"], message["content"][0]["text"]) == ("{}", "b")
    assert events.taken().count(b"event: response.output_item.done") == 2


def test_a_line_break_that_parts_two_messages_is_of_neither_item():
    output = Output(Events(streamed=False), None, {})
    for delta in (Delta(0, "\na"), Delta(0, "\nb"), Delta(0, thought="t"), Delta(0, "\nc")):
        output.add(delta)
    output.add(Delta(0, finish="stop"))
    items = json.loads(output.written)
    assert [item["content"][0]["text"] for item in items] == ["\na\nb", "t", "c"]


async def test_calls_of_a_namespace_name_it(worlds):
    world = worlds(script=say(CALL))
    space = {"type": "namespace", "name": "n", "description": "d", "tools": [TOOL]}
    async with asgi(world) as client:
        for tools, name in (([space], "n"), ([TOOL], None)):
            (item,) = (await ask(client, tools=tools))["output"]
            assert (item["name"], item.get("namespace")) == ("f", name)
            assert json.loads(item["arguments"]) == {"city": "Köln"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(NumericFault("row 3"), "adapter_numeric_error"), (ZeroDivisionError(), "internal_error")],
)
async def test_what_fails_under_way_is_told_twice_and_ends_the_stream(worlds, error, code):
    world = worlds()
    world.engine.script = say(fail_after=3, error=error, fail_when=world.told)
    async with asgi(world) as client:
        *_, before, last = await told(client)
    assert (before["type"], before["code"]) == ("error", code)
    assert before["error"]["message"] == before["message"]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": before["message"]}
    assert "row 3" not in json.dumps(last)
    assert world.idle


async def test_openais_client_raises_what_fails_under_way(worlds):
    world = worlds()
    world.engine.script = say(fail_after=3, error=NumericFault("row"), fail_when=world.told)
    async with (
        listening(world) as port,
        openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0
        ) as client,
    ):
        stream = await client.responses.create(model="base", input="x", stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                pass
    assert caught.value.code == "adapter_numeric_error"


async def test_what_fails_before_the_first_event_is_told_behind_an_opening(worlds):
    def late(request: Request):
        world.engine.gate.wait()
        yield TokenEvent(request.id, error=EngineFault("x"))

    world = worlds(script=late, ping_interval=0.01)
    world.engine.gate.clear()
    async with listening(world) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}{ROUTE}"
        async with client.stream("POST", url, json=BODY | {"stream": True}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == ": ping"
            world.engine.gate.set()
            names = [line[7:] async for line in lines if line.startswith("event: ")]
    assert names == ["response.created", "response.in_progress", "error", "response.failed"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("refusal", "status"), [(EngineFault("0xdead"), 500), (Overloaded("full"), 503)]
)
async def test_refusals_have_a_real_status(client, world: World, stream, refusal, status):
    world.engine.refuse = refusal
    answer = await client.post(ROUTE, json=BODY | {"stream": stream})
    assert answer.status_code == status
    check_envelope(answer)
    assert "0xdead" not in answer.text


ID = "/v1/responses/resp_1"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ID), ("DELETE", ID), ("POST", f"{ID}/cancel"), ("GET", f"{ID}/input_items")],
)
async def test_no_response_is_kept(client, method, path):
    answer = await client.request(method, path)
    assert answer.status_code == 404
    error = check_envelope(answer)
    assert error["code"] == "not_found"
    assert "keeps none" in error["message"]


async def test_a_log_line_and_metrics_tell_the_route(worlds: Callable[..., World], caplog):
    caplog.set_level("INFO")
    world = worlds()
    async with asgi(world) as client:
        await ask(client, model="tone")
    (line,) = [r.fields for r in caplog.records if r.name == "fader.request"]
    assert (line["route"], line["adapter"], line["outcome"]) == (ROUTE, "tone", "ok")
    assert f'route="{ROUTE}"' in world.metrics.render().decode()
