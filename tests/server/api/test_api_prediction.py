"""What a client foretells of an answer reaches the engine; the usage tells what became of it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fader_server.core import Request, TokenEvent
from fader_server.errors import ContextTooLong
from tests.server.api.api_fakes import World, say

SAID = "Hello, you"
BODY = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99}


def guessed(request: Request) -> Iterator[TokenEvent]:
    """Of what was foretold, every token but the first came sooner."""
    for at, event in enumerate(say(SAID)(request)):
        yield replace(event, guessed=0 < at < len(request.prediction))


@pytest.fixture
def world(worlds) -> World:
    return worlds(script=guessed)


@pytest.mark.parametrize(
    "content",
    ["Hello!", [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_it_is_read_as_tokens(client, world: World, content, path):
    body = {**BODY, "prediction": {"type": "content", "content": content}, "n": 2}
    if path == "/v1/completions":
        body["prompt"] = [1, 2]
        del body["messages"]
    answer = await client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert [bytes(one.prediction) for one in world.engine.seen] == [b"Hello!"] * 2
    details = answer.json()["usage"]["completion_tokens_details"]
    assert details == {"accepted_prediction_tokens": 10, "rejected_prediction_tokens": 2}


@pytest.mark.parametrize("prediction", [None, {"type": "content", "content": ""}])
async def test_without_one_the_usage_tells_nothing(client, world: World, prediction):
    answer = await client.post("/v1/chat/completions", json={**BODY, "prediction": prediction})
    assert answer.json()["choices"][0]["message"]["content"] == SAID
    assert "completion_tokens_details" not in answer.json()["usage"]
    assert [one.prediction for one in world.engine.seen] == [()]


async def test_one_that_is_longer_than_any_answer_is_passed_over(client, world, monkeypatch):
    def encode(text: str, *, special: bool = True) -> list[int]:
        raise ContextTooLong("too long", param="prompt")

    monkeypatch.setattr(world.tokenizer, "encode_prompt", encode)
    body = {**BODY, "prediction": {"type": "content", "content": "x"}}
    answer = await client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert [one.prediction for one in world.engine.seen] == [()]
