"""A body of /v1/responses as the call that a chat would be, and what its answer repeats of it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fader_server.api.choosing import Limits
from fader_server.api.fields import Fields, is_text
from fader_server.api.known import (
    FIXED_OF_RESPONSES,
    RESPONSE_FIELDS,
    RESPONSE_NAMES,
    SAME_FIELDS,
)
from fader_server.api.pieces import Json, encode
from fader_server.api.response_format import FIELD as SCHEMA
from fader_server.api.responses.asked import Asked
from fader_server.api.responses.items import read_input
from fader_server.api.responses.tools import read_choice, read_offer
from fader_server.api.schemas import Call, read_chat_fields, refuse_others
from fader_server.errors import RequestInvalid

_LOGPROBS = "message.output_text.logprobs"
_MOST_PAIRS = 16
_TEXTS = ("user", "safety_identifier", "prompt_cache_key")
_OF_TEXT = ("format", "verbosity")
_VERBOSITIES = ("low", "medium", "high")
_OF_REASONING = ("effort", "summary", "generate_summary", "context", "mode")
_OF_STREAM = ("include_obfuscation",)
_INNER = ("json_schema.", "function.")
"""Objects of a chat whose keys a response has one level further up."""


class _ChatFields(Fields):
    """A chat's fields that were made of a response: problems have the names that it has."""

    def __init__(self, body: Json, places: Sequence[int]) -> None:
        super().__init__(body)
        self._places = places

    def refuse(self, name: str, text: str, *, inside: str = "") -> None:
        if name == "messages" and inside:
            inside = f"[{self._places[int(inside[1:-1])]}]"
        for inner in _INNER:
            text = text.replace(inner, "")
        super().refuse(RESPONSE_NAMES.get(name, name), text, inside=inside)


def read_response(body: dict[str, Any], limits: Limits) -> Call:
    """A /v1/responses body. Raises RequestInvalid."""
    fields = Fields(body)
    fields.unknown(RESPONSE_FIELDS)
    refuse_others(fields, FIXED_OF_RESPONSES)
    _object(fields, "stream_options", _OF_STREAM)
    text, reasoning = _object(fields, "text", _OF_TEXT), _object(fields, "reasoning", _OF_REASONING)
    messages, places = read_input(fields)
    offer = read_offer(fields)
    scored = _includes(fields, _LOGPROBS) or fields.raw("top_logprobs") not in (None, 0)
    chat = {name: body[name] for name in SAME_FIELDS & body.keys()} | {
        "messages": messages,
        "max_tokens": fields.raw("max_output_tokens"),
        "tools": offer.tools,
        "tool_choice": read_choice(fields),
        "top_logprobs": fields.raw("top_logprobs"),
        "logprobs": scored,
        SCHEMA: _format(text.get("format")),
        "reasoning_effort": reasoning.get("effort"),
    }
    told = _told(fields, text)
    fields.finish()
    made = _ChatFields(chat, places)
    made.ignored = fields.ignored
    call = read_chat_fields(made, limits)
    choosing = call.choosing
    told |= {
        "max_output_tokens": call.max_tokens,
        "top_logprobs": call.logprobs or 0,
        "temperature": choosing.temperature,
        "top_p": choosing.top_p,
        "presence_penalty": choosing.presence_penalty,
        "frequency_penalty": choosing.frequency_penalty,
        "reasoning": {"effort": call.effort, "summary": None},
        "tools": offer.shown,
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", default=True),
    }
    try:
        repeats = {name: encode(value) for name, value in told.items()}
    except ValueError:
        raise RequestInvalid("the body has text or a number that JSON cannot carry back") from None
    return replace(call, asked=Asked(repeats, offer.namespaces, call.stream))


def _object(fields: Fields, name: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    value = fields.raw(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        fields.refuse(name, "must be an object")
        return {}
    fields.unknown_inside(name, [value], known)
    return value


def _includes(fields: Fields, name: str) -> bool:
    """Whether `include` asks for this. What else it may ask for is of tools that are not here, or
    of thoughts that are told in plain."""
    value = fields.raw("include")
    if value is None:
        return False
    if not isinstance(value, list) or not all(is_text(one) for one in value):
        fields.refuse("include", "must be a list of texts")
        return False
    return name in value


def _format(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """`text.format` as a chat has it; what has no form of it is left as it is."""
    if not isinstance(value, dict) or value.get("type") != "json_schema":
        return value
    inner = {key: part for key, part in value.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}


def _told(fields: Fields, text: Mapping[str, Any]) -> Json:
    """What an answer repeats as it came, or says of what is not done here."""
    plain = {name: fields.raw(name) for name in _TEXTS}
    told: Json = {name: value if is_text(value) else None for name, value in plain.items()}
    choice = fields.raw("tool_choice")
    return told | {
        "background": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "disabled",
        "service_tier": "default",
        "instructions": fields.raw("instructions"),
        "metadata": _metadata(fields),
        "max_tool_calls": fields.optional_integer("max_tool_calls", low=0, high=1 << 31),
        "text": {
            "format": text.get("format") or {"type": "text"},
            "verbosity": next((v for v in _VERBOSITIES if v == text.get("verbosity")), "medium"),
        },
        "tool_choice": "auto" if choice is None else choice,
    }


def _metadata(fields: Fields) -> Json:
    value = fields.raw("metadata")
    if value is None:
        return {}
    if (
        not isinstance(value, dict)
        or len(value) > _MOST_PAIRS
        or not all(isinstance(one, str) and len(one) <= 512 for one in (*value, *value.values()))
    ):
        fields.refuse("metadata", f"must be an object of up to {_MOST_PAIRS} short texts")
        return {}
    return value
