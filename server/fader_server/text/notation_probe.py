"""Finds out how a base writes calls whose arguments are members in a notation of their own."""

import re
from collections.abc import Mapping

from fader_server.text.notation import Notation
from fader_server.text.tool_format import CONTROL, ToolFormat
from fader_server.text.tool_frames import frame_of
from fader_server.text.tool_samples import KEYS, NAMES, ONE, TWO, VALUES, Samples

_BRACKETS = ("()", "{}")
_MEMBER = re.compile(
    rf"(\s*[({{])\s*{KEYS[0]}(\s*[=:]\s*)(\S?){VALUES[0]}(\S?)([)}}])(.*)", re.DOTALL
)
_QUOTES = ("'", '"')
_TOKENS = frozenset(map(chr, CONTROL))
_JSON, _PYTHON = ("true", "false", "null"), ("True", "False", "None")
_KNOWN = (("<|tool_call_start|>", "<|tool_call_end|>"),)
"""Tokens around lists of calls as Python writes them, of bases whose templates write none: LFM2's.
"""


def read_notation(samples: Samples) -> ToolFormat | None:
    """None: calls are in none that is known here."""
    one, none, pair = (samples.write(given) for given in (ONE, {}, TWO))
    found = None if one is None else _MEMBER.fullmatch(one.after)
    if one is None or none is None or pair is None or found is None:
        return None
    first, within, quote, other, last, closing = found.groups()
    marked = quote != "" and quote in _TOKENS
    brackets = first.strip() + last
    if quote != other or not (marked or quote in _QUOTES) or brackets not in _BRACKETS:
        return None
    members = [f"{key}{within}{quote}{value}{quote}" for key, value in TWO.items()]
    lead, tail = first + members[0], members[1] + last + closing
    apart = pair.after.removeprefix(lead).removesuffix(tail)
    if none.after != first + last + closing or pair.after != lead + apart + tail:
        return None
    if apart.strip() != ",":
        return None
    words = _words(samples, first + KEYS[0] + within, last + closing)
    notation = Notation(brackets, within, apart, quote if marked else "", words)
    two = samples.write({}, {})
    between = None
    if two is not None and two.before == one.before:
        text, name, rest = two.after.removeprefix(first + last).partition(NAMES[1])
        between = text if name and rest == none.after else None
    return _format(notation, one.before, between, closing, dict(samples.controls))


def known_format(special: Mapping[str, int]) -> ToolFormat | None:
    """That of such tokens, if the base has them. special: ids of special tokens by name."""
    for names in _KNOWN:
        if {*names} <= special.keys():
            spelled = dict(zip(map(chr, CONTROL), names, strict=False))
            first, last = spelled
            controls = {char: special[name] for char, name in spelled.items()}
            notation = Notation("()", "=", ", ", "", _PYTHON)
            return _format(notation, f"{first}[", ", ", f"]{last}", controls, spelled)
    return None


def _format(
    notation: Notation,
    opening: str,
    between: str | None,
    closing: str,
    controls: dict[str, int],
    spelled: dict[str, str] | None = None,
) -> ToolFormat:
    apart = None if between is None else _spaced(between)
    return ToolFormat(
        "members", opening, notation.brackets[0], between, closing,
        frame_of(_spaced(opening), apart, _spaced(closing)), False, controls,
        notation=notation, spelled=spelled,
    )  # fmt: skip


def _words(samples: Samples, before: str, after: str) -> tuple[str, str, str]:
    """How true, false and null are written; in JSON's words where that cannot be told."""
    found: list[str] = []
    for value, json, python in zip((True, False, None), _JSON, _PYTHON, strict=True):
        written = samples.write({KEYS[0]: value})
        taken = written is not None and written.after == before + python + after
        found.append(python if taken else json)
    true, false, null = found
    return true, false, null


def _spaced(text: str) -> str:
    """With white space around special tokens: models may write some there."""
    return "".join(f" {char} " if char in _TOKENS else char for char in text)
