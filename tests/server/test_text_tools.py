"""Tools through real templates: formats found, calls read back, any cuts."""

import json
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fader_server.errors import RequestInvalid
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tool_reader import CallReader
from fader_server.text.tool_values import types_of, ways_of
from fader_server.text.tools import CallPart, Tool, ToolUse
from tests.server.tool_chats import (
    ARGUMENTS,
    NASTY,
    SPEAKS,
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
from tests.server.tool_worlds import NO_TOOLS, SPECIAL, TEMPLATES, hf


@pytest.mark.parametrize("style", TEMPLATES)
def test_calls_that_the_template_writes_are_read_back(style: str):
    world = WORLDS[style]
    calls = [call(**ARGUMENTS), call("time-of_day", "abcdefgh2"), call(id="abcdefgh3", city="")]
    if form_of(world).between is None:
        calls = calls[:1]
    text, found = heard(world, spoken(world, *calls))
    assert text == ""
    assert plain(found) == [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
    assert len(calls) == (1 if style == "llama" else 3)


@pytest.mark.parametrize("style", SPEAKS)
def test_content_before_calls_stays_content(style: str):
    world = WORLDS[style]
    tokens = spoken(world, call(city="x"), content="Let me see: <tool_call> is a marker.")
    text, found = heard(world, tokens)
    assert text == "Let me see: <tool_call> is a marker."
    assert plain(found) == [("weather", {"city": "x"})]


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_plain_answer_is_what_it_is_without_tools(style: str):
    world = WORLDS[style]
    for said in ("hello", " \n two  spaces \n", "{", '{"name": "weather"}', "<tool_call>\n", NASTY):
        tokens = world.encode_prompt(said, special=False)
        assert heard(world, tokens) == (world.decode(tokens), [])


@pytest.mark.parametrize("style", ["granite", "mistral", "mistral_args", "deepseek"])
def test_a_special_marker_that_is_spelled_out_is_no_marker(style: str):
    world = WORLDS[style]
    tokens = spoken(world, call(city="x"))
    names = [world.token_text(token) for token in tokens]
    assert set(names) & set(SPECIAL)
    spelled = [
        piece
        for token, name in zip(tokens, names, strict=True)
        for piece in (_bytes(world, name) if name in SPECIAL else [token])
    ]
    assert heard(world, tokens)[1] != []
    assert heard(world, spelled)[1] == []


def _bytes(world: Tokenizer, text: str) -> list[int]:
    half = len(text) // 2
    return [
        t for part in (text[:half], text[half:]) for t in world.encode_prompt(part, special=False)
    ]


@pytest.mark.parametrize("style", NO_TOOLS)
def test_a_base_without_readable_calls_refuses_tools_and_past_calls(style: str):
    world = Tokenizer(hf(NO_TOOLS[style]), max_model_len=4096)
    with pytest.raises(RequestInvalid, match='only tool_choice "none"') as caught:
        world.encode_chat([{"role": "user", "content": "x"}], TOOLS)
    assert caught.value.param == "tools"
    with pytest.raises(RequestInvalid) as caught:
        world.encode_chat(answer(call()))
    assert caught.value.param == "messages"
    assert world.encode_chat([{"role": "user", "content": "x"}])


def test_a_thought_that_the_template_adds_is_no_part_of_a_call():
    role = "<|im_start|>{{ m.role }}\n"
    thought = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    template = TEMPLATES["hermes"].replace(role, role + thought)
    assert template != TEMPLATES["hermes"]
    assert form_of(Tokenizer(hf(template), max_model_len=64)) == form_of(WORLDS["hermes"])


def test_a_template_of_its_own_for_tools_is_used():
    both = hf("")
    both.chat_template = {"default": NO_TOOLS["silent"], "tool_use": TEMPLATES["hermes"]}
    world = Tokenizer(both, max_model_len=4096)
    messages = [{"role": "user", "content": "x"}]
    assert world.encode_chat(messages, TOOLS) == WORLDS["hermes"].encode_chat(messages, TOOLS)


def test_ids_of_other_servers_become_short_where_a_template_takes_no_others():
    told = TEMPLATES["mistral"].replace('{"content', '{{ m.tool_call_id }}{"content')
    assert told != TEMPLATES["mistral"]
    world = Tokenizer(hf(told), max_model_len=4096)

    def ids(*given: str) -> list[str]:
        chat = answer(*(call(id=id) for id in given))
        chat += [{"role": "tool", "tool_call_id": id, "content": "ok"} for id in given]
        text = "".join(map(world.token_text, world.encode_chat(chat, TOOLS)))
        written = re.findall(r'"id": "(.*?)"', text)
        assert re.findall(r"\[TOOL_RESULTS\] (.*?)\{", text) == written
        return written

    foreign = ids("call_1", "call_2", "sparrow01", "[TOOL_CALLS]")
    assert foreign[2] == "sparrow01"
    assert len(set(foreign)) == 4
    assert all(re.fullmatch("[a-z0-9]{9}", id) for id in foreign)
    assert ids("call_2") == foreign[1:2], "the same in every turn: prefixes are found again"


@pytest.mark.parametrize("style", TEMPLATES)
def test_where_any_id_is_taken_it_stays_as_it_is(style: str):
    world = WORLDS[style]
    assert world._chat is not None
    assert world._chat._short_ids == (style == "mistral")
    world.encode_chat(answer(call(id="call_abc-123")), TOOLS)


TOLD = {
    "hermes": ("a JSON object a call", "<tool_call>", True),
    "granite": ("a JSON list of calls", "<|tool_call|>", True),
    "llama": ("a JSON object a call", "", False),
    "deepseek": ("a name and a JSON object a call", "<|calls|><|call|>function<|sep|>", True),
    "coder": ("a name and fields a call", "<tool_call>\n<function=", True),
    "gemma4": ("a name and members in brackets a call", "<|tool_call> call:", True),
    "lfm2": ("a name and members in brackets a call", "<|tool_call_start|> [", True),
    "lfm2_silent": ("a name and members in brackets a call", "<|tool_call_start|> [", True),
}
REASONS = {
    "repr": "writes calls in a form that is not known here",
    "channels": "writes calls in the channels that answers are in",
    "silent": "shows no tools to the model",
    "mute": "writes no calls",
    "bare": "cannot be told from text",
    "lines": "cannot be told from text",
}


@pytest.mark.parametrize("style", TOLD)
def test_the_form_that_was_learnt_is_told_in_words(style: str):
    form, marker, several = TOLD[style]
    assert WORLDS[style].calls_told == {"form": form, "marker": marker, "several": several}


@pytest.mark.parametrize("style", REASONS)
def test_why_no_form_was_learnt_is_told_in_words(style: str):
    told = Tokenizer(hf(NO_TOOLS[style]), max_model_len=99).calls_told
    assert told["form"] == "none"
    assert REASONS[style] in str(told["reason"])


def test_a_base_without_a_chat_template_is_told_as_one():
    plain = hf(TEMPLATES["hermes"])
    plain.chat_template = None
    told = Tokenizer(plain, max_model_len=99).calls_told
    assert told == {"form": "none", "reason": "there is no chat template"}


# Reading: the same whatever the cuts, each broken call content to where it breaks

PARTS = [
    "Hello", " ", "\n", "{", "}", '"', ",", "[", "]", "weather", "<tool_call>", "</tool_call>",
    "<tool_call>\n{", '{"name": "weather", "arguments": {"days": 1}}', '{"name": "x"}',
    "<function=weather>", "<parameter=days>\n", "5", "\n</parameter>", "</function>", "<calls>",
    '<invoke name="weather">', '<parameter name="days">', "</parameter>", "</invoke>", "</calls>",
    "<arg_key>days</arg_key>", "<arg_value>7</arg_value>", "\ud800", "\ud801", "\ud802",
    "weather(", "weather(days=1)", 'city="x\\"', "(", ")", "=", ":", "'", "\\u00e4", "{days:1}",
    "call:weather", "<function_calls>", "</function_calls>", "time-of_day()", "1.5", "None",
    "\ud803", "\ud803x\ud803",
]  # fmt: skip


def pieces_of(style: str, chunks: list[str], use: ToolUse = USE) -> list[str | ToolCall]:
    reader = CallReader(form_of(WORLDS[style]), use)
    return folded([piece for chunk in chunks for piece in reader.feed(chunk)] + reader.finish())


@given(
    st.lists(st.sampled_from(PARTS), max_size=25), st.sampled_from(sorted(TEMPLATES)), st.randoms()
)
@settings(max_examples=600, deadline=None)
def test_cuts_change_nothing_and_no_text_is_lost(parts: list[str], style: str, rng: random.Random):
    text = "".join(parts)
    whole = pieces_of(style, [text])
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(9)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces_of(style, chunks) == whole
    assert pieces_of(style, list(text)) == whole
    if not any(isinstance(piece, ToolCall) for piece in whole):
        shown = text.translate(dict.fromkeys(range(0xD800, 0xD804)))
        assert "".join(map(str, whole)) == shown


def test_content_is_held_back_only_while_it_may_be_a_marker_or_space_before_one():
    reader = CallReader(form_of(WORLDS["hermes"]), USE)
    assert reader.feed("Hello <tool") == ["Hello"]
    assert reader.feed("s") == [" <tools"]
    assert reader.feed("\n\n") == []
    assert reader.feed("and") == ["\n\nand"]


GOOD = '{"name": "weather", "arguments": {"days": 1}}'
MADE = ToolCall("weather", '{"days": 1}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"<tool_call>{GOOD}</tool_call>", [MADE]),
        (f"<tool_call> \n\t{GOOD}\n\n</tool_call>\n", [MADE]),
        (f"<tool_call>\n{GOOD}", [MADE]),  # the model ended it there
        (f"<tool_call>\n{GOOD}\n</tool", [MADE]),
        (f"a <tool_call>{GOOD}</tool_call> b", ["a", MADE, "b"]),
        (f"<tool_call>{GOOD}</tool_call>" * 2, [MADE, MADE]),
        (f'<tool_call>{GOOD.replace("arguments", "parameters")}</tool_call>', [MADE]),
        (f'<tool_call>{GOOD[:-1]}, "id": 1}}</tool_call>', [MADE]),
        ('<tool_call>{"arguments": {"days": 1}, "name": "weather"}</tool_call>', [MADE]),
        (f"<tool_call>x{GOOD}</tool_call>", None),
        (f"<tool_call>{GOOD}x</tool_call>", None),
        (f"<tool_call>{GOOD.replace('weather', 'other')}</tool_call>", None),
        ('<tool_call>{"name": "weather"}</tool_call>', None),
        ('<tool_call>{"name": "weather", "arguments": "{}"}</tool_call>', None),
        ('<tool_call>{"name": "weather", "arguments": {"a": NaN}}</tool_call>', None),
        (
            '<tool_call>{"name": "weather", "arguments": {"a": [-1e999, "\\ud800 é"]}}</tool_call>',
            [ToolCall("weather", '{"a": [-1.7976931348623157e+308, "\\ud800 \\u00e9"]}')],
        ),
        (f'<tool_call>{{"name": "weather", "arguments": {{"a": {"9" * 5000}}}}}</tool_call>', None),
        (f"<tool_call>[{GOOD}]</tool_call>", None),
        ('<tool_call>{"name": "weather", "arguments": {"days": 1]}</tool_call>', None),
        (f"<tool_call>{'{' * 100}", None),
        ("<tool_call>", None),
        ("<tool_call", None),
        (f"<tool_call><tool_call>{GOOD}</tool_call>", ["<tool_call>", MADE]),
        (f"<tool_call>{{x}}<tool_call>{GOOD}</tool_call>", ["<tool_call>{x}", MADE]),
    ],
)  # fmt: skip
def test_what_is_a_call_and_what_is_not(text: str, expected: list[str | ToolCall] | None):
    assert pieces_of("hermes", [text]) == ([text] if expected is None else expected)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"name": "weather", "parameters": {"days": 1}}', True),
        (' \n{"name": "weather", "parameters": {"days": 1}}\n', True),
        ('{"name": "weather", "parameters": {"days": 1}} is it', False),
        ('It is {"name": "weather", "parameters": {"days": 1}}', False),
        ('{"name": "weather", "parameters": {"days": 1}', False),
    ],
)
def test_a_call_without_a_mark_is_the_whole_answer_or_none(text: str, whole: bool):
    assert pieces_of("llama", [text]) == ([MADE] if whole else [text])


