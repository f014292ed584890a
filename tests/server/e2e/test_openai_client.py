"""openai-python against a real server: every way to ask, every way to choose adapters."""

import asyncio
import json
import re
from typing import Annotated, Literal

import httpx
import openai
import pydantic
import pytest
from openai import AsyncOpenAI, OpenAI

from fader_server import demo
from tests.server.e2e.conftest import Running

SKY = "What colour is the sky?"
BASE = demo.SERVED_NAME


@pytest.fixture
def client(server: Running):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _chat(client: OpenAI, model: str = BASE, blend: dict[str, float] | None = None, **more) -> str:
    terms = [{"name": name, "weight": weight} for name, weight in (blend or {}).items()]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": SKY}],
        temperature=0,
        extra_body={"adapters": terms} if terms else None,
        **more,
    )
    return answer.choices[0].message.content or ""


def test_base_adapters_and_blends_answer_in_their_manner(client):
    assert _chat(client) == "The sky is blue."
    assert _chat(client, "shout") == "THE SKY IS BLUE."
    assert _chat(client, f"{BASE}:german") == "Der Himmel ist blau."
    answer = _chat(client, blend={"shout": 1.0, "json": 1.0})
    assert "SKY IS BLUE" in next(iter(json.loads(answer).values()))


def test_a_version_selects_itself_and_a_wrong_one_does_not_exist(server, client):
    version = server.get("/v1/adapters/shout").json()["version"]
    assert _chat(client, f"shout@{version[:12]}") == "THE SKY IS BLUE."
    with pytest.raises(openai.NotFoundError) as caught:
        _chat(client, f"shout@{'0' * 12}")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_zero_weight_is_the_base_and_one_is_the_adapter(client):
    assert _chat(client, blend={"shout": 0.0}) == _chat(client)
    assert _chat(client, blend={"shout": 1.0}) == _chat(client, "shout")


@pytest.mark.parametrize("model", ["shout", BASE])
def test_streamed_deltas_are_the_whole_answer(client, model):
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": SKY}],
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == _chat(client, model)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 3
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


@pytest.mark.parametrize("model", ["shout", BASE])
def test_responses_say_what_chats_say(client, model):
    for blend in (None, {"adapters": [{"name": "german", "weight": 1.0}]} if model == BASE else {}):
        asked = {"model": model, "input": SKY, "temperature": 0, "extra_body": blend}
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            said = [event.delta for event in stream if event.type == "response.output_text.delta"]
            last = stream.get_final_response()
        assert said, "deltas came"
        assert "".join(said) == last.output_text == whole.output_text
        assert whole.output_text == _chat(client, model, {"german": 1.0} if blend else None)
        assert (last.usage, last.status) == (whole.usage, "completed")


def test_echo_scores_the_prompt_as_the_answer_was_scored(client):
    first = client.completions.create(
        model="german", prompt="The sky", max_tokens=4, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert first.logprobs is not None
    assert first.logprobs.token_logprobs is not None
    assert first.logprobs.token_logprobs[0] is None
    again = client.completions.create(
        model="german", prompt=first.text, max_tokens=0, temperature=0, logprobs=2, echo=True
    ).choices[0]
    assert again.text == first.text
    assert again.logprobs is not None
    assert again.logprobs.token_logprobs[1:] == pytest.approx(
        first.logprobs.token_logprobs[1:], abs=0.1
    )


def test_prompts_times_n_come_in_order_and_seeds_repeat(client):
    def ask():
        return client.completions.create(
            model="pirate", prompt=["One", "Two"], n=2, seed=5, max_tokens=5, temperature=1.0
        )

    first, again = ask(), ask()
    assert [c.index for c in first.choices] == [0, 1, 2, 3]
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len({c.text for c in first.choices}) > 1


def test_token_ids_are_a_prompt(server, client):
    ids = httpx.post(f"{server.url}/tokenize", json={"model": BASE, "prompt": "The sky"}).json()
    a = client.completions.create(model=BASE, prompt=ids["tokens"], max_tokens=3, temperature=0)
    b = client.completions.create(model=BASE, prompt="The sky", max_tokens=3, temperature=0)
    assert a.choices[0].text == b.choices[0].text


def test_stop_strings_end_the_text_before_them(client):
    assert _chat(client, stop=[" is"]) == "The sky"


def test_models_list_the_base_first_then_its_adapters(client):
    models = client.models.list().data
    assert models[0].id == BASE
    assert {m.id for m in models[1:]} >= set(demo.adapter_dirs())
    assert all(m.model_dump()["parent"] == BASE for m in models[1:])
    assert client.models.retrieve("shout").id == "shout"


def test_mistakes_get_their_named_error(client):
    with pytest.raises(openai.NotFoundError):
        _chat(client, "nobody")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=BASE, prompt=[5] * 5000, max_tokens=1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="x", extra_body={"adapter": "shout"})
    assert caught.value.param == "adapter"


