"""Answers that must call, or may, under a guide: every walk is calls that conform."""

import contextlib
import json
import random
import time

import pytest

from fader_server.core import Guide
from fader_server.errors import EngineFault, RequestInvalid
from fader_server.text.grammar import GrammarGuide
from fader_server.text.shape import Shape
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tools import Tool, ToolUse
from tests.server.test_text_guides import HOSTILE, ids
from tests.server.test_text_tools import call as calling
from tests.server.tool_chats import WORLDS, ToolCall, form_of, heard, plain, spoken
from tests.server.tool_worlds import TEMPLATES

WEATHER = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["c", "größe"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "flags": {"type": "array", "items": {"$ref": "#/$defs/flag"}, "maxItems": 2},
    },
    "required": ["unit", "flags"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"anyOf": [{"$ref": "#/$defs/zone"}, {"type": "null"}]}},
    "required": ["zone"],
    "additionalProperties": False,
    "$defs": {"zone": {"enum": ["utc", "cet"]}},
}
TOOLS = (Tool("weather", "", WEATHER), Tool("clock", "", CLOCK))
STRICT = tuple(Tool(tool.name, "", tool.parameters, strict=True) for tool in TOOLS)


def conforms(name: str, given: dict) -> bool:
    """By hand."""
    if name == "clock":
        return list(given) == ["zone"] and given["zone"] in ("utc", "cet", None)
    return (
        set(given) - {"days"} == {"unit", "flags"}
        and given["unit"] in ("c", "größe")
        and type(given.get("days", 0)) is int
        and 0 <= given.get("days", 0) <= 99
        and isinstance(given["flags"], list)
        and len(given["flags"]) <= 2
        and all(type(flag) is bool for flag in given["flags"])
    )


async def guide_of(world: Tokenizer, use: ToolUse, schema: str | None = None) -> GrammarGuide:
    guides = await world.tool_guides(use, None if schema is None else Shape("schema", schema), 1)
    assert guides is not None
    return guides[0]


def walk(
    world: Tokenizer, guide: Guide, rng: random.Random, most: int = 4000, often: int | None = None
) -> list[int]:
    """Its tokens up to the one that ends it; one is often chosen where it may come."""
    tokens: list[int] = []
    for _ in range(most):
        allowed = ids(guide.allowed())
        ends = [token for token in allowed if token in world.eos_ids]
        token = ends[0] if ends and rng.random() < 0.3 else rng.choice(allowed)
        if often in allowed and rng.random() < 0.2:
            token = often
        guide.accept(token)
        if token not in world.eos_ids:
            tokens.append(token)
        if guide.ended:
            break
    return tokens


def write(guide: Guide, tokens: list[int]) -> int:
    """How many of these tokens the guide lets through."""
    for at, token in enumerate(tokens):
        if guide.ended or token not in ids(guide.allowed()):
            return at
        guide.accept(token)
    return len(tokens)


@pytest.mark.parametrize("style", TEMPLATES)
@pytest.mark.parametrize("tools", [TOOLS, STRICT])
async def test_what_must_call_is_calls_that_conform_and_nothing_else(style: str, tools):
    world, counts = WORLDS[style], set()
    for seed, use in enumerate(
        [
            *(ToolUse(tools, must=True),) * 9,
            *(ToolUse(tools, must=True, parallel=False),) * 2,
            *(ToolUse(tools, must=True, only=("clock",)),) * 2,
            *(ToolUse(tools, must=True, only=("clock",), parallel=False),) * 2,
        ]
    ):
        guide = await guide_of(world, use)
        tokens = walk(world, guide, random.Random(seed))
        text, found = heard(world, tokens, use)
        assert guide.ended
        assert text == ""
        assert all(conforms(name, given) for name, given in plain(found))
        assert {made.name for made in found} <= {tool.name for tool in use.offered}
        assert len(found) >= 1
        if not use.parallel or form_of(world).between is None:
            assert len(found) == 1
        counts.add(len(found))
        free = [random.Random(seed).randrange(world.vocab_size) for _ in tokens]
        assert heard(world, free, use)[1] == [], "the check cannot fail"
    assert max(counts) > 1 or form_of(world).between is None


@pytest.mark.parametrize("style", TEMPLATES)
async def test_a_guided_call_is_written_as_the_template_writes_it(style: str):
    world = WORLDS[style]
    use = ToolUse(TOOLS, must=True)
    tokens = spoken(world, calling("weather", unit="c", days=5, flags=[True]))
    guide = await guide_of(world, use)
    assert write(guide, tokens) == len(tokens)
    assert world.eos_ids & set(ids(guide.allowed())) or guide.ended
    wrong = spoken(world, calling("weather", unit="k", days=5, flags=[True]))
    assert write(await guide_of(world, use), wrong) < len(wrong)


