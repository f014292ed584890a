"""Stop strings over streamed text. Knows nothing of tokens."""

from collections.abc import Iterable


class StopMatcher:
    """Cuts a text where a stop string first becomes complete, however the text is chunked.

    Of stop strings complete at the same character the longest counts. One Knuth-Morris-Pratt state
    per stop string, so O(1) amortised a character, and exactly the text that may still turn into a
    stop string is held back.
    """

    def __init__(self, stops: Iterable[str] = (), *, include: bool = False) -> None:
        """stops: none empty. include: the stop string stays in the text."""
        # Longest first: the first match found at a character is then the longest.
        self._stops = sorted(set(stops), key=len, reverse=True)
        assert all(self._stops)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The text that can be shown now; nothing once stopped."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        for at, char in enumerate(text):
            stop = self._advance(char)
            if stop is not None:
                self.stopped = True
                whole = self._held + text[: at + 1]
                self._held = ""
                return whole if self._include else whole[: len(whole) - len(stop)]
        whole = self._held + text
        shown = len(whole) - max(self._matched)
        self._held = whole[shown:]
        return whole[:shown]

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for index, stop in enumerate(self._stops):
            length = self._matched[index]
            while length and stop[length] != char:
                length = self._borders[index][length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                found = found or stop
                break
            self._matched[index] = length
        return found


def _borders(text: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(text)
    for at in range(1, len(text)):
        length = borders[at - 1]
        while length and text[length] != text[at]:
            length = borders[length - 1]
        borders[at] = length + 1 if text[length] == text[at] else 0
    return borders
