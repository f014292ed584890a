"""Chats with two tools in every style of template, and what is said and heard there."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tool_reader import Piece
from fader_server.text.tools import Tool, ToolUse
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


@dataclass(frozen=True)
class ToolCall:
    """As it is once it has ended."""

    name: str
    arguments: str


def folded(pieces: Iterable[Piece]) -> list[str | ToolCall]:
    """With neighbouring texts as one, and the parts of every call."""
    found: list[str | ToolCall] = []
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, str):
            found[-1:] = [last + piece] if isinstance(last, str) else [*found[-1:], piece]
        elif piece.name:
            found.append(ToolCall(piece.name, piece.arguments))
        else:
            assert isinstance(last, ToolCall)
            found[-1] = ToolCall(last.name, last.arguments + piece.arguments)
    return found


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
    text, parts = "", []
    for token in tokens:
        text += stream.feed(token).text
        parts += stream.taken()
    text += stream.finish()
    return text, folded([*parts, *stream.taken()])


def plain(calls: list[ToolCall]) -> list[tuple[str, dict]]:
    return [(made.name, json.loads(made.arguments)) for made in calls]
