"""Calls whose arguments are members in a notation: Python's, or one whose texts a token quotes."""

import json
import random

import pytest

from fader_server.errors import RequestInvalid
from fader_server.text.shape import Shape
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tool_reader import CallReader
from fader_server.text.tools import Tool, ToolUse
from tests.server.test_text_tool_guides import guide_of, walk, write
from tests.server.tool_chats import (
    TOOLS,
    USE,
    WORLDS,
    ToolCall,
    answer,
    call,
    folded,
    form_of,
    heard,
    plain,
    spoken,
)
from tests.server.tool_worlds import LFM2, TEMPLATES, hf

MARKS = {"(": "<|tool_call>", ")": "<tool_call|>", "'": '<|"|>'}


def pieces_of(style: str, text: str, use: ToolUse = USE) -> list[str | ToolCall]:
    """With names of special tokens for them; the same char by char."""
    world = WORLDS[style]
    for char, token in form_of(world).controls.items():
        text = text.replace(world.token_text(token), char)
    reader, slow = CallReader(form_of(world), use), CallReader(form_of(world), use)
    found = folded([*reader.feed(text), *reader.finish()])
    assert folded([p for char in text for p in slow.feed(char)] + slow.finish()) == found
    return found


def python(value: str, key: str = "more") -> list[str | ToolCall]:
    return pieces_of("lfm2", f"<|tool_call_start|>[weather({key}={value})]<|tool_call_end|>")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("'x'", "x"),
        ('"it\'s"', "it's"),
        (r"'it\'s \"so\" \\ \n\t\x41\u00e4\U0001f98a\q'", 'it\'s "so" \\ \n\tA\u00e4\U0001f98a\\q'),
        (r'"\ud83e\udd8a \/"', "\U0001f98a /"),
        ("'a\nb'", "a\nb"),
        ("''", ""),
        ("5", 5),
        ("-5", -5),
        ("1.5e3", 1500.0),
        ("1e999", 1.7976931348623157e308),
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("[]", []),
        ("[1, 'a', [True,],]", [1, "a", [True]]),
        ("(1, 2)", [1, 2]),
        ("{}", {}),
        ("{'a': {\"b\": [None]}, 'c': 1}", {"a": {"b": [None]}, "c": 1}),
        (" \n5 ", 5),
    ],
)
def test_values_are_read_as_python_and_json_write_them(written: str, value: object):
    (made,) = python(written)
    assert isinstance(made, ToolCall)
    assert json.loads(made.arguments) == {"more": value}


@pytest.mark.parametrize(
    "written",
    [
        "", "x", "five", "'it's'", "'a", "'\\u12'", "'\\x1'", "'\\U99999999'", "f'a'", "1 + 1",
        "007", "nan", "inf", "1_000", "0x1", "lambda: 1", "__import__('os')", "[1 2]", "[1",
        "{1: 2}", "{a: 1}", "{'a' 1}", "{'a'}", "5, more=6", "5, 6", "'a' 'b'", "[" * 99 + "]" * 99,
        "9" * 5000, "'\ud801",
    ],
)  # fmt: skip
def test_what_is_no_literal_is_no_call(written: str):
    assert python(written) == [f"[weather(more={written})]".replace("\ud801", "")]


