"""The grammar of an answer that calls tools, in the grammar library's words, for one format.

Must it call, the answer is calls alone, and a shape of its content says nothing. May it, text is
free until it begins a call, which is then held to its form: to the schema of a strict tool, to any
object of another (its fields, where those are written one by one). Content with a shape of its
own takes the place of free text.
"""

import json
from collections.abc import Mapping
from typing import Any

from fader_server.errors import RequestInvalid
from fader_server.text.grammar import HEAD, json_rule, rule_of
from fader_server.text.shape import Shape
from fader_server.text.tool_format import CONTROL, ID, FieldStyle, ToolFormat
from fader_server.text.tool_values import read_value, types_in, types_of, values_of, ways_of
from fader_server.text.tools import Tool, ToolUse

_MOST = 16
"""Calls of an answer that must call: one that would never end is no use."""
_STANDING = frozenset((*CONTROL, ord(ID)))
_ANY = {"type": "object"}
_PLAIN = frozenset((
    "$defs", "$schema", "additionalProperties", "default", "definitions", "deprecated",
    "description", "enum", "const", "examples", "properties", "required", "title", "type",
))  # fmt: skip
"""Keywords that fields follow to the letter: of the parameters, and of those that are text."""


def tool_grammar(form: ToolFormat, use: ToolUse, content: Shape | None) -> str | None:
    """content: the shape of the answer's content. None: nothing is to be kept.

    Raises RequestInvalid for what this format cannot write.
    """
    if not (use.kept or content):
        return None
    rules = _Rules(form, use)
    several = use.parallel and form.between is not None
    calls = rules.calls(_MOST if use.must and several else None if several else 1)
    if use.must:
        return rules.text(f"start: {calls}")
    if content is not None:
        if form.bare:
            raise RequestInvalid(
                f"{content.param} with tools is not possible here: this model writes calls as "
                "plain JSON, which such content may be, too",
                param=content.param,
            )
        return rules.text(f"start: {calls} | content", f"content: {rule_of(content)}")
    if form.bare:
        return rules.text(f"start: (WORDS | {calls})?", r"WORDS: /\s*[^{\s](.|\n)*/")
    return rules.text(*rules.free(several=several))