@pytest.mark.parametrize("style", ["coder", "glm", "invoke"])
async def test_text_of_a_field_goes_on_to_its_marker(style: str):
    shape = {"type": "object", "properties": {"note": {"type": "string"}, "n": {"type": "integer"}}}
    use = ToolUse((Tool("weather", "", shape, strict=True),), must=True)
    world = WORLDS[style]
    tokens = spoken(world, calling("weather", note='a < b </para "\n\n{', n=5))
    guide = await guide_of(world, use)
    assert write(guide, tokens) == len(tokens)
    assert plain(heard(world, tokens, use)[1]) == [
        ("weather", {"note": 'a < b </para "\n\n{', "n": 5})
    ]
    for given in ({}, {"n": 5}, {"note": ""}):
        tokens = spoken(world, calling("weather", **given))
        assert write(await guide_of(world, use), tokens) == len(tokens)
    swapped = spoken(world, calling("weather", n=5, note="x"))
    assert write(await guide_of(world, use), swapped) < len(swapped)


@pytest.mark.parametrize("style", TEMPLATES)
async def test_a_strict_tool_that_may_be_called_is_held_to_its_schema_inside_a_call(style: str):
    world = WORLDS[style]
    loose = Tool("loose", "", {"type": "object"})
    use = ToolUse((*STRICT, loose))
    said = world.encode_prompt("Hello {there}, two <tool words.", special=False)
    guide = await guide_of(world, use)
    assert write(guide, said) == len(said)
    assert world.eos_ids <= set(ids(guide.allowed())), "it may say so and no more"
    for name, good, wrong in (
        ("clock", {"zone": "utc"}, {"zone": "mars"}),
        ("weather", {"unit": "c", "flags": []}, {"unit": "c"}),
    ):
        for given, fits in ((good, True), (wrong, False)):
            tokens = spoken(world, calling(name, **given))
            guide = await guide_of(world, use)
            assert (write(guide, tokens) == len(tokens)) == fits
            if fits:
                assert heard(world, tokens, use)[1] == [ToolCall(name, json.dumps(given))]
    tokens = spoken(world, calling("loose"))
    assert write(await guide_of(world, use), tokens) == len(tokens)
    tokens = spoken(world, calling("other"))
    assert write(await guide_of(world, use), tokens) < len(tokens)


@pytest.mark.parametrize("style", ["hermes", "granite", "mistral_args", "coder", "deepseek"])
async def test_words_calls_and_words_again(style: str):
    world = WORLDS[style]
    tokens = spoken(
        world, calling("clock", zone="cet"), calling("clock", zone="utc", id="abcdefgh2")
    )
    words = world.encode_prompt("Well.\n", special=False)
    guide = await guide_of(world, ToolUse(STRICT))
    written = [*words, *tokens, *words]
    assert write(guide, written) == len(written)
    assert world.eos_ids <= set(ids(guide.allowed()))
    text, found = heard(world, written, ToolUse(STRICT))
    assert text == "Well.Well.\n"
    assert len(found) == 2


async def test_tools_that_may_be_called_need_no_guide_unless_one_is_strict():
    world = WORLDS["hermes"]
    assert await world.tool_guides(ToolUse(TOOLS), None, 1) is None
    assert await world.tool_guides(ToolUse((*TOOLS[:1], STRICT[1])), None, 1) is not None


@pytest.mark.parametrize("style", [name for name in TEMPLATES if name != "llama"])
async def test_content_with_a_schema_is_that_or_calls(style: str):
    world, kinds = WORLDS[style], set()
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    )
    for seed in range(12):
        guide = await guide_of(world, ToolUse(STRICT), schema)
        tokens = walk(world, guide, random.Random(seed))
        text, found = heard(world, tokens, ToolUse(STRICT))
        assert guide.ended
        if text:
            assert set(json.loads(text)) == {"a"}
            kinds.add("content")
        assert not (text and found)
    tokens = spoken(world, calling("clock", zone="cet"))
    assert write(await guide_of(world, ToolUse(TOOLS), schema), tokens) == len(tokens)
    assert "content" in kinds


async def test_where_calls_are_plain_json_content_has_no_schema_beside_them():
    with pytest.raises(RequestInvalid, match="plain JSON") as caught:
        await WORLDS["llama"].tool_guides(ToolUse(TOOLS), Shape("schema", "{}"), 1)
    assert caught.value.param == "response_format"
    assert await guide_of(WORLDS["llama"], ToolUse(TOOLS, must=True), "{}") is not None


async def test_a_schema_of_the_content_that_is_wrong_is_told_by_its_name():
    with pytest.raises(RequestInvalid, match="response_format has a schema") as caught:
        await WORLDS["hermes"].tool_guides(ToolUse(TOOLS), Shape("schema", '{"not": {}}'), 1)
    assert caught.value.param == "response_format"