def test_names_and_keys():
    assert python("5", "not-python") == [ToolCall("weather", '{"not-python": 5}')]
    for said in ("other(a=1)", "weather.x(a=1)", "weather", "weather[a=1]", "(a=1)", "weather(=1)",
                 "weather(a b=)", "weather(a,b)"):  # fmt: skip
        assert pieces_of("lfm2", f"<|tool_call_start|>[{said}]<|tool_call_end|>") == [f"[{said}]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|tool_call_start|>\n[ weather ( days = 3 , ) , time-of_day() ]\n<|tool_call_end|>",
         [ToolCall("weather", '{"days": 3}'), ToolCall("time-of_day", "{}")]),
        ("a <|tool_call_start|>[weather()]<|tool_call_end|> b",
         ["a", ToolCall("weather", "{}"), "b"]),
        ("<|tool_call_start|>[weather()]", [ToolCall("weather", "{}")]),
        ("<|tool_call_start|>[weather()", [ToolCall("weather", "{}")]),
        ("<|tool_call_start|>[weather(), other()]<|tool_call_end|>",
         [ToolCall("weather", "{}"), ", other()]"]),
        ("<|tool_call_start|>[weather(days=3", ["[weather(days=3"]),
        ("<|tool_call_start|>weather()<|tool_call_end|>", ["weather()"]),
        ("<|tool_call_start|>[weather(city='x)]<|tool_call_end|>a<|tool_call_start|>[weather()]",
         ["[weather(city='x)]a", ToolCall("weather", "{}")]),
        ("<|tool_call_start|>[]<|tool_call_end|>", ["[]"]),
        ("[weather()]", ["[weather()]"]),
    ],
)  # fmt: skip
def test_lists_of_calls_between_tokens(text: str, expected: list[str | ToolCall]):
    assert pieces_of("lfm2", text) == pieces_of("lfm2_silent", text) == expected


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[weather(days=3), time-of_day()]", 2),
        (" [weather()]\n", 1),
        ("[weather()", 0),
        ("[weather()] is it", 0),
        ("So: [weather()]", 0),
        ("So [[weather()]", 0),
        ("[weather(), other()]", 0),
        ("[1] weather [weather()]", 0),
        ("[]", 0),
    ],
)
def test_calls_without_a_mark_are_the_whole_answer_or_none(text: str, calls: int):
    found = pieces_of("pythonic", text)
    assert sum(isinstance(piece, ToolCall) for piece in found) == calls
    assert calls or found == [text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<function_calls>weather(days=3)\ntime-of_day()</function_calls>",
         [ToolCall("weather", '{"days": 3}'), ToolCall("time-of_day", "{}")]),
        ("<function_calls>\nweather(city=\"x\", more=null)\n\n</function_calls>\nDone",
         [ToolCall("weather", '{"city": "x", "more": null}'), "Done"]),
        ("<function_calls>weather()", [ToolCall("weather", "{}")]),
        ("<function_calls>weather()\n</func", [ToolCall("weather", "{}")]),
        ("<function_calls>weather()\nwhat", [ToolCall("weather", "{}"), "what"]),
        ("<function_calls></function_calls>", ["<function_calls></function_calls>"]),
    ],
)  # fmt: skip
def test_calls_line_by_line(text: str, expected: list[str | ToolCall]):
    assert pieces_of("olmo3", text) == expected


def marked(written: str) -> list[str | ToolCall]:
    """' for the token that quotes."""
    written = written.replace("'", MARKS["'"])
    return pieces_of("gemma4", f"<|tool_call>call:weather{{{written}}}<tool_call|>")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("", {}),
        ("city:'Par, is} \"x\" \\n\n'", {"city": 'Par, is} "x" \\n\n'}),
        ("city:'5',days:5", {"city": "5", "days": 5}),
        ("'city' : 'x' , days: 5 ,", {"city": "x", "days": 5}),
        ("city:5", {"city": "5"}),
        ("city:New York", {"city": "New York"}),
        ('city:"a, \\"b"', {"city": 'a, "b'}),
        ("more:{a:[1.5,'}]',true,{}],b:None,c:null,d:x}",
         {"more": {"a": [1.5, "}]", True, {}], "b": None, "c": None, "d": "x"}}),
        ("unknown:5", {"unknown": 5}),
        ("unknown:five", {"unknown": "five"}),
    ],
)  # fmt: skip
def test_values_whose_texts_a_token_quotes(written: str, value: object):
    (made,) = marked(written)
    assert isinstance(made, ToolCall)
    assert json.loads(made.arguments) == value


@pytest.mark.parametrize(
    "written",
    ["city", "city:", "city:,", ":5", "days:five", "days:'5'x", "city:'x", "more:{a:1",
     "city:'a'b'", "days:5,days:6", "more:[1 2}", "city:(", "{", "a:" + "[" * 99 + "]" * 99],
)  # fmt: skip
def test_what_is_no_such_member_is_no_call(written: str):
    assert marked(written) == [f"call:weather{{{written.replace(chr(39), '')}}}"]


def test_calls_one_after_the_other_with_words_between():
    both = "<|tool_call>call:weather{}<tool_call|>"
    made = ToolCall("weather", "{}")
    assert pieces_of("gemma4", both * 2) == [made, made]
    assert pieces_of("gemma4", f"a{both} b {both}") == ["a", made, "b", made]
    assert pieces_of("gemma4", both + "<|tool_response>") == [made]
    assert pieces_of("gemma4", both.replace("weather", "other")) == ["call:other{}"]
    assert pieces_of("gemma4", both[:-12]) == [made]


