"""Fields that take tokens away, and the one that calls tokens by their ids, as vLLM has them."""

import pytest

from tests.server.api.api_fakes import EOS, TEXT, VOCAB, World, say
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import GOOD, check_envelope
from tests.server.api.test_api_streaming import events
from tests.server.api.test_api_tools import OFFER
from tests.server.test_text_guides import ids

ROUTES = ("/v1/completions", "/v1/chat/completions")


@pytest.mark.parametrize("route", ROUTES)
async def test_every_choice_is_held_to_them_by_a_guide_of_its_own(client, world: World, route):
    body = {**GOOD[route], "n": 2, "allowed_token_ids": [97, 98, EOS], "bad_words": ["b"]}
    answer = await client.post(route, json=body)
    assert answer.status_code == 200, answer.text
    first, second = (request.guide for request in world.engine.seen)
    assert first is not None
    assert first is not second
    assert ids(first.allowed()) == [97, EOS]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [None, []])
async def test_nothing_asked_is_nothing_forbidden(client, world: World, route, value):
    body = {**GOOD[route], "allowed_token_ids": value, "bad_words": value}
    assert (await client.post(route, json=body)).status_code == 200
    assert world.engine.seen[0].guide is None


async def test_they_stand_over_guides_of_tools_and_shapes(client, world: World):
    body = {**GOOD[ROUTES[1]], "bad_words": ["b"]}
    asked = (
        {**OFFER, "tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"ignore_eos": True},
    )
    for more in asked:
        await client.post(ROUTES[1], json={**body, **more})
    *guided, free = world.engine.seen
    for request in guided:
        assert request.guide is not None
        assert set(range(VOCAB)) - set(ids(request.guide.allowed())) == {98}
        assert EOS in request.params.stop_token_ids
    assert EOS not in free.params.stop_token_ids, "words alone end nothing"


@pytest.mark.parametrize(
    "more", [{"response_format": {"type": "json_object"}}, {"guided_regex": "a"}, OFFER]
)
async def test_permitted_ids_stand_beside_no_tools_and_shapes(client, world: World, more):
    body = {**GOOD[ROUTES[1]], "allowed_token_ids": [97], **more}
    answer = await client.post(ROUTES[1], json=body)
    assert answer.status_code == 400
    assert check_envelope(answer)["param"] == "allowed_token_ids"
    assert world.engine.seen == []


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("asked", [True, False])
async def test_tokens_are_called_by_their_ids_where_logprobs_are_told(worlds, route, asked):
    world = worlds(script=say())
    chat = route == ROUTES[1]
    scores = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
    body = {**GOOD[route], **scores, "return_tokens_as_token_ids": asked, "max_tokens": 400}
    async with asgi(world) as client:
        whole = (await client.post(route, json=body)).json()["choices"][0]["logprobs"]
        chunks = await events(client, route, {**body, "stream": True})
    tokens = TEXT.encode()
    named = [f"token_id:{token}" for token in tokens]
    told = [item["token"] for item in whole["content"]] if chat else whole["tokens"]
    assert (told == named) is asked
    if chat:
        assert [item["bytes"] for item in whole["content"]] == [[token] for token in tokens]
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"]]
    streamed = [
        item["token"] if chat else item
        for part in parts
        if part
        for item in part["content" if chat else "tokens"]
    ]
    assert streamed == told