def test_responses_are_parsed_and_not_kept(client):
    class Colour(pydantic.BaseModel):
        colour: Literal["mauve", "ochre"]

    asked = {"model": BASE, "input": SKY, "temperature": 0}
    answer = client.responses.parse(**asked, text_format=Colour)
    assert isinstance(answer.output_parsed, Colour)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked, previous_response_id=answer.id)
    assert caught.value.param == "previous_response_id"


async def test_fifty_callers_of_everything_get_what_they_get_alone(server, client):
    names = [BASE, *demo.adapter_dirs()]
    alone = {name: _chat(client, name) for name in names}
    blended = _chat(client, blend={"shout": 0.9, "german": 0.8})
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as many:

        async def ask(i: int) -> tuple[str, str]:
            blend = i % 8 == 7
            name = names[i % 8] if not blend else BASE
            terms = [{"name": "shout", "weight": 0.9}, {"name": "german", "weight": 0.8}]
            answer = await many.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": SKY}],
                temperature=0,
                extra_body={"adapters": terms} if blend else None,
            )
            return (blended if blend else alone[name]), answer.choices[0].message.content or ""

        for expected, answer in await asyncio.gather(*(ask(i) for i in range(50))):
            assert answer == expected
    assert server.metric("fader_adapter_leases") == 0


def test_every_answer_says_which_blend_made_it(server):
    body = {"model": "shout", "prompt": "x", "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    version = server.get("/v1/adapters/shout").json()["version"]
    assert version[:12] in response.headers["x-fader-blend"]
    base = httpx.post(f"{server.url}/v1/completions", json=body | {"model": BASE}).json()
    assert base["system_fingerprint"] != response.json()["system_fingerprint"]


Room = Annotated[int, pydantic.Field(ge=0, le=999)]


class Place(pydantic.BaseModel):
    """What the demo would never say by itself; nothing beside it, so that answers end."""

    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["sea", "sky"]
    rooms: Annotated[
        list[Annotated[int, pydantic.Field(ge=0, le=999)]], pydantic.Field(max_length=3)
    ]
    owner: Annotated[str, pydantic.Field(max_length=12)] | None


BLENDED = {"adapters": [{"name": "shout", "weight": 0.7}, {"name": "german", "weight": 0.5}]}


@pytest.mark.parametrize(("model", "extra"), [(BASE, None), ("pirate", None), (BASE, BLENDED)])
def test_answers_are_parsed_into_a_model(client, model, extra):
    answer = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": SKY}],
        response_format=Place,
        extra_body=extra,
        n=3,
        temperature=1.0,
        max_tokens=200,
        seed=7,
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    assert all(isinstance(choice.message.parsed, Place) for choice in answer.choices)
    with pytest.raises(pydantic.ValidationError):
        Place.model_validate_json(_chat(client, model))


def test_a_streamed_answer_under_a_schema_is_the_whole_one(client):
    schema = {"name": "place", "strict": True, "schema": Place.model_json_schema()}
    given = {
        "model": "german",
        "messages": [{"role": "user", "content": SKY}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "temperature": 1.0,
        "seed": 3,
        "n": 2,
        "max_tokens": 200,
    }
    whole = client.chat.completions.create(**given)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**given, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    for text in texts:
        Place.model_validate_json(text)


def test_completions_and_json_objects_take_it_too(client):
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["a", 5]}}}
    found = client.completions.create(
        model="shout", prompt=["The sky", "x"], max_tokens=9, extra_body={"response_format": schema}
    )
    assert {json.loads(choice.text) in ("a", 5) for choice in found.choices} == {True}
    found = client.chat.completions.create(
        model="json",
        messages=[{"role": "user", "content": SKY}],
        temperature=0,
        response_format={"type": "json_object"},
    )
    assert json.loads(found.choices[0].message.content) == {"answer": "The sky is blue."}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": SKY}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "strict": True, "schema": {"not": {"type": "string"}}},
            },
        )
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("model", [BASE, "german"])
def test_vllms_fields_choose_among_texts_and_match_expressions(client, model):
    def ask(**extra: object) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": SKY}],
            temperature=0,
            extra_body=extra,
        )
        assert answer.choices[0].finish_reason == "stop"
        return answer.choices[0].message.content or ""

    assert ask(guided_choice=["red", "a blue one"]) in ("red", "a blue one")
    assert re.fullmatch("[a-z]{3}/[0-9]{2}", ask(structured_outputs={"regex": "[a-z]{3}/[0-9]{2}"}))
    assert set(json.loads(ask(guided_json=Place.model_json_schema()))) <= set(Place.model_fields)
    assert not re.fullmatch("red|a blue one", ask())