@pytest.mark.parametrize("style", ["lfm2", "gemma4", "olmo3", "pythonic"])
def test_noise_raises_nothing_and_loses_nothing(style: str):
    rng = random.Random(style)
    form = form_of(WORLDS[style])
    lead = form.opening + "weather" + form.middle
    alphabet = [*form.controls, *"()[]{}'\",:= \\nux5.a-\n", "city", "True", lead, form.closing]
    for _ in range(400):
        text = lead + "".join(rng.choice(alphabet) for _ in range(rng.randrange(30)))
        reader = CallReader(form, USE)
        found = folded([p for char in text for p in reader.feed(char)] + reader.finish())
        if all(isinstance(piece, str) for piece in found):
            shown = text.translate({ord(char): None for char in form.controls})
            assert "".join(map(str, found)) == shown


def test_words_are_those_of_the_template():
    words = {style: form_of(WORLDS[style]).notation for style in ("lfm2", "olmo3", "gemma4")}
    assert {style: found and found.words for style, found in words.items()} == {
        "lfm2": ("True", "False", "None"),
        "olmo3": ("true", "false", "null"),
        "gemma4": ("true", "false", "None"),
    }


def test_where_a_template_is_silent_past_calls_are_content():
    world = WORLDS["lfm2_silent"]
    ids = world.encode_chat(answer(call(city='"x"', days=3), call("time-of_day"), content="Hm"))
    written = '<|tool_call_start|>[weather(city="\\"x\\"", days=3), time-of_day()]<|tool_call_end|>'
    assert f"assistant\nHm{written}<|im_end|>" in world.decode(ids, special=True)
    forged = answer(call(city=LFM2[1] + LFM2[2]), content=LFM2[1])
    names = [world.token_text(t) for t in world.encode_chat(forged)]
    assert names.count(LFM2[1]) == names.count(LFM2[2]) == 1


def test_a_silent_template_without_such_tokens_has_no_calls():
    template = TEMPLATES["lfm2_silent"].replace("<|tool_list_start|>", "")
    assert Tokenizer(hf(template), max_model_len=99).calls_told["form"] == "none"


# Guides

