"""OpenAI's harmony: an answer is messages, each in a channel and maybe to a recipient, between
tokens of their own. How a base that speaks it is known, what heads of messages say, and what its
template takes. Knows no streams and no grammar.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fader_server.text.tool_samples import NAMES, ONE, Render, messages_of, tools_shown
from fader_server.text.tools import Tool

Mark = Literal["start", "channel", "constrain", "message", "end", "call", "return"]
_NEEDED: frozenset[Mark] = frozenset(("start", "channel", "message", "end"))
_ENDS: frozenset[Mark] = frozenset(("call", "return"))
"""End an answer, too."""
ROLE = "assistant"
CHANNELS = ("analysis", "commentary", "final")
PREFIX = "functions."
"""Of a recipient that is a function."""
CHANNEL, CONSTRAIN = "\ud800", "\ud801"
"""Stand for the tokens of these names in heads."""
_LONGEST = 256
"""Characters of a head that can be read."""
_WORD = "ostrich"
_USER = {"role": "user", "content": "owl"}
_NAME = rf"[^\s{CHANNEL}{CONSTRAIN}]*"


def _begun(word: str) -> str:
    """A pattern of what a word may begin with."""
    return f"(?:{word[0]}{_begun(word[1:])})?" if word else ""


_ROLES = (ROLE, "user", "system", "developer", "tool")
_GAP = r"\s{0,2}"
"""Any white space would take long to tell from none of it."""
_TO_MAYBE = rf"(?:to?|to={_NAME})?"
_HEAD = re.compile(
    rf"{_GAP}(?:{'|'.join(map(_begun, _ROLES))}|functions\.[\w.-]*){_GAP}{_TO_MAYBE}{_GAP}"
    rf"(?:{CHANNEL}{_GAP}[\w-]{{0,24}}{_GAP}{_TO_MAYBE}{_GAP}"
    rf"(?:{CONSTRAIN}{_GAP})?[\w./+-]{{0,24}}{_GAP})*"
)
"""What a head may be, or begin with."""
_TO = re.compile(rf"to=({_NAME})")
_CHANNEL = re.compile(r"\s*((?!to=)[\w-]+)")


@dataclass(frozen=True, slots=True)
class Harmony:
    """Of one base."""

    marks: Mapping[int, Mark]
    """Its tokens."""
    unread: str
    """Why there are no calls, in words; empty: there are."""

    def token(self, mark: Mark) -> int | None:
        return next((token for token, name in self.marks.items() if name == mark), None)

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(token for token, name in self.marks.items() if name in _ENDS)


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a message's text."""

    written: str
    """Without the role of an assistant, and with CHANNEL and CONSTRAIN."""
    channel: str = ""
    recipient: str = ""
    broken: bool = False
    """It could not be read: what it says is in the text."""

    @property
    def is_thought(self) -> bool:
        return self.channel == CHANNELS[0] and not self.recipient.startswith(PREFIX)

    def function(self, tools: Mapping[str, Tool]) -> Tool | None:
        """The one of these that the message calls."""
        return tools.get(self.recipient.removeprefix(PREFIX))


def read_head(text: str) -> Head:
    """text: from behind the token that starts a message."""
    written = text.strip().removeprefix(ROLE).strip()
    before, marked, last = text.rpartition(CHANNEL)
    to = _TO.search(last) or _TO.search(before)
    channel = _CHANNEL.match(last) if marked else None
    return Head(written, channel[1] if channel else "", to[1] if to else "")


def may_be_head(text: str) -> bool:
    """Whether a head may begin with this."""
    return len(text) <= _LONGEST and _HEAD.fullmatch(text) is not None


def find_harmony(render: Render, special: Mapping[str, int]) -> Harmony | None:
    """None: the base does not speak it. special: ids of special tokens by name."""
    all_marks: tuple[Mark, ...] = get_args(Mark)
    marks: dict[int, Mark] = {
        special[f"<|{mark}|>"]: mark for mark in all_marks if f"<|{mark}|>" in special
    }
    if not _NEEDED.issubset(marks.values()):
        return None
    said = {"role": ROLE, "content": _WORD}
    answer = render([_USER, said], [], prompt=False) or ""
    prompt = render([_USER], [], prompt=True) or ""
    lead = f"<|start|>{ROLE}<|channel|>final<|message|>"
    if not prompt.endswith(f"<|start|>{ROLE}") or not answer.partition(_WORD)[0].endswith(lead):
        return None
    return Harmony(marks, _why_not(render, ends="call" in marks.values()))


def _why_not(render: Render, *, ends: bool) -> str:
    """Why calls are not read. ends: there is a token for their end."""
    tools = tools_shown()
    if NAMES[0] not in (render([_USER], tools, prompt=True) or ""):
        return "the chat template shows no tools to the model"
    written = render(messages_of((ONE,)), tools, prompt=False) or ""
    head, found, text = written.rpartition(f"<|start|>{ROLE}")[2].partition("<|message|>")
    read = read_head(head.replace("<|channel|>", CHANNEL).replace("<|constrain|>", CONSTRAIN))
    if not found or read.recipient != PREFIX + NAMES[0] or json.dumps(ONE) not in text:
        return "the chat template writes no calls to functions"
    return "" if ends else "the tokenizer has no <|call|>"


def as_template_takes(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A history in which no message has several calls, each stands before its results, and a
    message with a call has words or a thought, not both: words are the thought's end then."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < len(messages):
        message = dict(messages[at])
        at += 1
        calls = message.get("tool_calls")
        if not calls:
            found.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(dict(messages[at]))
            at += 1
        found += _one_by_one(message, results)
    return found


def _one_by_one(message: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    thought, words, calls = message.get("thinking"), message["content"], message["tool_calls"]
    if thought and words:
        message |= {"thinking": f"{thought}\n{words}", "content": ""}
    found: list[dict[str, Any]] = []
    for call in calls:
        found.append({**message, "tool_calls": [call]})
        mine = [result for result in results if result.get("tool_call_id") == call["id"]]
        found += mine
        results = [result for result in results if result not in mine]
        message = {"role": message["role"], "content": ""}
    return found + results
