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
        pieces: Pieces,
        *,
        prompt: Sequence[int] = (),
        echo: bool = False,
        stops: Iterable[str] = (),
        include_stop: bool = False,
    ) -> None:
        """prompt: what the text continues; leave it out for chat. echo: it is part of the text."""
        self._detokenizer = Detokenizer(pieces, after=() if echo else prompt)
        self._matcher = StopMatcher(stops, include=include_stop)
        self._length = 0
        self.echoed: tuple[TextDelta, ...] = (
            tuple(self._delta(token, matched=False) for token in prompt) if echo else ()
        )
        """One delta per prompt token; stop strings do not count in the prompt."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text."""
        return self._matcher.stopped

    def feed(self, token: int) -> TextDelta:
        """Add an output token. Leave out the stop token that ends a choice: it has no text."""
        return self._delta(token, matched=True)

    def finish(self) -> str:
        """The rest of the text, once, when no more tokens come."""
        if self.stopped:
            return ""
        return self._matcher.feed(self._detokenizer.flush()) + self._matcher.flush()

    def _delta(self, token: int, *, matched: bool) -> TextDelta:
        offset = self._length
        text = self._detokenizer.feed(token)
        self._length += len(text)
        shown = self._matcher.feed(text) if matched else text
        return TextDelta(shown, offset, self._matcher.stopped)
