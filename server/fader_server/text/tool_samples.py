"""What a base's chat template makes of calls that are known. Knows no format of calls."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fader_server.text.tool_format import CONTROL, ID, with_text
from fader_server.text.tools import Tool


class Render(Protocol):
    """A chat with tools by the template; None: it refuses."""

    def __call__(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], *, prompt: bool
    ) -> str | None:
        """prompt: up to where the next answer begins."""
        ...


NAMES = ("parrot", "heron")
KEYS = ("crow", "wren")
VALUES = ("finch", "robin")
ONE: dict[str, str] = dict(zip(KEYS[:1], VALUES, strict=False))
TWO: dict[str, str] = dict(zip(KEYS, VALUES, strict=True))
_IDS = ("sparrow01", "magpie002")
"""Nine letters and digits: some templates take no other ids."""
_WORD = "ostrich"
_USER = {"role": "user", "content": "owl"}


def tools_shown() -> list[dict[str, Any]]:
    """Tools of these names and keys."""
    text = {"type": "string", "description": ""}
    shape = {"type": "object", "properties": dict.fromkeys(KEYS, text)}
    return [Tool(name, "", shape).shown for name in NAMES]


def messages_of(
    arguments: Sequence[Mapping[str, Any]], *, as_text: bool = False
) -> list[dict[str, Any]]:
    """A chat whose last answer has calls with these arguments."""
    calls = [
        {"id": id, "type": "function", "function": {"name": name, "arguments": given}}
        for id, name, given in zip(_IDS, NAMES, arguments, strict=False)
    ]
    if as_text:
        calls = [with_text(call) for call in calls]
    return [_USER, {"role": "assistant", "content": "", "tool_calls": calls}]


@dataclass(frozen=True, slots=True)
class Written:
    """Some calls as the template writes them, split at the first name."""

    before: str
    after: str


class Samples:
    """Texts in the alphabet of `tool_format`, without what surrounds any answer."""

    def __init__(self, render: Render, special: Mapping[str, int], ends: Collection[int]) -> None:
        """special: ids of special tokens by name. ends: tokens that end an answer."""
        self._tools = tools_shown()
        self._render = render
        self._special = special
        self._ends = ends
        self.controls: dict[str, int] = {}
        """Token ids of the characters met so far that stand for special tokens."""
        self._prompt = render([_USER], self._tools, prompt=True) or ""
        said = {"role": "assistant", "content": _WORD}
        answer = render([_USER, said], self._tools, prompt=False) or ""
        self._head, self._spoken, self._tail = answer.partition(_WORD)

    @property
    def shown(self) -> bool:
        """Whether the template shows tools to the model, and an answer in its place."""
        return NAMES[0] in self._prompt and self._spoken != ""

    @property
    def wrapping(self) -> set[int]:
        """Special tokens that the model writes before an answer of words, as those of channels."""
        lead = self._head[len(common_start(self._head, self._prompt)) :]
        return {token for name, token in self._special.items() if name in lead}

    def write(self, *arguments: Mapping[str, Any], as_text: bool = False) -> Written | None:
        """Calls with these arguments; as_text: given as text. None: the template writes none."""
        text = self._render(messages_of(arguments, as_text=as_text), self._tools, prompt=False)
        if text is None:
            return None
        text = text[len(common_start(self._head, text)) :]
        text = self._in_alphabet(text.removesuffix(common_end(self._tail, text)))
        before, name, after = text.partition(NAMES[0])
        return Written(before, after) if name and NAMES[0] not in after else None

    def _in_alphabet(self, text: str) -> str:
        for id in _IDS:
            text = text.replace(id, ID)
        for name in sorted(self._special, key=len, reverse=True):
            if name in text:
                token = self._special[name]
                known = [char for char, id in self.controls.items() if id == token]
                char = known[0] if known else chr(CONTROL[len(self.controls)])
                self.controls[char] = token
                text = text.replace(name, char)
        return text.rstrip("".join(c for c, id in self.controls.items() if id in self._ends))


def common_start(one: str, two: str) -> str:
    pairs = zip(one, two, strict=False)
    return "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def common_end(one: str, two: str) -> str:
    return common_start(one[::-1], two[::-1])[::-1]
