"""The text and the calls of one choice that may call tools: tokens in, content and calls out."""

from collections.abc import Iterable

from fader_server.text.detokenizer import Detokenizer
from fader_server.text.pieces import Pieces
from fader_server.text.stops import StopMatcher
from fader_server.text.stream import TextDelta
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_reader import CallReader, Piece
from fader_server.text.tools import CallPart, ToolUse


class ToolStream:
    """A TextStream whose text is the content alone. Stop strings count in the content, not in
    calls, whose text nobody is shown.
    """

    def __init__(
        self,
        pieces: Pieces,
        form: ToolFormat,
        use: ToolUse,
        *,
        stops: Iterable[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(pieces)
        self._reader = CallReader(form, use)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._controls = {token: char for char, token in form.controls.items()}
        self._parallel = use.parallel and form.between is not None
        self._calls: list[CallPart] = []
        self._ended = False
        self._length = 0

    def feed(self, token: int) -> TextDelta:
        """Add an output token. Leave out the stop token that ends a choice: it has no text."""
        offset = self._length
        if token in self._controls:
            text = self._detokenizer.flush() + self._controls[token]
        else:
            text = self._detokenizer.feed(token)
        shown = self._shown(self._reader.feed(text))
        self._length += len(shown)
        return TextDelta(shown, offset, self._ended)

    def finish(self) -> str:
        """The rest of the content, once, when no more tokens come."""
        if self._ended:
            return ""
        text = self._shown(self._reader.feed(self._detokenizer.flush()) + self._reader.finish())
        return text if self._ended else text + self._matcher.flush()

    def taken(self) -> tuple[CallPart, ...]:
        """What calls gained since this was asked."""
        calls, self._calls = tuple(self._calls), []
        return calls

    def _shown(self, pieces: list[Piece]) -> str:
        """The content of these, as far as the answer has not ended: a stop string ends it, and one
        call, where there may be no other."""
        text = ""
        for piece in pieces:
            if self._ended:
                break
            if isinstance(piece, CallPart):
                self._calls.append(piece)
                if piece.ends and not self._parallel:
                    self._ended = True
                    text += self._matcher.flush()
            else:
                text += self._matcher.feed(piece)
                self._ended = self._matcher.stopped
        return text
