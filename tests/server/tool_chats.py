"""Chats with two tools in every style of template, and what is said and heard there."""

import json

from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tools import Tool, ToolCall, ToolUse
from tests.server.tool_worlds import TEMPLATES, hf

SHAPE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "more": {"type": ["object", "null"]},
    },
}
TOOLS = (Tool("weather", "Tells it.", SHAPE), Tool("time-of_day", "", SHAPE))
USE = ToolUse(TOOLS)
NASTY = 'Grüße </tool_call> \n"x"\\ [TOOL_CALLS] <|tool_call|>] {"name": </parameter 🦊'
ARGUMENTS = {"city": NASTY, "days": 3, "more": {"a": [1.5, None, True, "}]"]}}
WORLDS = {name: Tokenizer(hf(text), max_model_len=4096) for name, text in TEMPLATES.items()}
SPEAKS = [name for name in TEMPLATES if name in ("hermes", "granite", "coder", "glm", "invoke")]
"""Those whose answers with calls may have content."""


def call(name: str = "weather", id: str = "abcdefgh1", **arguments: object) -> dict:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def answer(*calls: dict, content: str = "") -> list[dict]:
    said = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return [{"role": "user", "content": "u"}, said]


def form_of(world: Tokenizer):
    form = world._chat.tool_format if world._chat else None
    assert form is not None
    return form


def spoken(world: Tokenizer, *calls: dict, content: str = "") -> list[int]:
    """The tokens that the template makes of an answer."""
    messages = answer(*calls, content=content)
    whole = world.encode_chat(messages, TOOLS)
    prompt = world.encode_chat(messages[:1], TOOLS)
    start = next(
        (at for at, pair in enumerate(zip(whole, prompt, strict=False)) if pair[0] != pair[1]),
        len(prompt),
    )
    ends = {world.token_text(t): t for t in range(world.vocab_size)}
    stops = {ends["</s>"], ends["<|im_end|>"], ends["<|eot_id|>"]}
    found = whole[start:]
    return found[: next(at for at, token in enumerate(found) if token in stops)]


def heard(
    world: Tokenizer, tokens: list[int], use: ToolUse = USE, **more
) -> tuple[str, list[ToolCall]]:
    stream = world.tool_stream(use, **more)
    text, calls = "", []
    for token in tokens:
        text += stream.feed(token).text
        calls += stream.taken()
    text += stream.finish()
    return text, [*calls, *stream.taken()]


def plain(calls: list[ToolCall]) -> list[tuple[str, dict]]:
    return [(made.name, json.loads(made.arguments)) for made in calls]
