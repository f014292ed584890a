"""The content and the calls of one choice in harmony's channels: events in, text and calls out."""

from collections.abc import Iterable, Sequence

from fader_server.text.detokenizer import Detokenizer
from fader_server.text.harmony import CHANNEL, CONSTRAIN, Head
from fader_server.text.harmony_reader import Channels
from fader_server.text.pieces import Pieces
from fader_server.text.stops import StopMatcher
from fader_server.text.stream import TextDelta
from fader_server.text.tool_values import load_json, written_object
from fader_server.text.tools import CallPart, Tool, ToolUse

_APART = str.maketrans({CHANNEL: " ", CONSTRAIN: " "})


class ChannelStream:
    """A TextStream whose text is what is neither thought nor a call of an offered tool; a message
    to somebody else is content, its head too. Of several messages each begins a line.

    Stop strings count in the content. Arguments that a grammar keeps are told as they come.
    """

    def __init__(
        self,
        pieces: Pieces,
        channels: Channels,
        use: ToolUse | None,
        *,
        after: Sequence[int] = (),
        stops: Iterable[str] = (),
        include_stop: bool = False,
    ) -> None:
        """channels: takes every token of the same output first. after: what its first message
        continues."""
        self._pieces = pieces
        self._channels = channels
        self._tools = {} if use is None else {tool.name: tool for tool in use.offered}
        self._kept = use is not None and use.kept
        self._must = use is not None and use.must
        self._parallel = use is None or use.parallel
        self._matcher = StopMatcher(stops, include=include_stop)
        self._detokenizer = Detokenizer(pieces, after=after)
        self._after = bool(after)
        self._head = Head("")
        self._tool: Tool | None = None
        self._written: list[str] = []
        """Of arguments."""
        self._calls: list[CallPart] = []
        self._parted = self._said = self._ended = False
        self._length = 0

    def feed(self, token: int) -> TextDelta:
        """One that the channels have taken, and left."""
        offset = self._length
        shown = self._follow()
        self._length += len(shown)
        return TextDelta(shown, offset, self._ended)

    def finish(self) -> str:
        """The rest of the content, once, when the channels have finished."""
        text = self._follow()
        return text if self._ended else text + self._matcher.flush()

    def taken(self) -> tuple[CallPart, ...]:
        """What calls gained since this was asked."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def _follow(self) -> str:
        shown = ""
        for event in self._channels.events():
            if self._ended:
                break
            if isinstance(event, Head):
                shown += self._begin(event)
            elif event is None:
                shown += self._add(self._detokenizer.flush()) + self._end()
            elif isinstance(event, str):
                shown += self._add(event)
            else:
                shown += self._add(self._detokenizer.feed(event))
        return shown

    def _begin(self, head: Head) -> str:
        if not self._after:
            self._detokenizer = Detokenizer(self._pieces)
        self._after = False
        self._head, self._tool, self._parted = head, head.function(self._tools), True
        self._written.clear()
        if self._tool is None:
            return self._say(self._title)
        if self._kept:
            self._calls.append(CallPart(self._tool.name, "", False))
        return ""

    def _add(self, text: str) -> str:
        if self._tool is None:
            return self._say(text)
        self._written.append(text)
        if self._kept and text:
            self._calls.append(CallPart("", text, False))
        return ""

    def _end(self) -> str:
        if self._tool is None:
            return ""
        text = "".join(self._written)
        try:
            arguments = load_json(text)
            made = written_object(arguments)
        except (ValueError, RecursionError):
            return "" if self._kept else self._say(self._title + text)
        name, made = ("", "") if self._kept else (self._tool.name, made)
        self._calls.append(CallPart(name, made, True))
        self._ended = not self._parallel
        return self._matcher.flush() if self._ended else ""

    @property
    def _title(self) -> str:
        """The head of a message that is not told apart."""
        return self._head.written.translate(_APART).strip() + " " if self._head.recipient else ""

    def _say(self, text: str) -> str:
        # what a cut leaves of a head before what is kept is no content
        if not text or self._must or (self._kept and self._head.broken):
            return ""
        lead = "\n" if self._parted and self._said else ""
        self._parted, self._said = False, True
        shown = self._matcher.feed(lead + text)
        self._ended = self._matcher.stopped
        return shown