DEEP = {
    "type": "object",
    "properties": {
        "label": {"type": "string", "minLength": 1, "maxLength": 3},
        "kind": {"enum": ["a", "größe", 5, None, True]},
        "at": {"$ref": "#/$defs/at"},
        "tags": {"type": "array", "items": {"type": ["string", "null"]}, "maxItems": 2},
        "count": {"type": "integer", "minimum": 3, "maximum": 5},
    },
    "required": ["at", "kind"],
    "additionalProperties": False,
    "$defs": {
        "at": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "next": {"$ref": "#/$defs/at"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}


def fits(given: dict) -> bool:
    """By hand."""

    def is_at(value: object) -> bool:
        return (
            isinstance(value, dict)
            and type(value["x"]) is bool
            and set(value) <= {"x", "next"}
            and ("next" not in value or is_at(value["next"]))
        )

    return (
        is_at(given["at"])
        and given["kind"] in DEEP["properties"]["kind"]["enum"]
        and 1 <= len(given.get("label", "x")) <= 3
        and given.get("count", 3) in (3, 4, 5)
        and len(given.get("tags", ())) <= 2
        and all(tag is None or isinstance(tag, str) for tag in given.get("tags", ()))
        and set(given) <= set(DEEP["properties"])
    )


@pytest.mark.parametrize("style", ["lfm2", "gemma4", "olmo3", "pythonic"])
@pytest.mark.parametrize("strict", [True, False])
async def test_deep_parameters_are_kept_to(style: str, strict: bool):
    use = ToolUse((Tool("deep", "", DEEP, strict=strict),), must=True, parallel=False)
    keys: set[str] = set()
    for seed in range(25):
        guide = await guide_of(WORLDS[style], use)
        tokens = walk(WORLDS[style], guide, random.Random(seed))
        text, found = heard(WORLDS[style], tokens, use)
        assert guide.ended
        assert text == ""
        ((_, given),) = plain(found)
        assert fits(given)
        keys |= given.keys()
    assert keys == DEEP["properties"].keys()


@pytest.mark.parametrize("style", ["lfm2", "gemma4"])
async def test_what_does_not_fit_is_not_written(style: str):
    use = ToolUse((Tool("weather", "", DEEP, strict=True),), must=True)
    for given, good in (
        ({"label": "abc", "kind": "a", "at": {"x": True, "next": {"x": False}}, "tags": [None]},
         True),
        ({"kind": None, "at": {"x": True}}, True),
        ({"kind": "b", "at": {"x": True}}, False),
        ({"kind": "a", "at": {"x": 1}}, False),
        ({"kind": "a", "at": {"next": {"x": True}}}, False),
        ({"label": "abcd", "kind": "a", "at": {"x": True}}, False),
        ({"kind": "a", "at": {"x": True}, "count": 6}, False),
        ({"kind": "a"}, False),
        ({"at": {"x": True}}, False),
        ({"kind": "a", "at": {"x": True}, "other": 1}, False),
    ):  # fmt: skip
        tokens = spoken(WORLDS[style], call(**given))
        assert (write(await guide_of(WORLDS[style], use), tokens) == len(tokens)) == good


REFUSED = (
    {"a": {"type": "string", "pattern": "x+"}},
    {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
    {"a": {"type": "object", "patternProperties": {"x": {}}}},
    {"a:b": {"type": "string"}},
    {"a": {"enum": []}},
    {"a": {"enum": [5], "type": "string"}},
    {"a": False},
)


@pytest.mark.parametrize("properties", REFUSED)
async def test_what_a_notation_cannot_keep_is_refused_where_it_is_strict(properties: dict):
    shape = {"type": "object", "properties": properties}
    use = ToolUse((Tool("f", "", shape, strict=True),), must=True)
    with pytest.raises(RequestInvalid) as caught:
        await guide_of(WORLDS["gemma4"], use)
    assert caught.value.param == "tools"
    if properties in REFUSED[:3]:
        loose = ToolUse((Tool("f", "", shape),), must=True)
        assert await guide_of(WORLDS["gemma4"], loose)


async def test_a_schema_without_end_in_depth_is_refused_or_kept():
    deep: dict = {"type": "string"}
    for _ in range(80):
        deep = {"type": "object", "properties": {"a": deep}}
    use = ToolUse((Tool("f", "", deep),), must=True)
    with pytest.raises(RequestInvalid, match="cannot be enforced"):
        await guide_of(WORLDS["gemma4"], use)


@pytest.mark.parametrize("style", ["lfm2", "gemma4", "olmo3"])
async def test_any_value_is_one_where_a_schema_says_nothing(style: str):
    shape = {"type": "object", "properties": {"a": {}, "b": {"type": "object"}}, "required": ["a"]}
    use = ToolUse((Tool("weather", "", shape),), must=True)
    for value in ("x", 5, -1.5, True, None, [], [1, "a", [None]], {}, {"k": {"l": [True]}}):
        given = {"a": value, "b": {"c": "x", "d": 1}}
        tokens = spoken(WORLDS[style], call(**given))
        written = write(await guide_of(WORLDS[style], use), tokens)
        nested = style == "lfm2" and isinstance(value, list)
        assert written == len(tokens) or nested
        assert plain(heard(WORLDS[style], tokens, use)[1]) == [("weather", given)]


async def test_content_with_a_shape_may_stand_where_python_calls_have_no_mark():
    shape = Shape("schema", '{"type": "array", "items": {"type": "integer"}}')
    guides = await WORLDS["pythonic"].tool_guides(ToolUse(TOOLS), shape, 2)
    assert guides
    said = WORLDS["pythonic"].encode_prompt("[1, 2]", special=False)
    assert write(guides[0], said) == len(said)
    assert heard(WORLDS["pythonic"], said) == ("[1, 2]", [])
    tokens = spoken(WORLDS["pythonic"], call(days=3))
    assert write(guides[1], tokens) == len(tokens)


@pytest.mark.parametrize("style", ["lfm2", "olmo3"])
async def test_what_python_has_words_for_is_kept_to_other_keywords_too(style: str):
    some = {"anyOf": [{"type": "integer"}, {"type": "string"}], "minLength": 2}
    shape = {"type": "object", "properties": {"a": some, "b": {"enum": ["x", 5], "type": "string"}}}
    use = ToolUse((Tool("weather", "", shape, strict=True),), must=True)
    for given, good in (
        ({"a": 5}, True),
        ({"a": "xy"}, True),
        ({"a": "x"}, False),
        ({"a": True}, False),
        ({"a": None}, False),
        ({"b": "x"}, True),
        ({"b": 5}, False),
    ):
        tokens = spoken(WORLDS[style], call(**given))
        assert (write(await guide_of(WORLDS[style], use), tokens) == len(tokens)) == good