class _Rules:
    """Collects the rules of one grammar."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        self._form = form
        self._use = use
        self._lines = [r"ID: /[a-zA-Z0-9]{9}/", r"TEXT: /(.|\n)*/"]
        names = [self._tool(at, tool) for at, tool in enumerate(use.offered)]
        self.rule("one", " | ".join(names))

    def text(self, *rules: str) -> str:
        """The grammar; the first of the given rules is its start."""
        return HEAD + "\n".join([*rules, *self._lines]) + "\n"

    def calls(self, most: int | None, opening: str | None = None) -> str:
        """One call or several, as the format writes them; opening: what is left of it to write."""
        form = self._form
        opening = form.opening if opening is None else opening
        more = ""
        if form.between is not None and most != 1:
            count = "*" if most is None else f"{{0,{most - 1}}}"
            more = f"({self.literal(form.between)} one){count}"
        return f"{self.literal(opening)} one {more} {self.literal(form.closing)}"

    def free(self, *, several: bool) -> list[str]:
        """Text with calls in it."""
        form = self._form
        opening = form.opening.lstrip()
        trigger = form.frame.first.split()[0]
        marked = trigger[: _plain_length(trigger)]
        grouped = several and (form.body == "list" or not form.frame.single)
        calls = self.calls(None if grouped else 1, opening.removeprefix(marked))
        if not marked:
            return [f"start: (TEXT {calls})* TEXT"]
        return [f"start: (free {calls})* TEXT", f"free[lazy]: TEXT {json.dumps(marked)}"]

    def _tool(self, at: int, tool: Tool) -> str:
        """A call from its name to the end of its arguments."""
        name, form = f"tool_{at}", self._form
        head = self.literal(tool.name + form.middle)
        if form.fields is not None:
            given = _Fields(self, tool, form.fields, name).items()
            return self.rule(name, f"{head} {given}")
        schema = tool.parameters if self._use.must or tool.strict else _ANY
        return self.rule(name, f"{head} {self.json(f'{name}_arguments', schema, tool)}")

    def json(self, name: str, schema: Mapping[str, Any], tool: Tool) -> str:
        """A rule for JSON of a schema: to the letter where the tool is strict."""
        return self.rule(name, json_rule(json.dumps(schema), lenient=not tool.strict))

    def literal(self, text: str) -> str:
        """This text, with what stands for special tokens and ids."""
        parts: list[str] = []
        while text:
            size = _plain_length(text)
            if size:
                parts.append(json.dumps(text[:size]))
            elif text[0] == ID:
                parts.append("ID")
            else:
                parts.append(f"<[{self._form.controls[text[0]]}]>")
            text = text[max(size, 1) :]
        return " ".join(parts)

    def rule(self, name: str, body: str) -> str:
        """Its name."""
        self._lines.append(f"{name}: {body}")
        return name


class _Fields:
    """The rules of one tool's arguments, where they are written one by one: in the order of its
    properties, those that are not required maybe."""

    def __init__(self, rules: _Rules, tool: Tool, style: FieldStyle, name: str) -> None:
        self._rules = rules
        self._tool = tool
        self._style = style
        self._name = name
        self._root = tool.parameters
        if tool.strict and not _PLAIN.issuperset(self._root):
            raise _unwritable(tool)

    def items(self) -> str:
        """What follows the name."""
        found = self._root.get("properties")
        needed = self._root.get("required")
        required = (
            [key for key in needed if isinstance(key, str)] if isinstance(needed, list) else []
        )
        keys = dict.fromkeys([*(found if isinstance(found, Mapping) else ()), *required])
        items = [(self._item(at, key), key in required) for at, key in enumerate(keys)]
        return " ".join(item if needed else f"({item})?" for item, needed in items)

    def _item(self, at: int, key: str) -> str:
        style, end = self._style, self._style.after.split()[0]
        if style.within.split()[0] in key or key != key.strip():
            raise _unwritable(self._tool)
        ways = ways_of(self._root, key)
        types = types_of(ways)
        head = self._rules.literal(style.before + key + style.within)
        name = f"{self._name}_{at}"
        if any(self._is_text(way) for way in ways):
            if self._tool.strict and not types <= {"string", "null"}:
                raise _unwritable(self._tool)  # a text that reads as a number would be one
            plain = end[: _plain_length(end)]
            rest = self._rules.literal(style.after[style.after.index(end) + len(plain) :])
            value = f"{name}[suffix={json.dumps(plain)}]" if plain else name
            self._rules.rule(value, r"/(.|\n)*/")
            return f"{head} {name} {rest}"
        values = [self._value(f"{name}_{i}", way, types, end) for i, way in enumerate(ways)]
        return f"{head} ({' | '.join(values)}) {self._rules.literal(style.after)}"

    def _is_text(self, way: Mapping[str, Any]) -> bool:
        """Whether any text will do. Other constraints on text cannot be kept up to a marker."""
        types = types_in(way)
        if (types and "string" not in types) or values_of(way) is not None:
            return False
        if self._tool.strict and not _PLAIN.issuperset(way):
            raise _unwritable(self._tool)
        return True

    def _value(self, name: str, way: Mapping[str, Any], types: frozenset[str], end: str) -> str:
        values = values_of(way)
        if values is None or not any(isinstance(value, str) for value in values):
            shared = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
            return self._rules.json(name, {**shared, **way}, self._tool)
        texts = [v if isinstance(v, str) else json.dumps(v) for v in values]
        back = [read_value(text, types) for text in texts]
        if back != values or any(end in text for text in texts):
            raise _unwritable(self._tool)
        return self._rules.rule(name, " | ".join(json.dumps(text) for text in texts))


def _plain_length(text: str) -> int:
    """Characters before the first that stands for a special token or an id."""
    return next((at for at, char in enumerate(text) if ord(char) in _STANDING), len(text))


def _unwritable(tool: Tool) -> RequestInvalid:
    at = "strict parameters" if tool.strict else "parameters"
    return RequestInvalid(
        f"has a tool with {at} that cannot be enforced in the way this model writes calls",
        param="tools",
    )
