"""The two generation bodies as frozen facts, checked field by field against API.md.

Knows OpenAI's fields and our extensions; knows nothing about tokens, adapters that exist, or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fader_server.api.blends import NamedTerm, read_named
from fader_server.api.choosing import Choosing, Limits, is_token_ids, read_choosing
from fader_server.api.fields import Fields, is_text
from fader_server.api.known import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    FIXED_FIELDS,
    FIXED_OF_CHAT,
    FIXED_OF_COMPLETIONS,
    UNSERVED_FIELDS,
    Fixed,
)
from fader_server.api.messages import Message, read_messages
from fader_server.api.prediction import read_prediction
from fader_server.api.responses.asked import Asked
from fader_server.api.shapes import read_shape
from fader_server.api.tools import read_tools
from fader_server.errors import RequestInvalid
from fader_server.text.effort import EFFORTS
from fader_server.text.shape import Shape
from fader_server.text.tools import ToolUse

Prompt = str | tuple[int, ...]
_USAGE_OPTIONS = ("include_usage", "continuous_usage_stats")
_MOST_STOPS = 32
_LONGEST_STOP = 1024
_MOST_OF_STOPS = 4096


@dataclass(frozen=True, slots=True)
class Call:
    """One generation call. Exactly one of `prompts` and `messages` is filled."""

    model: str
    terms: tuple[NamedTerm, ...] | None
    """A blend named in the body, or None."""
    prompts: tuple[Prompt, ...]
    messages: tuple[Message, ...]
    n: int
    max_tokens: int | None
    """None: as many as the context holds, up to `longest`."""
    longest: int
    choosing: Choosing
    stop: tuple[str, ...]
    include_stop: bool
    """The stop string that ends a text is part of it."""
    shape: Shape | None
    """The JSON Schema that the text of every answer must have, as text; None: any text."""
    tools: ToolUse | None
    """What every answer may or must call; None: nothing."""
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    """A chunk at a stream's end tells it."""
    continuous_usage: bool
    """Every chunk of a stream tells it as it then is."""
    speaks: bool
    """A chat's prompt ends with what the template begins an answer with."""
    continues: bool
    """A chat's answer goes on with its last message."""
    effort: str | None
    """How hard the model is to think, one of EFFORTS; None: as it does by itself."""
    return_ids: bool
    """The answer has the ids of its tokens and of the prompt's."""
    names_by_id: bool
    """Where logprobs are told, tokens are called by their ids."""
    cache_salt: str
    ignored: int
    """Unknown fields, and keys of tools, that were ignored."""
    prediction: str = ""
    """What the answer may be like."""
    asked: Asked | None = None
    """Of /v1/responses."""

    @property
    def chat(self) -> bool:
        return bool(self.messages)


def read_completion(body: dict[str, Any], limits: Limits) -> Call:
    """A /v1/completions body. Raises RequestInvalid."""
    fields = Fields(body)
    fields.unknown(COMPLETION_FIELDS)
    prompts = _prompts(fields, limits)
    echo = fields.boolean("echo")
    most = _max_tokens(fields, limits, low=0 if echo else 1)
    most = min(16, limits.longest) if most is None else most
    logprobs = None
    if fields.raw("logprobs") is not False:  # a chat's way to say none
        logprobs = fields.optional_integer("logprobs", low=0, high=20)
    n = fields.integer("n", 1, low=1, high=limits.max_n)
    _refuse_unserved(fields, n, FIXED_OF_COMPLETIONS)
    return _call(
        fields, limits, prompts=prompts, messages=(), n=n, max_tokens=most,
        tools=None, logprobs=logprobs, echo=echo,
    )  # fmt: skip


def read_chat(body: dict[str, Any], limits: Limits) -> Call:
    """A /v1/chat/completions body. Raises RequestInvalid."""
    fields = Fields(body)
    fields.unknown(CHAT_FIELDS)
    return read_chat_fields(fields, limits)


