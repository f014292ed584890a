"""What other servers call `response_format`: what is refused, what reaches the grammar."""

import json

import pytest

from fader_server.text.shape import Shape
from tests.server.api.api_fakes import World
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import GOOD, check_envelope

ROUTES = ("/v1/completions", "/v1/chat/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TEXT = json.dumps(SCHEMA)
LARK = 'start: "a" | "b"'
GBNF = 'root ::= "a" | "b"'


async def ask(client, route: str, fields: dict, **others):
    body = json.dumps({**GOOD[route], **fields, **others})
    return await client.post(route, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"guided_json": SCHEMA}, "schema", TEXT),
        ({"guided_json": TEXT}, "schema", TEXT),
        ({"guided_json": {**SCHEMA, "x-guidance": {}}}, "schema", TEXT),
        ({"guided_json": {}}, "schema", "{}"),
        ({"json_schema": TEXT}, "schema", TEXT),
        ({"json_schema": SCHEMA}, "schema", TEXT),
        ({"guided_regex": "a/b+"}, "regex", "a/b+"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["ja", "größe"]}, "choice", json.dumps(["ja", "größe"])),
        ({"structured_outputs": {"json": SCHEMA}}, "schema", TEXT),
        ({"structured_outputs": {"json": TEXT, "regex": None}}, "schema", TEXT),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice", '["a"]'),
        ({"structured_outputs": {"json_object": True}}, "schema", '{"type": "object"}'),
        ({"guided_choice": ["a"], "response_format": {"type": "text"}}, "choice", '["a"]'),
        ({"guided_grammar": LARK}, "grammar", LARK),
        ({"grammar": GBNF}, "grammar", GBNF),
        ({"ebnf": GBNF}, "grammar", GBNF),
        ({"structured_outputs": {"grammar": LARK}}, "grammar", LARK),
        ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, "regex", "a"),
    ],
)
async def test_every_choice_has_the_shape(client, world: World, route, fields, kind, text):
    answer = await ask(client, route, fields, n=3)
    assert answer.status_code == 200, answer.text
    param = next(name for name in fields if name != "response_format")
    assert world.tokenizer.shapes == [Shape(kind, text, param)]
    guides = {id(request.guide) for request in world.engine.seen}
    assert len(guides) == 3
    assert id(None) not in guides


NAMES = (
    *("guided_json", "guided_regex", "guided_choice", "structured_outputs"),
    *("json_schema", "regex", "guided_grammar", "grammar", "ebnf"),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, False, "", []])
async def test_what_asks_for_nothing_is_not_guided(client, world: World, name, value):
    assert (await ask(client, ROUTES[0], {name: value})).status_code == 200
    assert world.tokenizer.shapes == []


BAD = [
    *[(n, v) for n in ("guided_json", "json_schema") for v in (1, True, [1], "no", "[]", "1")],
    *[("guided_json", v) for v in ('{"a": NaN}', '{"maximum": 1e999}', "[" * 100_000)],
    ("guided_json", json.dumps({"$ref": "https://example.com/x"})),
    *[(n, v) for n in ("guided_regex", "regex") for v in (1, True, ["a"], {}, "a" * 513)],
    *[("guided_regex", v) for v in ("a{9999}", "\ud800")],
    *[("guided_choice", v) for v in ("yes", {"a": 1}, [1], [""], ["a", None], ["\ud800"], True)],
    *[("guided_choice", v) for v in (["a"] * 1025, ["a" * 2049], ["a" * 2000] * 40)],
    *[("structured_outputs", v) for v in (1, "a+", [1], {"json": {}, "regex": "a"}, {"more": 1})],
    *[
        ("structured_outputs", {k: 1})
        for k in ("json", "regex", "choice", "json_object", "grammar")
    ],
    ("structured_outputs", {"structural_tag": "x"}),
    *[
        (n, v)
        for n in ("guided_grammar", "grammar", "ebnf")
        for v in (1, True, ["a"], {}, "a" * 8193)
    ],
    *[
        ("grammar", f"start: {rule}")
        for rule in ("%json {}", '"a"{9999}', "/a{1,9999}/", '"\ud800"')
    ],
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("name", "value"), BAD)
async def test_what_is_no_shape_is_one_400(client, world: World, route, name, value):
    answer = await ask(client, route, {name: value})
    assert answer.status_code == 400, answer.text
    error = check_envelope(answer)
    assert error["param"] == name
    assert len(error["message"]) < 200
    assert world.tokenizer.shapes == world.engine.seen == []


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"response_format": {"type": "json_object"}, "guided_choice": ["a"]},
        {"regex": "a", "structured_outputs": {"json": {}}},
    ],
)
async def test_two_shapes_are_refused(client, world: World, fields):
    answer = await ask(client, ROUTES[1], fields)
    assert answer.status_code == 400
    assert "cannot stand beside" in check_envelope(answer)["message"]
    assert world.engine.seen == []


async def test_a_shape_beside_tools_is_of_the_content(worlds):
    world = worlds()
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    async with asgi(world) as client:
        answer = await ask(client, ROUTES[1], {"guided_choice": ["a"], "tools": tools})
    assert answer.status_code == 200, answer.text
    assert [shape for _, shape in world.tokenizer.uses] == ['["a"]']
