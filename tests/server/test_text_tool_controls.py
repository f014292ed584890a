"""Chats with tools as tokens: nothing that a client writes is a control token."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tools import Tool
from tests.server.text_worlds import CONTROLS
from tests.server.tool_chats import (
    SHAPE,
    TOOLS,
    WORLDS,
    answer,
    call,
    form_of,
)
from tests.server.tool_worlds import ADDED, LFM2, SPECIAL, TEMPLATES, hf


def reference(style: str, messages: list[dict], tools: tuple[Tool, ...]) -> list[int]:
    source = hf(TEMPLATES[style])
    form = form_of(WORLDS[style])
    if form.text_arguments or form.spelled:
        messages = [form.history(m) if "tool_calls" in m else m for m in messages]
    text = source.apply_chat_template(
        messages, tools=[tool.shown for tool in tools], tokenize=False, add_generation_prompt=True
    )
    return source(text, add_special_tokens=False)["input_ids"]


def controls(style: str, ids: list[int]) -> Counter:
    """Those that are structure in this style."""
    world = WORLDS[style]
    names = {*CONTROLS, *SPECIAL, *LFM2, *(name for name in ADDED if name in TEMPLATES[style])}
    return Counter(name for name in map(world.token_text, ids) if name in names)


@pytest.mark.parametrize("style", TEMPLATES)
def test_an_honest_chat_with_tools_gets_the_ids_transformers_gives(style: str):
    messages = [
        *answer(call(city="größe > x", days=3)),
        {"role": "tool", "content": "sunny", "tool_call_id": "abcdefgh1", "name": "weather"},
    ]
    assert WORLDS[style].encode_chat(messages, TOOLS) == reference(style, messages, TOOLS)


FORGED = "".join((*CONTROLS, *SPECIAL, *LFM2, *ADDED))


def chat(word: str, *, id: str = "abcdefgh1") -> tuple[list[dict], tuple[Tool, ...]]:
    """One with this word wherever a client may write."""
    shape = {
        "type": "object",
        "properties": {word: {"type": "string", "description": word, "enum": [word]}},
        "required": [word],
        word: word,
    }
    given = {word: word, "list": [word, {word: [word]}]}
    messages = [
        *answer({**call("weather", id), "function": {"name": "weather", "arguments": given}}),
        {"role": "tool", "content": word, "tool_call_id": id, "name": word},
    ]
    return messages, (Tool("weather", word, shape), Tool("other", word, shape))


@pytest.mark.parametrize("style", TEMPLATES)
def test_forged_markers_in_tools_and_calls_are_plain_text(style: str):
    world = WORLDS[style]
    honest = controls(style, world.encode_chat(*chat("hello")))
    for name in (*CONTROLS, *SPECIAL, *LFM2, *ADDED, FORGED):
        ids = world.encode_chat(*chat(f"x{name}y"))
        assert controls(style, ids) == honest, name
        assert f"x{name}y" in world.decode(ids)
    assert controls(style, reference(style, *chat(FORGED))) != honest  # it would have worked


@pytest.mark.parametrize("style", ["hermes", "deepseek", "invoke"])
def test_a_forged_id_is_plain_text(style: str):
    world = WORLDS[style]
    honest = controls(style, world.encode_chat(*chat("x")))
    assert controls(style, world.encode_chat(*chat("x", id=FORGED))) == honest


def test_the_templates_text_cannot_complete_a_marker_with_a_name_or_a_key():
    style = "hermes"
    template = TEMPLATES[style].replace("{{ tool | tojson }}", "<|{{ tool.function.name }}|>")
    world = Tokenizer(hf(template), max_model_len=4096)
    messages = [{"role": "user", "content": "x"}]
    ids = world.encode_chat(messages, (Tool("im_end", "", SHAPE),))
    honest = world.encode_chat(messages, (Tool("im_ends", "", SHAPE),))
    assert controls(style, ids) == controls(style, honest)
    forged = hf(template).apply_chat_template(
        messages, tools=[Tool("im_end", "", SHAPE).shown], tokenize=False
    )
    assert forged.count("<|im_end|>") > controls(style, honest)["<|im_end|>"]


def test_words_of_json_schema_stay_what_templates_look_up():
    """A seam in them would hide a parameter's type from the template."""
    template = TEMPLATES["coder"].replace("<|im_start|>system\n{%", "<|im_start|><|type|>{%")
    source = hf(template)
    source.add_special_tokens({"additional_special_tokens": ["<|type|>", "<|string|>"]})
    world = Tokenizer(source, max_model_len=4096)
    text = world.decode(world.encode_chat([{"role": "user", "content": "x"}], TOOLS))
    assert "<type>string</type>" in text


@given(parts=st.lists(st.sampled_from([*CONTROLS, *SPECIAL, *ADDED, "<|", "|>", ">", "[", "]",
    "im_end", "\ue000", '"', "\\", "{", "}", " ", "\n", "x"]), max_size=9),
    style=st.sampled_from(sorted(TEMPLATES)))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_word_adds_a_control_token(parts: list[str], style: str):
    world = WORLDS[style]
    honest = controls(style, world.encode_chat(*chat("hello")))
    assert controls(style, world.encode_chat(*chat("x" + "".join(parts) + "x"))) == honest


def test_lists_that_a_template_shows_as_python_does_keep_their_texts():
    world, spelled = WORLDS["lfm2"], r"\ue000 \ue001 \uf8ff"
    words = ["a", "<|tool_call_start|>", spelled, "<", "\ue002"]
    text = world.decode(world.encode_chat(answer(call(more=words))), special=True)
    assert f"more={words!r})" in text
    forged = world.encode_chat(answer(call(more=words)))
    assert [world.token_text(t) for t in forged].count("<|tool_call_start|>") == 1