def read_chat_fields(fields: Fields, limits: Limits) -> Call:
    """The same of fields whose names have been judged."""
    messages = read_messages(fields)
    most = _max_tokens(fields, limits, low=1)
    logprobs = None
    top = fields.optional_integer("top_logprobs", low=0, high=20)
    none = _is_one_of((0,), fields.raw("logprobs"))  # some clients' false
    if not none and fields.boolean("logprobs"):
        logprobs = top or 0
    elif top:
        fields.refuse("top_logprobs", "needs logprobs to be true")
    n = fields.integer("n", 1, low=1, high=limits.max_n)
    _refuse_unserved(fields, n, FIXED_OF_CHAT)
    _refuse_of_chat(fields)
    tools = read_tools(fields)
    continues = read_continues(fields, messages)
    return _call(
        fields, limits, prompts=(), messages=messages, n=n, max_tokens=most,
        tools=tools, logprobs=logprobs, echo=False, continues=continues,
    )  # fmt: skip


def read_continues(fields: Fields, messages: tuple[Message, ...]) -> bool:
    """Whether the answer goes on with the last message: as vLLM's field asks, or `prefix` of that
    message, as DeepSeek and Mistral have it."""
    name, last = "continue_final_message", messages[-1] if messages else None
    asked = fields.boolean(name)
    if not asked and (last is None or not last.prefix):
        return False
    if fields.raw("add_generation_prompt") is True:
        fields.refuse(name, "and add_generation_prompt cannot both be true")
    elif last is not None and (last.role != "assistant" or last.calls or not last.content):
        fields.refuse(name, "needs a last message of the assistant with content and no tool_calls")
    return True


def read_effort(fields: Fields) -> str | None:
    """How hard the model is to think; None: as it does by itself."""
    return next((e for e in EFFORTS if e == fields.raw("reasoning_effort")), None)


def _max_tokens(fields: Fields, limits: Limits, *, low: int) -> int | None:
    most = None
    for name in ("max_tokens", "max_completion_tokens"):  # the later one wins
        given = fields.optional_integer(name, low=low, high=limits.longest)
        most = most if given is None else given
    return most


_MISSING = "is not supported by this server"


def _refuse_unserved(fields: Fields, n: int, own: Fixed) -> None:
    fields.only("best_of", lambda v: v == n and type(v) is int, "is not supported beyond n")
    refuse_others(fields, {**FIXED_FIELDS, **own})
    for name in UNSERVED_FIELDS:
        fields.only(name, lambda v: v in (False, "", [], {}), _MISSING)


def refuse_others(fields: Fields, fixed: Fixed) -> None:
    """Whatever these fields say but what is done here anyway."""
    for name, (allowed, why) in fixed.items():
        fields.only(name, partial(_is_one_of, allowed), why)


