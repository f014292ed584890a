"""The text of one choice: tokens in, deltas and offsets out, cut at a stop string."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fader_server.text.detokenizer import Detokenizer
from fader_server.text.pieces import Pieces
from fader_server.text.stops import StopMatcher


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one token did to the text."""

    text: str
    """To append now; may be empty while a character or a stop string is unfinished."""
    offset: int
    """Characters of the returned text before this token's own, held-back ones counted."""
    stopped: bool
    """A stop string is complete: the text has ended, later tokens add nothing."""


class TextStream:
    """Concatenated deltas and finish() are the choice's text, however the tokens were spread."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        length: int = 0,
        stops: Iterable[str] = (),
        include_stop: bool = False,
    ) -> None:
        """detokenizer: of this text alone. length: characters that are there already."""
        self._detokenizer = detokenizer
        self._length = length
        self._matcher = StopMatcher(stops, include=include_stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._matcher.stopped

    def feed(self, token: int) -> TextDelta:
        """Add an output token. Leave out the stop token that ends a choice: it has no text."""
        offset = self._length
        text = self._detokenizer.feed(token)
        self._length += len(text)
        shown = self._matcher.feed(text)
        return TextDelta(shown, offset, self._matcher.stopped)

    def finish(self) -> str:
        """The rest of the text, once, when no more tokens come."""
        if self.stopped:
            return ""
        return self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()


class Echo:
    """A prompt that its choices' texts begin with, read once for all of them. Stop strings do not
    count in it."""

    def __init__(self, pieces: Pieces, prompt: Sequence[int]) -> None:
        self._end = Detokenizer(pieces)
        self._length = 0
        self.deltas = tuple(self._delta(token) for token in prompt)
        """One per token."""

    def stream(self, *, stops: Iterable[str] = (), include_stop: bool = False) -> TextStream:
        """The text of a new choice, from behind the prompt on."""
        return TextStream(
            self._end.copied(), length=self._length, stops=stops, include_stop=include_stop
        )

    def _delta(self, token: int) -> TextDelta:
        offset, text = self._length, self._end.feed(token)
        self._length += len(text)
        return TextDelta(text, offset, False)