@pytest.mark.parametrize(
    ("lead", "apart", "tail"),
    [("<tool>", "\n", ""), ("<tool>", ";", ""), ("<tool>", "; ", "</tool>")],
)
def test_one_marker_for_several_calls_is_read(lead: str, apart: str, tail: str):
    world = Tokenizer(hf(_listed(lead, apart, tail)), max_model_len=4096)
    written = [call(city="x"), call("time-of_day", "abcdefgh2", city="y")]
    found = plain(heard(world, spoken(world, *written))[1])
    assert found == [(c["function"]["name"], c["function"]["arguments"]) for c in written]


def test_several_calls_without_a_marker_are_refused():
    """They could not be told from content, as it comes."""
    world = Tokenizer(hf(_listed("[", ", ", "]")), max_model_len=4096)
    with pytest.raises(RequestInvalid, match="chat template"):
        world.encode_chat([{"role": "user", "content": "x"}], TOOLS)


def _listed(lead: str, apart: str, tail: str) -> str:
    template = TEMPLATES["granite"]
    start, stop = template.index("<|tool_call|>"), template.index("]{% endif %}<|im_end|>") + 1
    calls = (
        lead + "{% for call in m.tool_calls %}{{ call.function | tojson }}{% if not loop.last %}"
        "{{ '" + apart.replace("\n", "\\n") + "' }}{% endif %}{% endfor %}" + tail
    )
    return template[:start] + calls + template[stop:]


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("city", "5", "5"),
        ("city", "true", "true"),
        ("city", "\n a\n\n", "\n a\n\n"),
        ("days", "5", 5),
        ("days", " 5 ", 5),
        ("days", "five", None),
        ("days", "5.5", None),
        ("more", '{"a": "</parameter>"}', {"a": "</parameter>"}),
        ("more", "null", ...),
        ("more", "None", ...),
        ("unknown", "5", 5),
        ("unknown", "True", True),
        ("unknown", "five", "five"),
        ("unknown", '"five"', '"five"'),
        ("unknown", "1e999", 1.7976931348623157e308),
        ("unknown", "[" * 20_000, "[" * 20_000),
        ("more", '{"a":' * 70 + "1" + "}" * 70, None),
    ],
)
def test_text_of_a_field_is_the_value_its_schema_says(key: str, written: str, value: object):
    text = (
        f"<tool_call>\n<function=weather>\n<parameter={key}>\n{written}\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    pieces = pieces_of("coder", [text])
    if value is None:
        assert pieces == [text]
    else:
        (made,) = pieces
        assert isinstance(made, ToolCall)
        assert json.loads(made.arguments) == {key: None if value is ... else value}


def test_types_are_found_through_references_and_alternatives():
    shape = {
        "type": "object",
        "properties": {
            "a": {"$ref": "#/$defs/number"},
            "b": {"anyOf": [{"$ref": "#/$defs/name"}, {"type": "null"}]},
            "c": {"enum": [1, 2]},
            "d": {"$ref": "#/$defs/d"},
        },
        "$defs": {
            "number": {"type": "number"},
            "name": {"enum": ["5", "6"]},
            "d": {"$ref": "#/$defs/d"},
        },
    }
    reader = CallReader(form_of(WORLDS["glm"]), ToolUse((Tool("f", "", shape),)))
    fields = "".join(
        f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>"
        for k, v in (("a", "5"), ("b", "null"), ("c", "2"), ("d", "5"))
    )
    (made,) = reader.feed(f"<tool_call>f\n{fields}</tool_call>")
    assert isinstance(made, CallPart)
    assert json.loads(made.arguments) == {"a": 5, "b": None, "c": 2, "d": 5}


def test_alternatives_without_end_are_any_type():
    wide = {"anyOf": [{"$ref": f"#/$defs/{i}"} for i in range(300)]}
    none = {"anyOf": []}
    for last in (wide, none):
        shape = {"properties": {"a": wide}, "$defs": dict.fromkeys(map(str, range(300)), last)}
        began = time.process_time()
        assert types_of(ways_of(shape, "a")) == frozenset()
        assert time.process_time() - began < 0.5


MUST = ToolUse(TOOLS, must=True)
BY_PART = ("fields", "members")
AS_JSON = sorted(style for style in TEMPLATES if form_of(WORLDS[style]).body not in BY_PART)


def parts_of(world: Tokenizer, tokens: list[int], use: ToolUse) -> list[list[CallPart]]:
    """What calls gain with each token, and at the end."""
    stream = world.tool_stream(use)
    found = []
    for token in tokens:
        assert stream.feed(token).text == ""
        found.append(list(stream.taken()))
    assert stream.finish() == ""
    return [*found, list(stream.taken())]


@pytest.mark.parametrize("style", AS_JSON)
def test_arguments_that_a_grammar_keeps_are_told_as_they_come(style: str):
    world = WORLDS[style]
    written = [call(**ARGUMENTS), call("time-of_day", "abcdefgh2", city="}]", more={"a": {}})]
    if form_of(world).between is None:
        written = written[:1]
    gains = parts_of(world, spoken(world, *written), MUST)
    folded_calls = folded(part for parts in gains for part in parts)
    assert plain(folded_calls) == [
        (c["function"]["name"], c["function"]["arguments"]) for c in written
    ]
    assert sum(any(part.arguments for part in parts) for parts in gains) > 20 * len(written)
    whole = parts_of(world, spoken(world, *written), USE)
    assert sum(any(part.arguments for part in parts) for parts in whole) <= len(written)


@pytest.mark.parametrize("style", sorted(TEMPLATES))
def test_what_a_cut_leaves_of_a_call_that_must_come_is_no_content(style: str):
    world = WORLDS[style]
    tokens = spoken(world, call(city="somewhere", days=3))
    expected = '{"city": "somewhere", "days": 3}'
    begun = 0
    for cut in range(1, len(tokens)):
        text, calls = heard(world, tokens[:cut], MUST)
        assert text == ""
        for made in calls:
            assert made.name == "weather"
            if style in AS_JSON:
                assert expected.startswith(made.arguments)
                begun += len(made.arguments) < len(expected)
    assert bool(begun) == (style in AS_JSON)


def test_calls_whose_keys_come_in_another_order_are_told_whole():
    turned = '<tool_call>{"arguments": {"days": 1}, "name": "weather"}</tool_call>'
    for use in (USE, MUST):
        assert pieces_of("hermes", [turned], use) == [MADE]


def test_a_name_that_was_not_offered_is_no_call_there_either():
    text = f"<tool_call>{GOOD.replace('weather', 'other')}</tool_call>"
    assert not any(isinstance(piece, ToolCall) for piece in pieces_of("hermes", [text], MUST))


def test_only_the_named_tool_is_called():
    use = ToolUse(TOOLS, must=True, only=("time-of_day",))
    reader = CallReader(form_of(WORLDS["hermes"]), use)
    text = f"<tool_call>{GOOD}</tool_call>"
    assert MADE not in folded(reader.feed(text) + reader.finish())


@pytest.mark.parametrize("style", sorted(TEMPLATES))
def test_a_stop_string_counts_in_content_alone(style: str):
    world = WORLDS[style]
    tokens = spoken(world, call(city="stop here"))
    assert plain(heard(world, tokens, stops=["stop"])[1]) == [("weather", {"city": "stop here"})]
    if style in SPEAKS:
        tokens = spoken(world, call(city="x"), content="Now stop here.")
        assert heard(world, tokens, stops=["stop"]) == ("Now ", [])


def test_one_call_ends_an_answer_where_there_may_be_no_other():
    world = WORLDS["hermes"]
    tokens = spoken(world, call(city="a"), call(city="b", id="abcdefgh2"), content="x")
    stream = world.tool_stream(ToolUse(TOOLS, parallel=False), stops=["xyz"])
    deltas = [stream.feed(token) for token in tokens]
    assert deltas[-1].stopped
    assert "".join(delta.text for delta in deltas) + stream.finish() == "x"
    assert plain(folded(stream.taken())) == [("weather", {"city": "a"})]


@pytest.mark.parametrize("style", ["hermes", "coder", "invoke", "llama"])
@pytest.mark.parametrize("part", [" ", "<tool_call>", '<tool_call>{"', "<tool_call>{}", "<calls>",
    '<tool_call>\n<function=weather>\n<parameter=a>\n', "{", '{"a": "'])  # fmt: skip
def test_reading_takes_time_in_proportion_to_the_text(style: str, part: str):
    def seconds(count: int) -> float:
        reader = CallReader(form_of(WORLDS[style]), USE)
        began = time.process_time()
        for _ in range(count):
            reader.feed(part)
        reader.finish()
        return time.process_time() - began

    size = 6_000 // len(part)
    assert seconds(4 * size) < 40 * max(seconds(size), 0.001)