def _is_one_of(allowed: Sequence[object], value: object) -> bool:
    """Numbers are equal as JSON has them; true is no number."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _refuse_of_chat(fields: Fields) -> None:
    if fields.raw("function_call") != "none":  # then none is called, and the model is shown none
        fields.only("functions", lambda v: v == [], f'{_MISSING} unless function_call is "none"')
    fields.only("function_call", lambda v: v in ("none", "auto"), _MISSING)
    fields.only("modalities", lambda v: v == ["text"], _MISSING)
    fields.only("chat_template", lambda v: False, "may not come from a request")
    fields.only(
        "chat_template_kwargs",
        lambda v: v == {},
        "may not come from a request: see reasoning_effort and --default-chat-template-kwargs",
    )


def _call(
    fields: Fields,
    limits: Limits,
    *,
    prompts: tuple[Prompt, ...],
    messages: tuple[Message, ...],
    n: int,
    max_tokens: int | None,
    tools: ToolUse | None,
    logprobs: int | None,
    echo: bool,
    continues: bool = False,
) -> Call:
    model = fields.string("model", required=True, longest=512)
    stream = fields.boolean("stream")
    options = _stream_options(fields, stream=stream)
    choices = max(1, len(prompts)) * n
    shape = read_shape(fields)
    if continues and (tools or shape):
        fields.refuse(
            "continue_final_message", "cannot stand beside tools and what the answer must look like"
        )
    choosing = read_choosing(fields, limits, max_tokens)
    if choosing.permitted and (tools or shape):
        fields.refuse(
            "allowed_token_ids", "cannot stand beside tools and what the answer must look like"
        )
    call = Call(
        model=model,
        terms=read_named(fields, model, limits.max_terms),
        prompts=prompts,
        messages=messages,
        n=n,
        max_tokens=max_tokens,
        longest=_longest_of(choices, limits),
        choosing=choosing,
        stop=_stop(fields),
        include_stop=fields.boolean("include_stop_str_in_output"),
        shape=shape,
        tools=tools,
        logprobs=logprobs,
        echo=echo,
        stream=stream,
        include_usage=options.get("include_usage") is True,
        continuous_usage=options.get("continuous_usage_stats") is True,
        speaks=fields.boolean("add_generation_prompt", default=not continues),
        continues=continues,
        effort=read_effort(fields),
        return_ids=fields.boolean("return_token_ids"),
        names_by_id=fields.boolean("return_tokens_as_token_ids"),
        cache_salt=fields.string("cache_salt", longest=256),
        prediction=read_prediction(fields),
        ignored=fields.ignored,
    )
    fields.finish()
    _check_budget(call, choices, limits)
    return call


def _longest_of(choices: int, limits: Limits) -> int:
    """Tokens of each of a call's choices, where it does not say."""
    return min(limits.longest, max(1, limits.max_call_tokens // choices))


def _check_budget(call: Call, choices: int, limits: Limits) -> None:
    if choices > limits.max_choices:
        raise RequestInvalid(
            f"prompts times n must be at most {limits.max_choices}; send several requests",
            param="n" if call.n > 1 else "prompt",
        )
    if choices * (call.max_tokens or 1) > limits.max_call_tokens:
        raise RequestInvalid(
            f"prompts times n times max_tokens must be at most {limits.max_call_tokens}",
            param="max_tokens",
        )


def _prompts(fields: Fields, limits: Limits) -> tuple[Prompt, ...]:
    value = fields.raw("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
        value = [value]
    if not isinstance(value, list) or not value:
        fields.refuse("prompt", "is required: text, token ids, or a list of either, not empty")
        return ()
    if len(value) > limits.max_choices:
        fields.refuse("prompt", f"must hold at most {limits.max_choices} prompts")
        return ()
    prompts: list[Prompt] = []
    for item in value:
        if isinstance(item, str) and item and is_text(item):
            prompts.append(item)
        elif isinstance(item, list) and item and is_token_ids(item, limits.vocab_size):
            prompts.append(tuple(item))
        else:
            wanted = f"text, or token ids from 0 to {limits.vocab_size - 1}, not empty"
            fields.refuse("prompt", f"must be {wanted}")
            return ()
    return tuple(prompts)


def _stop(fields: Fields) -> tuple[str, ...]:
    items = fields.texts("stop", most=_MOST_STOPS, longest=_LONGEST_STOP, alone=True)
    if sum(map(len, items)) > _MOST_OF_STOPS:
        fields.refuse("stop", f"must have at most {_MOST_OF_STOPS} characters in all")
        return ()
    return items


def _stream_options(fields: Fields, *, stream: bool) -> dict[str, Any]:
    """The usage options are true, false or null where they are there."""
    value = fields.raw("stream_options")
    if value is None:
        return {}
    if not stream:
        fields.refuse("stream_options", "needs stream to be true")
        return {}
    kinds = (bool, type(None))
    if not isinstance(value, dict) or any(type(value.get(n)) not in kinds for n in _USAGE_OPTIONS):
        names = " and ".join(_USAGE_OPTIONS)
        fields.refuse("stream_options", f"must be an object with {names} true or false")
        return {}
    return value
