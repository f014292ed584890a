"""Finds how a base writes calls: its chat template writes some that are known. Knows no tokens but
the names of special ones.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fader_server.text.tool_format import CONTROL, ID, FieldStyle, Frame, ToolFormat, with_text
from fader_server.text.tools import Tool


class Render(Protocol):
    """A chat with tools by the template; None: it refuses."""

    def __call__(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, prompt: bool
    ) -> str | None:
        """prompt: up to where the next answer begins."""
        ...


_NAMES = ("parrot", "heron")
_KEYS = ("crow", "wren")
_VALUES = ("finch", "robin")
_IDS = ("sparrow01", "magpie002")
"""Nine letters and digits: some templates take no other ids."""
_WORD = "ostrich"
_USER = {"role": "user", "content": "owl"}
_ONE: dict[str, str] = dict(zip(_KEYS[:1], _VALUES, strict=False))
_TWO: dict[str, str] = dict(zip(_KEYS, _VALUES, strict=True))


def find_format(
    render: Render, special: Mapping[str, int], ends: Collection[int]
) -> ToolFormat | None:
    """None: the template shows no tools, or the calls it writes cannot be read here: also where
    special tokens of calls are those in which an answer that is text is wrapped, as channels are.

    special: ids of special tokens by name. ends: tokens that end an answer.
    """
    text = {"type": "string", "description": ""}
    shape = {"type": "object", "properties": dict.fromkeys(_KEYS, text)}
    tools = [Tool(name, "", shape).shown for name in _NAMES]
    prompt = render([_USER], tools, prompt=True)
    said = {"role": "assistant", "content": _WORD}
    answer = render([_USER, said], tools, prompt=False)
    if prompt is None or _NAMES[0] not in prompt or answer is None or _WORD not in answer:
        return None
    found = None
    for as_text in (False, True):
        probe = _Probe(render, tools, answer, special, ends, text_arguments=as_text)
        if probe.writes:
            found = probe.read()
            break
    if found is None or not _recognised(found):
        return None
    head = answer[: answer.index(_WORD)]
    lead = head[len(_common_start(head, prompt)) :]
    taken = {token for name, token in special.items() if name in lead}
    return None if taken & set(found.controls.values()) else found


def _recognised(found: ToolFormat) -> bool:
    """Whether each call can be told from text, and its end from what follows."""
    frame, lists = found.frame, found.body in ("object", "list")
    if found.bare:
        return lists and not frame.end.strip() and found.between is None
    again = found.between is None or lists or frame.again.strip()
    return bool(again) and (found.body != "fields" or bool(frame.end.strip()))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a format writes, but for names and arguments."""

    opening: str
    middle: str
    between: str | None
    closing: str


@dataclass(frozen=True, slots=True)
class _Written:
    """What a template makes of some calls, split at the first name."""

    before: str
    after: str


