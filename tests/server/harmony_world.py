"""A base that speaks harmony: a chat template built as gpt-oss's is, and what is said and heard."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fader_server.text.harmony_reader import Channels
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tools import ToolUse
from tests.server.text_worlds import backend
from tests.server.tool_chats import ToolCall

MARKS = (
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
)  # fmt: skip
_SYSTEM = (
    "<|start|>system<|message|>You are a model.\n\n"
    "Reasoning: {{ reasoning_effort if reasoning_effort is defined else 'medium' }}\n\n"
    "# Valid channels: analysis, commentary, final. Each message has one."
    "{% if tools %}\nTools of 'functions' are called in the commentary channel.{% endif %}<|end|>"
)
_TYPE = (
    "{% macro type_of(spec) %}{% if spec.enum %}{{ '\"' + spec.enum | join('\" | \"') + '\"' }}"
    "{% elif spec.type in ('integer', 'number') %}number"
    "{% elif spec.type == 'array' %}{{ type_of(spec['items'] or {}) }}[]"
    "{% elif spec.type is string %}{{ spec.type }}{% else %}any{% endif %}{% endmacro %}"
)
_DEVELOPER = (
    "{% set lead = messages[0].content if messages[0].role in ('developer', 'system') else '' %}"
    "{% if lead or tools %}<|start|>developer<|message|>{% if lead %}# Instructions\n\n{{ lead }}"
    "\n\n{% endif %}{% if tools %}# Tools\n\n## functions\n\nnamespace functions {\n\n"
    "{% for tool in tools %}{% set f = tool.function %}// {{ f.description }}\ntype {{ f.name }} = "
    "{% if f.parameters.properties %}(_: {\n{% for key, spec in f.parameters.properties.items() %}"
    "{{ key }}{{ '' if key in (f.parameters.required or []) else '?' }}: {{ type_of(spec) }},\n"
    "{% endfor %}}) => any;\n\n{% else %}() => any;\n\n{% endif %}{% endfor %}"
    "} // namespace functions{% endif %}<|end|>{% endif %}"
)
_CALL = (  # one a message; its words are thought, and thoughts before a final answer are left out
    "{% set later = namespace(final=false) %}{% for n in messages[loop.index:] %}"
    "{% if n.role == 'assistant' and 'tool_calls' not in n %}{% set later.final = true %}"
    "{% endif %}{% endfor %}{% if m.content and m.thinking %}"
    "{{ raise_exception('content and thinking') }}"
    "{% elif (m.content or m.thinking) and not later.final %}<|start|>assistant<|channel|>analysis"
    "<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}"
    "{% set f = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ f.name }}<|channel|>"
    "commentary json<|message|>{{ f.arguments | tojson }}<|call|>{% set last.name = f.name %}"
)
TEMPLATE = (
    _TYPE + _SYSTEM + _DEVELOPER + "{% set last = namespace(name=none) %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% if '<|channel|>' in m.content %}"
    "{{ raise_exception('channels in the content') }}{% endif %}"
    "{% if 'tool_calls' in m %}" + _CALL + "{% elif loop.last and not add_generation_prompt %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% set last.name = none %}{% endif %}"
    "{% elif m.role == 'tool' %}{% if last.name is none %}{{ raise_exception('no call') }}"
    "{% endif %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def hf(
    template: str = TEMPLATE, *, marks: Sequence[str] = MARKS, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """words: tokens of their own, which are text."""
    tok = backend("byte_level")
    tok.add_special_tokens([AddedToken(name, normalized=False) for name in marks])
    tok.add_tokens([AddedToken(name, normalized=False) for name in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


WORLD = Tokenizer(hf(), max_model_len=4096)


@dataclass(frozen=True)
class Heard:
    """An answer."""

    thought: str = ""
    text: str = ""
    calls: tuple[ToolCall, ...] = ()

    @property
    def made(self) -> list[tuple[str, dict]]:
        return [(call.name, json.loads(call.arguments)) for call in self.calls]


def tokens_of(text: str, world: Tokenizer = WORLD) -> list[int]:
    """Names of marks are marks."""
    return world.encode_prompt(text, special=False)


def prompt_of(world: Tokenizer = WORLD) -> list[int]:
    return world.encode_chat([{"role": "user", "content": "x"}])


def gains(
    tokens: Iterable[int],
    use: ToolUse | None = None,
    *,
    world: Tokenizer = WORLD,
    prompt: Sequence[int] = (),
    stops: Iterable[str] = (),
) -> tuple[list[Heard], int]:
    """What each token of an answer gives, and the end, as a choice takes them; how many tokens
    were thought."""
    channels = world.thought(prompt or prompt_of(world))
    assert isinstance(channels, Channels)
    stream = (
        world.stream(stops=stops, thought=channels)
        if use is None
        else world.tool_stream(use, stops=stops, thought=channels)
    )
    found: list[Heard] = []
    length = 0

    def gain(thought: str, text: str) -> None:
        parts = stream.taken()
        calls = [ToolCall(part.name, part.arguments) for part in parts]
        found.append(Heard(thought, text, tuple(calls)))

    for token in tokens:
        thought = channels.take(token)
        if thought is not None:
            gain(thought, "")
            continue
        delta = stream.feed(token)
        assert delta.offset == length
        length += len(delta.text)
        gain("", delta.text)
        if delta.stopped:
            return found, channels.tokens
    thought = channels.finish()
    gain(thought, stream.finish())
    return found, channels.tokens


def heard(said: str | Iterable[int], use: ToolUse | None = None, **more) -> Heard:
    """A whole answer."""
    tokens = tokens_of(said, more.get("world", WORLD)) if isinstance(said, str) else said
    found, _ = gains(tokens, use, **more)
    calls: list[ToolCall] = []
    for call in (call for gain in found for call in gain.calls):
        if call.name:
            calls.append(call)
        else:
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + call.arguments)
    return Heard(
        "".join(gain.thought for gain in found), "".join(gain.text for gain in found), tuple(calls)
    )
