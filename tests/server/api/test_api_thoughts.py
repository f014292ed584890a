"""What a base thinks stands beside its answer: whole, streamed, with calls, in the usage."""

import json

import pytest

from tests.server.api.api_fakes import EOS, World, say
from tests.server.api.conftest import asgi

JSON = {"content-type": "application/json"}
SAID = "[\nhm, 🦊\n]\n\nHello"
BODY = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99}


@pytest.fixture
def world(worlds) -> World:
    made = worlds(script=say(SAID))
    made.tokenizer.thinks = True
    return made


async def chunks(client, **body):
    answer = await client.post("/v1/chat/completions", json={**BODY, "stream": True, **body})
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines[:-1]]


async def test_a_whole_answer_has_the_thought_in_a_field_of_its_own(client):
    answer = (await client.post("/v1/chat/completions", json=BODY)).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "Hello", "refusal": None, "reasoning_content": "hm, 🦊",
    }  # fmt: skip
    assert choice["finish_reason"] == "stop"
    thought = len("[\nhm, 🦊\n]".encode())
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert answer["usage"]["completion_tokens"] == len(SAID.encode()) + 1


async def test_a_stream_tells_the_thought_first_and_in_its_own_field(client):
    deltas = [c["choices"][0]["delta"] for c in await chunks(client)]
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "hm, 🦊"
    assert "".join(d.get("content", "") for d in deltas) == "Hello"
    fields = [name for d in deltas[1:] for name in ("reasoning_content", "content") if name in d]
    assert fields == sorted(fields, reverse=True)  # none of the thought after the answer began


async def test_logprobs_and_ids_are_of_all_tokens(client):
    answer = (
        await client.post(
            "/v1/chat/completions", json={**BODY, "logprobs": True, "return_token_ids": True}
        )
    ).json()
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [*SAID.encode(), EOS]
    assert len(choice["logprobs"]["content"]) == len(SAID.encode())


async def test_stop_strings_count_in_the_answer_alone(client):
    answer = (await client.post("/v1/chat/completions", json={**BODY, "stop": ["hm", "lo"]})).json()
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("hm, 🦊", "Hel")


async def test_a_thought_that_fills_the_answer_leaves_no_content(client):
    answer = (await client.post("/v1/chat/completions", json={**BODY, "max_tokens": 6})).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("", "hm, ")


async def test_calls_in_a_thought_are_none(worlds):
    call = '<call>{"name": "weather", "arguments": {}}</call>'
    made = worlds(script=say(f"[{call}]{call}"))
    made.tokenizer.thinks = True
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    async with asgi(made) as client:
        answer = (
            await client.post(
                "/v1/chat/completions", json={**BODY, "max_tokens": 500, "tools": [tool]}
            )
        ).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == call
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather"]


async def test_completions_and_bases_that_do_not_think_tell_their_text_as_it_is(client, world):
    body = {"model": "base", "prompt": "x", "max_tokens": 99}
    assert (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"] == SAID
    world.tokenizer.thinks = False
    answer = (await client.post("/v1/chat/completions", json=BODY)).json()
    assert answer["choices"][0]["message"]["content"] == SAID
    assert "completion_tokens_details" not in answer["usage"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_a_past_thought_reaches_the_template(client, world, field):
    said = {"role": "assistant", "content": "y", field: "hm"}
    again = [BODY["messages"][0], said, BODY["messages"][0]]
    await client.post("/v1/chat/completions", json={**BODY, "messages": again})
    assert b"'reasoning_content': 'hm'" in bytes(world.engine.seen[-1].prompt)
    for odd in (None, "", 3, ["hm"], {"text": "hm"}, "\ud800"):
        said[field] = odd
        text = json.dumps({**BODY, "messages": again})
        answer = await client.post("/v1/chat/completions", content=text, headers=JSON)
        assert answer.status_code == 200
        assert b"reasoning_content" not in bytes(world.engine.seen[-1].prompt)
