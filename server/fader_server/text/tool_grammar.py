"""The grammar of an answer that calls tools, in the grammar library's words, for one format.

Must it call, the answer is calls alone, and a shape of its content says nothing. May it, text is
free until it begins a call, which is then held to its form: to the schema of a strict tool, to any
object of another (its fields, where those are written one by one). Content with a shape of its
own takes the place of free text.
"""

import json

from fader_server.errors import RequestInvalid
from fader_server.text.grammar import rule_of
from fader_server.text.notation_grammar import MemberRules
from fader_server.text.shape import Shape
from fader_server.text.tool_fields import Fields
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_rules import Rules, plain_length
from fader_server.text.tools import Tool, ToolUse

_MOST = 16
"""Calls of an answer that must call: one that would never end is no use."""


def tool_grammar(form: ToolFormat, use: ToolUse, content: Shape | None) -> str | None:
    """content: the shape of the answer's content. None: nothing is to be kept.

    Raises RequestInvalid for what this format cannot write.
    """
    if not (use.kept or content):
        return None
    rules = _FormRules(form, use)
    several = use.parallel and form.between is not None
    calls = rules.calls(_MOST if use.must and several else None if several else 1)
    if use.must:
        return rules.text(f"start: {calls}")
    if content is not None:
        if form.bare and form.notation is None:
            raise RequestInvalid(
                f"{content.param} with tools is not possible here: this model writes calls as "
                "plain JSON, which such content may be, too",
                param=content.param,
            )
        return rules.text(f"start: {calls} | content", f"content: {rule_of(content)}")
    if form.bare:
        first = r"\[" if form.notation is not None else "{"
        return rules.text(f"start: (WORDS | {calls})?", rf"WORDS: /\s*[^{first}\s](.|\n)*/")
    return rules.text(*rules.free(several=several))


class _FormRules(Rules):
    """Those of a format."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        super().__init__(must=use.must, controls=form.controls)
        self._form = form
        names = [self._tool(at, tool) for at, tool in enumerate(use.offered)]
        self.rule("one", " | ".join(names))

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
        marked = trigger[: plain_length(trigger)]
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
            given = Fields(self, tool, form.fields, name).items()
            return self.rule(name, f"{head} {given}")
        if form.notation is not None:
            return self.rule(
                name, f"{head} {MemberRules(self, tool, form.notation, name).arguments()}"
            )
        return self.rule(name, f"{head} {self.arguments(f'{name}_arguments', tool)}")
