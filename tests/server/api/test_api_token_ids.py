"""`return_token_ids`, as vLLM has it: every token of an answer and of its prompt, once."""

import json
from collections import defaultdict

import pytest

from tests.server.api.api_fakes import EOS, TEXT, World, say
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import GOOD
from tests.server.api.test_api_streaming import events, text_of
from tests.server.api.test_api_tools import OFFER, called

ROUTES = ("/v1/completions", "/v1/chat/completions")
IDS = {"return_token_ids": True, "max_tokens": 400}
TOKENS = [*TEXT.encode(), EOS]


def own(chunks: list) -> dict[int, list[int]]:
    """The ids of every choice of a stream."""
    found = defaultdict(list)
    for chunk in chunks:
        for choice in chunk["choices"]:
            found[choice["index"]] += choice.get("token_ids", [])
    return found


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("asked", [False, None])
async def test_who_does_not_ask_gets_no_ids(client, route, asked):
    body = {**GOOD[route], "return_token_ids": asked}
    assert "token_ids" not in (await client.post(route, json=body)).text
    assert "token_ids" not in (await client.post(route, json={**body, "stream": True})).text


async def test_a_completion_has_its_tokens_and_its_prompts_in_each_choice(client):
    body = {"model": "base", "prompt": ["ab", [5, 6]], "n": 2, **IDS}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert [c["token_ids"] for c in answer["choices"]] == [TOKENS] * 4
    assert [c["prompt_token_ids"] for c in answer["choices"]] == [[97, 98]] * 2 + [[5, 6]] * 2
    assert answer["usage"]["completion_tokens"] == 4 * len(TOKENS)
    chunks = await events(client, "/v1/completions", {**body, "stream": True})
    assert own(chunks) == dict.fromkeys(range(4), TOKENS)
    firsts = [chunk["choices"][0] for chunk in chunks[:4]]
    assert [c["prompt_token_ids"] for c in firsts] == [[97, 98]] * 2 + [[5, 6]] * 2
    assert "prompt_token_ids" not in json.dumps(chunks[4:])
    assert text_of(chunks, 3) == TEXT


async def test_an_echo_is_no_token_of_the_answer(client):
    body = {"model": "base", "prompt": "ab", "echo": True, "logprobs": 1, **IDS}
    (choice,) = (await client.post("/v1/completions", json=body)).json()["choices"]
    assert choice["text"] == "ab" + TEXT
    assert choice["token_ids"] == TOKENS
    (choice,) = (await client.post("/v1/completions", json={**body, "max_tokens": 0})).json()[
        "choices"
    ]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([], [97, 98])


async def test_a_chat_has_its_prompt_once_and_tokens_in_each_choice(client, world: World):
    body = {**GOOD[ROUTES[1]], "n": 2, **IDS}
    answer = (await client.post(ROUTES[1], json=body)).json()
    prompt = list(world.engine.seen[0].prompt)
    assert answer["prompt_token_ids"] == prompt
    assert [c["token_ids"] for c in answer["choices"]] == [TOKENS] * 2
    assert not any("prompt_token_ids" in choice for choice in answer["choices"])
    chunks = await events(client, ROUTES[1], {**body, "stream": True})
    assert own(chunks) == {0: TOKENS, 1: TOKENS}
    assert [chunk.get("prompt_token_ids") for chunk in chunks[:3]] == [prompt, prompt, None]


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_whose_text_is_never_told_are_there(worlds, stream):
    """Those of a stop string, of a call of a tool, and those held back for either."""
    said = called("Köln")
    cases = (
        (ROUTES[0], {"stop": TEXT[3:5]}, TEXT, TEXT[:5].encode()),
        (ROUTES[1], OFFER, said, (*said.encode(), EOS)),
    )
    for route, extra, script, expected in cases:
        world = worlds(script=say(script))
        async with asgi(world) as client:
            body = {**GOOD[route], **IDS, **extra, "stream": stream}
            if stream:
                found = own(await events(client, route, body))[0]
            else:
                answer = (await client.post(route, json=body)).json()
                found = answer["choices"][0]["token_ids"]
                assert answer["usage"]["completion_tokens"] == len(found)
        assert found == list(expected)