@pytest.mark.parametrize("style", ["hermes", "coder"])
@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "items": {"$ref": "#/$defs/SECRET"}}, "not valid"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "nothing satisfies"),
    ],
)
async def test_what_cannot_be_kept_is_refused_in_fixed_words(style: str, part: dict, told: str):
    shape = {"type": "object", "properties": {"SECRET": part}, "required": ["SECRET"]}
    for use in (
        ToolUse((Tool("SECRET", "", shape, strict=True),)),
        ToolUse((Tool("SECRET", "", shape, strict=True),), must=True),
    ):
        with pytest.raises(RequestInvalid, match=told) as caught:
            await WORLDS[style].tool_guides(use, None, 1)
        assert caught.value.param == "tools"
        assert "SECRET" not in str(caught.value)


async def test_without_strict_a_call_is_guided_as_far_as_the_schema_is_understood():
    shape = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
        "required": ["a"],
        "additionalProperties": False,
    }
    world, use = WORLDS["hermes"], ToolUse((Tool("f", "", shape),), must=True)
    tokens = spoken(world, calling("f", a=[1, 1]))
    assert write(await guide_of(world, use), tokens) == len(tokens)
    wrong = spoken(world, calling("f", a=["x"]))
    assert write(await guide_of(world, use), wrong) < len(wrong)


@pytest.mark.parametrize(
    "properties",
    [
        {"a": {"type": "string", "pattern": "^x$"}},
        {"a": {"type": "string", "maxLength": 3}},
        {"a": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]}},
        {"a>b": {"type": "integer"}},
        {"a": {"allOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}},
        {"a": {"$ref": "#/$defs/0", "type": "string"}},
        {"a": {"anyOf": [{"const": str(i)} for i in range(80)]}},
        {"a": {"$ref": "#/$defs/0"}},
        {"a": {"anyOf": [{"type": "string"}, {"type": "integer", "maximum": 3}]}},
        {"a": {"anyOf": [{"enum": ["5"]}, {"type": "integer", "maximum": 3}]}},
        {"a": {"enum": ["x</parameter>"]}},
    ],
)
async def test_strict_text_that_fields_cannot_keep_is_refused_and_json_keeps_it(properties: dict):
    shape = {"type": "object", "properties": properties, "required": list(properties)}
    chain = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(20)}
    shape["$defs"] = {**chain, "20": {"type": "string"}}
    use = ToolUse((Tool("f", "", shape, strict=True),))
    with pytest.raises(RequestInvalid, match="cannot be enforced") as caught:
        await WORLDS["coder"].tool_guides(use, None, 1)
    assert caught.value.param == "tools"
    assert await WORLDS["hermes"].tool_guides(use, None, 1) is not None


@pytest.mark.parametrize("style", ["hermes", "coder"])
async def test_texts_of_tools_are_no_grammar(style: str):
    nasty = 'x"\nstart: /.*/\n%json {} <[5]> | "'
    shape = {"type": "object", "properties": {nasty: {"enum": [nasty]}}, "required": [nasty]}
    use = ToolUse((Tool("f", nasty, {**shape, "additionalProperties": False}),), must=True)
    world = WORLDS[style]
    if style == "coder":  # ">" in a key could not be read back
        with pytest.raises(RequestInvalid, match="cannot be enforced"):
            await guide_of(world, use)
        return
    tokens = walk(world, await guide_of(world, use), random.Random(0))
    assert plain(heard(world, tokens, use)[1])[0] == ("f", {nasty: nasty})


@pytest.mark.parametrize("style", ["hermes", "mistral", "llama"])
async def test_many_tools_are_one_grammar(style: str):
    world = WORLDS[style]
    tools = tuple(Tool(f"tool_{i}", "x" * 500, WEATHER) for i in range(128))
    for use in (
        ToolUse(tools, must=True),
        ToolUse(tuple(Tool(t.name, "", WEATHER, strict=True) for t in tools)),
    ):
        tokens = spoken(world, calling("tool_97", unit="c", flags=[]))
        assert write(await guide_of(world, use), tokens) == len(tokens)


@pytest.mark.parametrize("name", ["product", "references", "doubling", "multiples"])
async def test_a_hostile_schema_of_parameters_costs_its_request_and_little_else(name: str):
    schema = HOSTILE[name]
    shape = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    shape["$defs"] = schema.get("$defs", {})
    tools = tuple(Tool(f"f{i}", "", shape) for i in range(3))
    world = WORLDS["hermes"]
    await world.tool_guides(ToolUse(TOOLS, must=True), None, 1)
    began = time.process_time()
    with contextlib.suppress(RequestInvalid, EngineFault):
        walk(world, await guide_of(world, ToolUse(tools, must=True)), random.Random(0), 300)
    assert time.process_time() - began < 3.0