class _Probe:
    """One way to give calls to the template."""

    def __init__(
        self,
        render: Render,
        tools: list[dict[str, Any]],
        answer: str,
        special: Mapping[str, int],
        ends: Collection[int],
        *,
        text_arguments: bool,
    ) -> None:
        """answer: what the template makes of one that is a word."""
        self._render = render
        self._tools = tools
        self._head, _, self._tail = answer.partition(_WORD)
        self._text_arguments = text_arguments
        self._special = special
        self._ends = ends
        self._controls: dict[str, int] = {}

    @property
    def writes(self) -> bool:
        """Whether the template takes calls given so."""
        return self._write(_ONE) is not None

    def read(self) -> ToolFormat | None:
        one = self._write(_ONE)
        if one is None:
            return None
        start, stop = _find(one.after, lambda value: value == _ONE)
        return self._read_json(one, start, stop) if stop else self._read_fields(one)

    def _write(self, *arguments: dict[str, str]) -> _Written | None:
        """Calls with these arguments, without what surrounds any answer."""
        calls = [
            {
                "id": id,
                "type": "function",
                "function": {"name": name, "arguments": given},
            }
            for id, name, given in zip(_IDS, _NAMES, arguments, strict=False)
        ]
        if self._text_arguments:
            calls = [with_text(call) for call in calls]
        said = {"role": "assistant", "content": "", "tool_calls": calls}
        text = self._render([_USER, said], self._tools, prompt=False)
        if text is None:
            return None
        text = text[len(_common_start(self._head, text)) :]
        text = self._in_alphabet(text.removesuffix(_common_end(self._tail, text)))
        before, name, after = text.partition(_NAMES[0])
        return _Written(before, after) if name and _NAMES[0] not in after else None

    def _in_alphabet(self, text: str) -> str:
        for id in _IDS:
            text = text.replace(id, ID)
        for name in sorted(self._special, key=len, reverse=True):
            if name in text:
                token = self._special[name]
                known = [char for char, id in self._controls.items() if id == token]
                char = known[0] if known else chr(CONTROL[len(self._controls)])
                self._controls[char] = token
                text = text.replace(name, char)
        return text.rstrip("".join(c for c, id in self._controls.items() if id in self._ends))

    def _read_json(self, one: _Written, start: int, stop: int) -> ToolFormat:
        """A format whose arguments are one JSON object, from `start` to `stop` behind the name."""
        two = self._write(_ONE, _ONE)
        between = None
        if two is not None and two.before == one.before:
            text, name, last = two.after[stop:].partition(_NAMES[1])
            between = text if name and last == one.after else None
        written = _Parts(one.before, one.after[:start], between, one.after[stop:])
        whole = one.before + _NAMES[0] + one.after
        begin, end = _find(whole, _is_list_of_calls)
        if end:
            frame = Frame(whole[:begin], whole[end:], "", "")
            return self._format("list", written, frame, keys=_keys(json.loads(whole[begin:end])[0]))
        begin, end = _find(whole, _is_call)
        if not end:
            frame = _frame(one.before, between, written.closing)
            return self._format("named", written, frame)
        apart = None
        if between is not None and two is not None:
            both = two.before + _NAMES[0] + two.after
            apart = both[end : max(end, _find(both, _is_call, end)[0])]
        frame = _frame(whole[:begin], apart, whole[end:])
        return self._format("object", written, frame, keys=_keys(json.loads(whole[begin:end])))

    def _read_fields(self, one: _Written) -> ToolFormat | None:
        """A format that writes arguments one by one; they are as these rules write them again."""
        none, pair, two = self._write({}), self._write(_TWO), self._write({}, {})
        first = _split(one.after, _KEYS[0], _VALUES[0])
        both = _split(pair.after, _KEYS[0], _VALUES[0], *_KEYS[1:], _VALUES[1]) if pair else None
        if none is None or first is None or both is None:
            return None
        lead, within, rest = first
        before = _common_end(lead, both[2])
        after = both[2].removesuffix(before)
        closing = rest.removeprefix(after)
        shared = _common_start(before, closing)
        shared = shared[: len(shared) - len(shared.lstrip(">\"' \n"))]
        middle, after = lead.removesuffix(before) + shared, after + shared
        before, closing = before.removeprefix(shared), closing.removeprefix(shared)
        text = "".join(before + k + within + v + after for k, v in _TWO.items())
        if none.after != middle + closing or both[4] != after + closing or pair is None:
            return None
        if pair.after != middle + text + closing or not _is_markup(before, within, after):
            return None
        between = None
        if two is not None and two.before == one.before:
            text, name, last = two.after.removeprefix(middle).partition(_NAMES[1])
            between = text if name and last == middle + closing else None
        return self._format(
            "fields", _Parts(one.before, middle, between, closing),
            _frame(one.before, between, closing), fields=FieldStyle(before, within, after),
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
            self._text_arguments, dict(self._controls), keys, fields,
        )  # fmt: skip


def _frame(head: str, apart: str | None, tail: str) -> Frame:
    """Around several bodies, of what is before the first, between two and after the last."""
    if apart is None:
        return Frame(head, tail, "", "")
    end = _common_start(tail, apart)
    if end != tail:
        end = end.rstrip("< \n")
    return Frame(head, end, apart.removeprefix(end), tail.removeprefix(end))


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
    found = isinstance(value, dict) and _ONE in value.values()
    return found and any(name in value.values() for name in _NAMES)


def _is_list_of_calls(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, list) and len(value) == 1 and _is_call(value[0])


def _keys(call: dict[str, Any]) -> tuple[str, str]:
    keys = {str(value): key for key, value in call.items()}
    return keys[_NAMES[0]], keys[str(_ONE)]


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


def _common_start(one: str, two: str) -> str:
    pairs = zip(one, two, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _common_end(one: str, two: str) -> str:
    return _common_start(one[::-1], two[::-1])[::-1]
