"""The grammar of an answer in harmony's channels, in the grammar library's words.

A thought is free, and so is what is said before a call, unless the answer must call, or its content
has a shape: that of the final channel. Free text is held to its channels only where something is
kept.
"""

import json
from collections.abc import Sequence

from fader_server.core import Guide
from fader_server.errors import RequestInvalid
from fader_server.text.grammar import rule_of
from fader_server.text.harmony import CHANNELS, PREFIX, ROLE, Harmony, Mark
from fader_server.text.harmony_reader import open_message
from fader_server.text.shape import Shape
from fader_server.text.tool_rules import Rules
from fader_server.text.tools import Tool, ToolUse

_THOUGHT, _CALLS, _FINAL = map(json.dumps, CHANNELS)


def harmony_grammar(harmony: Harmony, use: ToolUse | None, content: Shape | None) -> str | None:
    """From behind the words that begin an assistant's message. content: the shape of the answer's
    content. None: nothing is to be kept."""
    must = use is not None and use.must
    if not (content or (use is not None and use.kept)):
        return None
    rules = Rules(must=must, controls={})
    written = _Messages(harmony, rules)
    ends = [] if use is None else [written.call(at, tool) for at, tool in enumerate(use.offered)]
    if not must:
        ends.append(written.final(content))
    aside = written.message(_THOUGHT if must or content is not None else f"({_THOUGHT} | {_CALLS})")
    return rules.text(
        f"start: aside* ({' | '.join(ends)})",
        f"aside: {aside} TEXT {written.mark('end')} {written.mark('start')} {json.dumps(ROLE)}",
    )


def follow_head(guide: Guide, harmony: Harmony, prompt: Sequence[int]) -> None:
    """Move a guide to where the prompt of a chat leaves the answer, which may be in the text of a
    message that it began. Raises RequestInvalid where the answer cannot begin with such a one."""
    begun = open_message(harmony, prompt)
    marks = [harmony.marks.get(token) for token in begun]
    if "channel" not in marks:
        return
    stop = marks.index("message") + 1 if "message" in marks else len(marks)
    for token in begun[marks.index("channel") : stop]:
        allowed = guide.allowed()
        if token >= 8 * len(allowed) or not allowed[token // 8] >> token % 8 & 1:
            raise RequestInvalid(
                "an answer that goes on with the last message can neither be a call that must come "
                "nor have a shape, unless that message is in the final channel",
                param="messages",
            )
        guide.accept(token)


class _Messages:
    """Their heads, and what is behind them."""

    def __init__(self, harmony: Harmony, rules: Rules) -> None:
        self._harmony = harmony
        self._rules = rules
        constrain = harmony.token("constrain")
        marked = "" if constrain is None else f' | " "? <[{constrain}]> "json"'
        self._json = f'(" json"{marked})'
        """What a head says of JSON."""

    def mark(self, name: Mark) -> str:
        return f"<[{self._harmony.token(name)}]>"

    def message(self, channel: str) -> str:
        """The head of one in this channel."""
        return f"{self.mark('channel')} {channel} {self.mark('message')}"

    def call(self, at: int, tool: Tool) -> str:
        """To this tool, which is named before the channel or behind it."""
        to = f" to={PREFIX}{tool.name}"
        before = f"{json.dumps(to)} {self.message(f'{_CALLS} {self._json}')}"
        behind = self.message(f"{json.dumps(CHANNELS[1] + to)} {self._json}")
        return f"({before} | {behind}) {self._rules.arguments(f'tool_{at}', tool)}"

    def final(self, content: Shape | None) -> str:
        """Words of any kind, or of a shape."""
        if content is None:
            return f"{self.message(_FINAL)} TEXT"
        self._rules.rule("content", rule_of(content))
        return f"{self.message(f'{_FINAL} {self._json}?')} content"
