"""Finds how a base writes calls, out of what its chat template makes of some that are known."""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fader_server.text.notation_probe import known_format, read_notation
from fader_server.text.tool_format import CONTROL, FieldStyle, Frame, ToolFormat
from fader_server.text.tool_frames import frame_of, recognised
from fader_server.text.tool_samples import (
    KEYS,
    NAMES,
    ONE,
    TWO,
    VALUES,
    Render,
    Samples,
    Written,
    common_end,
    common_start,
)


@dataclass(frozen=True, slots=True)
class Unread:
    """No calls can be read."""

    reason: str
    """In words."""


def find_format(
    render: Render, special: Mapping[str, int], ends: Collection[int]
) -> ToolFormat | Unread:
    """The format, or why there is none that can be read here: not either where special tokens of
    calls are those in which an answer that is text is wrapped, as channels are.

    special: ids of special tokens by name. ends: tokens that end an answer.
    """
    samples = Samples(render, special, ends)
    if not samples.shown:
        return Unread("the chat template shows no tools to the model")
    # as text only where the template takes nothing else: another it would write down unread
    as_text = samples.write(ONE, as_text=False) is None
    if as_text and samples.write(ONE, as_text=True) is None:
        return known_format(special) or Unread("the chat template writes no calls")
    found = _Probe(samples, as_text=as_text).read() or read_notation(samples)
    if found is None:
        return Unread("the chat template writes calls in a form that is not known here")
    if not recognised(found):
        return Unread("the calls that the chat template writes cannot be told from text")
    if samples.wrapping & set(found.controls.values()):
        return Unread("the chat template writes calls in the channels that answers are in")
    return found


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a format writes, but for names and arguments."""

    opening: str
    middle: str
    between: str | None
    closing: str


class _Probe:
    """One way to give calls to the template."""

    def __init__(self, samples: Samples, *, as_text: bool) -> None:
        self._samples = samples
        self._as_text = as_text

    def read(self) -> ToolFormat | None:
        one = self._write(ONE)
        if one is None:
            return None
        start, stop = _find(one.after, lambda value: value == ONE)
        return self._read_json(one, start, stop) if stop else self._read_fields(one)

    def _write(self, *arguments: dict[str, str]) -> Written | None:
        return self._samples.write(*arguments, as_text=self._as_text)

    def _read_json(self, one: Written, start: int, stop: int) -> ToolFormat:
        """A format whose arguments are one JSON object, from `start` to `stop` behind the name."""
        two = self._write(ONE, ONE)
        between = None
        if two is not None and two.before == one.before:
            text, name, last = two.after[stop:].partition(NAMES[1])
            between = text if name and last == one.after else None
        written = _Parts(one.before, one.after[:start], between, one.after[stop:])
        whole = one.before + NAMES[0] + one.after
        begin, end = _find(whole, _is_list_of_calls)
        if end:
            frame = Frame(whole[:begin], whole[end:], "", "")
            return self._format("list", written, frame, keys=_keys(json.loads(whole[begin:end])[0]))
        begin, end = _find(whole, _is_call)
        if not end:
            frame = frame_of(one.before, between, written.closing)
            return self._format("named", written, frame)
        apart = None
        if between is not None and two is not None:
            both = two.before + NAMES[0] + two.after
            apart = both[end : max(end, _find(both, _is_call, end)[0])]
        frame = frame_of(whole[:begin], apart, whole[end:])
        return self._format("object", written, frame, keys=_keys(json.loads(whole[begin:end])))

    def _read_fields(self, one: Written) -> ToolFormat | None:
        """A format that writes arguments one by one; they are as these rules write them again."""
        none, pair, two = self._write({}), self._write(TWO), self._write({}, {})
        first = _split(one.after, KEYS[0], VALUES[0])
        both = _split(pair.after, KEYS[0], VALUES[0], *KEYS[1:], VALUES[1]) if pair else None
        if none is None or first is None or both is None:
            return None
        lead, within, rest = first
        before = common_end(lead, both[2])
        after = both[2].removesuffix(before)
        closing = rest.removeprefix(after)
        shared = common_start(before, closing)
        shared = shared[: len(shared) - len(shared.lstrip(">\"' \n"))]
        middle, after = lead.removesuffix(before) + shared, after + shared
        before, closing = before.removeprefix(shared), closing.removeprefix(shared)
        text = "".join(before + k + within + v + after for k, v in TWO.items())
        if none.after != middle + closing or both[4] != after + closing or pair is None:
            return None
        if pair.after != middle + text + closing or not _is_markup(before, within, after):
            return None
        between = None
        if two is not None and two.before == one.before:
            text, name, last = two.after.removeprefix(middle).partition(NAMES[1])
            between = text if name and last == middle + closing else None
        return self._format(
            "fields", _Parts(one.before, middle, between, closing),
            frame_of(one.before, between, closing), fields=FieldStyle(before, within, after),
        )  # fmt: skip

    def _format(
        self,
        body: Literal["object", "list", "named", "fields"],
        parts: _Parts,
        frame: Frame,
        *,
        keys: tuple[str, str] = ("", ""),
        fields: FieldStyle | None = None,
    ) -> ToolFormat:
        return ToolFormat(
            body, parts.opening, parts.middle, parts.between, parts.closing, frame,
            self._as_text, dict(self._samples.controls), keys, fields,
        )  # fmt: skip


def _find(text: str, good: Callable[[Any], bool], start: int = 0) -> tuple[int, int]:
    """Where the first JSON object or list stands that is good; (0, 0): nowhere."""
    for at in range(start, len(text)):
        if text[at] in "{[":
            with contextlib.suppress(ValueError):
                value, end = json.JSONDecoder().raw_decode(text, at)
                if good(value):
                    return at, end
    return 0, 0


def _is_call(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    found = isinstance(value, dict) and ONE in value.values()
    return found and any(name in value.values() for name in NAMES)


def _is_list_of_calls(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, list) and len(value) == 1 and _is_call(value[0])


def _keys(call: dict[str, Any]) -> tuple[str, str]:
    keys = {str(value): key for key, value in call.items()}
    return keys[NAMES[0]], keys[str(ONE)]


def _split(text: str, *words: str) -> list[str] | None:
    """The text around these words, each once and in order."""
    parts: list[str] = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            return None
        parts.append(part)
    return [*parts, text]


def _is_markup(*parts: str) -> bool:
    """Whether texts are such that they tell fields from values."""
    marks = "<" + "".join(map(chr, CONTROL))
    return all(part.strip() for part in parts) and any(char in marks for char in parts[-1])
