"""`response_format` over HTTP: what is refused, what reaches the engine, what is given back."""

import json

import pytest

from fader_server.api import response_format
from fader_server.tenants import Tenant, digest_of
from tests.server.api.api_fakes import World
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import GOOD, check_envelope

ROUTES = ("/v1/completions", "/v1/chat/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def given(schema: object = SCHEMA, **others: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **others}}


def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


async def ask(client, route: str, form: object, **others):
    body = json.dumps({**GOOD[route], "response_format": form, **others})
    return await client.post(route, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("form", "kept"),
    [
        ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_object", "schema": SCHEMA}, json.dumps(SCHEMA)),
        ({"type": "json_object", "schema": {}}, '{"type": "object"}'),
        ({"type": "json_object", "schema": None}, '{"type": "object"}'),
        (
            {"type": "json_object", "schema": {**SCHEMA, "x-guidance": {"lenient": True}}},
            json.dumps(SCHEMA),
        ),
        (given(), json.dumps(SCHEMA)),
        (given(strict=True, description="d"), json.dumps(SCHEMA)),
        (given(strict=None, description=None), json.dumps(SCHEMA)),
        (given({**SCHEMA, "x-guidance": {"lenient": True}}), json.dumps(SCHEMA)),
        (given({}), "{}"),
    ],
)
async def test_every_choice_is_guided_by_the_schema(client, world: World, route, form, kept):
    answer = await ask(client, route, form, n=3)
    assert answer.status_code == 200, answer.text
    assert world.tokenizer.schemas == [kept]
    inner = form.get("json_schema")
    lenient = inner is not None and inner.get("strict") is not True
    assert [shape.lenient for shape in world.tokenizer.shapes] == [lenient]
    guides = {id(request.guide) for request in world.engine.seen}
    assert len(guides) == 3
    assert id(None) not in guides


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", [None, {"type": "text"}])
async def test_text_is_not_guided(client, world: World, route, form):
    assert (await ask(client, route, form)).status_code == 200
    assert world.tokenizer.schemas == []
    assert [request.guide for request in world.engine.seen] == [None]


BAD = [
    *("json", 1, True, [], {}, {"type": "regex"}, {"type": 1}, {"type": None}),
    *({"type": "json_object", "schema": schema} for schema in ([], "{}", True, 1, False)),
    {"type": "json_object", "schema": {}, "more": 1},
    {"type": "text", "schema": {}},
    {**given(), "schema": {}},
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": []},
    {"type": "json_schema", "json_schema": {"name": "n"}},
    {"type": "json_schema", "json_schema": {"schema": {}}},
    *(given(name=name) for name in ("", "x" * 65, "a b", 1, None, "é")),
    *(given(schema) for schema in (None, [], "{}", True, 1)),
    given(strict=1),
    given(strict="true"),
    given(description=1),
    given(more=1),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("form", BAD)
async def test_what_is_no_response_format_is_one_400(client, world: World, route, form):
    answer = await ask(client, route, form)
    assert answer.status_code == 400, answer.text
    assert check_envelope(answer)["param"] == "response_format"
    assert world.tokenizer.schemas == world.engine.seen == []


LARGE = {
    "references": {"$ref": "https://example.com/SECRET"},
    "files": {"items": {"$ref": "file:///SECRET"}},
    "parts": {"enum": [[] for _ in range(5000)]},
    "text": {"enum": ["x" * 2000 for _ in range(40)]},
    "strings": {"const": "SECRET" * 400},
    "names": {"properties": {"SECRET" * 400: {}}},
    "patterns": {"pattern": "SECRET" * 100},
    "pattern names": {"patternProperties": {"SECRET" * 100: {}}},
    "repeats": {"pattern": "(SECRET){99999}"},
    "counts": {"items": {"maxItems": 10**9}},
    "floats": {"minLength": 1e30},
    "numbers": {"multipleOf": 10**400},
    "surrogates": {"const": "SECRET\ud800"},
    "surrogate names": {"properties": {"\ud800": {}}},
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("form", [given, lambda schema: {"type": "json_object", "schema": schema}])
async def test_what_is_too_much_is_refused_before_any_grammar(client, world: World, form, name):
    answer = await ask(client, ROUTES[1], form(LARGE[name]))
    assert answer.status_code == 400, answer.text
    error = check_envelope(answer)
    assert error["param"] == "response_format"
    assert "SECRET" not in error["message"]
    assert len(error["message"]) < 200
    assert world.tokenizer.schemas == []


async def test_a_number_beyond_floats_is_refused(client, world: World):
    body = json.dumps({**GOOD[ROUTES[0]], "response_format": given({"maximum": 0.5})})
    answer = await client.post(
        ROUTES[0],
        content=body.replace("0.5", "1e999"),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert check_envelope(answer)["param"] == "response_format"


async def test_deep_schemas_are_the_bodys_to_refuse(client):
    assert (await ask(client, ROUTES[1], given(nested(28)))).status_code == 200
    answer = await ask(client, ROUTES[1], given(nested(40)))
    assert answer.status_code == 400
    assert "nested deeper" in check_envelope(answer)["message"]


async def test_words_of_json_schema_may_be_names_of_properties(client, world: World):
    names = {name: {"type": "string"} for name in ("$ref", "pattern", "maxLength", "const")}
    answer = await ask(client, ROUTES[1], given({"type": "object", "properties": names}))
    assert answer.status_code == 200, answer.text
    assert len(world.tokenizer.schemas) == 1


async def test_long_descriptions_are_no_strings_to_write(client, world: World):
    schema = {**SCHEMA, "description": "x" * 4 * response_format.MAX_STRING}
    assert (await ask(client, ROUTES[1], given(schema))).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_of_the_text_layer_is_a_400_and_leaves_nothing(client, world, stream):
    answer = await ask(client, ROUTES[1], given({"title": "refuse"}), stream=stream)
    assert answer.status_code == 400
    assert check_envelope(answer)["param"] == "response_format"
    assert world.engine.seen == []
    assert world.idle


async def test_a_schema_that_takes_too_long_is_a_timeout_and_leaves_nothing(worlds):
    world = worlds(first_token_timeout=0.05)
    async with asgi(world) as client:
        answer = await ask(client, ROUTES[1], given({"title": "wait"}))
    assert answer.status_code == 504
    assert check_envelope(answer)["code"] == "first_token_timeout"
    assert world.idle


async def test_reading_a_schema_counts_as_a_call_and_costs_no_tokens(worlds):
    acme = Tenant("acme", (digest_of("sk-acme"),), requests_per_minute=2, tokens_per_minute=10_000)
    world = worlds(tenants=(acme,))
    async with asgi(world, authorization="Bearer sk-acme") as client:
        answer = await ask(client, ROUTES[1], given({"title": "refuse"}), max_tokens=50)
        assert answer.status_code == 400
        left = world.app.state.context.generator.quotas.headers("acme")
        assert left["x-ratelimit-remaining-requests"] == "1"
        assert left["x-ratelimit-remaining-tokens"] == "10000"
        assert (await ask(client, ROUTES[1], given())).status_code == 200
        read = len(world.tokenizer.schemas)
        assert (await ask(client, ROUTES[1], given())).status_code == 429
    assert len(world.tokenizer.schemas) == read


async def test_a_guided_answer_ends_at_the_models_stop_tokens_also_under_ignore_eos(client, world):
    await ask(client, ROUTES[0], given(), ignore_eos=True)
    await ask(client, ROUTES[0], None, ignore_eos=True)
    guided, free = (request.params.stop_token_ids for request in world.engine.seen)
    assert guided == world.tokenizer.eos_ids
    assert free == frozenset()


async def test_what_vllm_takes_beside_it_stays_refused(client, world: World):
    for field in ("guided_json", "structured_outputs", "guided_regex"):
        answer = await ask(client, ROUTES[1], given(), **{field: {"x": 1}})
        assert answer.status_code == 400
        assert check_envelope(answer)["param"] == field
