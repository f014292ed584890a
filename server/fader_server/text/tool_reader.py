"""Calls of tools in the text of an answer, as it comes. Knows no tokens and no stop strings.

Text that begins like a call is one when it is whole, names a tool that was offered and has a JSON
object of arguments; it is content else, to the place where it breaks, and reading goes on there:
nothing is read twice. White space beside a call is no content. What the arguments' schema asks is
left to the grammar of the answer. Where it has one, calls break only where an answer is cut: JSON
of arguments is told as it comes, and what a cut leaves of a call beside is nothing.
"""

from fader_server.text.stops import StopMatcher
from fader_server.text.tool_bodies import Bodies
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_scan import SILENT, Broken, Reading, all_of, one_of, skip
from fader_server.text.tools import CallPart, ToolUse

Piece = str | CallPart


class CallReader:
    """The same pieces, however the text is cut."""

    def __init__(self, form: ToolFormat, use: ToolUse) -> None:
        self._form = form
        self._kept, self._must = use.kept, use.must
        self._parts: list[str] = []
        """Of arguments that are told as they come."""
        self._bodies = Bodies(form, use, self._opened, self._parts)
        self._pieces: list[Piece] = []
        self._space: list[str] = []
        """White space that is content unless a call follows."""
        self._after_call = False
        self._held: list[str] = []
        """What may be a call."""
        self._reading: Reading[None] | None = None
        self._text = StopMatcher(())
        if form.bare:
            self._begin(self._in_turn() if form.notation else self._bare())
        else:
            self._look()

    def feed(self, text: str) -> list[Piece]:
        """Content and calls that are certain now, in order."""
        for char in text:
            self._take(char)
        return self._told()

    def finish(self) -> list[Piece]:
        """The rest, when no more text comes."""
        if self._reading is not None:
            self._take("")
        if not self._must:  # else it is what a cut left of a marker
            self._say(self._text.flush())
            self._tell("".join(self._space))
        return self._told()

    def _tell(self, text: str) -> None:
        if self._pieces and isinstance(self._pieces[-1], str):
            self._pieces[-1] += text
        elif text:
            self._pieces.append(text)

    def _told(self) -> list[Piece]:
        self._tell_parts()
        told, self._pieces = self._pieces, []
        return told

    def _take(self, char: str) -> None:
        if self._reading is None:
            self._say(self._text.feed(char))
            if self._text.stopped:
                calls = self._in_turn() if self._form.notation else self._marked()
                self._begin(calls, *self._trigger)
            return
        try:
            self._held.append(char)
            self._reading.send(char)
        except StopIteration:
            self._held.clear()
            self._look()
        except Broken:
            self._held.pop()
            broken, self._held = "".join(self._held), []
            self._look()
            if char or not self._kept:
                self._say(broken)
            if char:
                self._take(char)

    def _look(self) -> None:
        """For the marker that begins a call."""
        self._reading = None
        words = [] if self._form.bare else self._form.frame.first.split()
        self._trigger = words[0] if words else ""
        self._text = StopMatcher([self._trigger] if self._trigger else ())

    def _begin(self, reading: Reading[None], *held: str) -> None:
        self._held = list(held)
        self._reading = reading
        next(reading)

    def _say(self, text: str) -> None:
        """As content, without what stands for tokens that show no text."""
        text = text.translate(SILENT)
        if self._after_call:
            text = text.lstrip()
        whole = text.rstrip()
        if whole:
            self._after_call = False
            self._tell("".join(self._space) + whole)
            self._space.clear()
        self._space.append(text[len(whole) :])

    def _begun(self) -> None:
        self._space.clear()
        self._after_call = True

    def _made(self, calls: list[CallPart]) -> None:
        self._begun()
        self._held.clear()
        self._tell_parts()
        self._pieces.extend(calls)

    def _opened(self, name: str) -> None:
        """A call begins whose arguments are told as they come."""
        self._begun()
        self._tell_parts()
        self._pieces.append(CallPart(name, "", False))

    def _tell_parts(self) -> None:
        if self._parts:
            self._pieces.append(CallPart("", "".join(self._parts), False))
            self._parts.clear()

    def _bare(self) -> Reading[None]:
        """The answer as a whole."""
        calls = yield from self._bodies.read((yield from skip()))
        while char := (yield):
            if not char.isspace():
                raise Broken
        self._made(calls)

    def _marked(self) -> Reading[None]:
        """Calls behind a marker that is read already."""
        frame, body = self._form.frame, self._form.body
        yield from all_of(frame.first.split()[1:])
        first = yield from skip()
        while True:
            calls = yield from self._bodies.read(first)
            if body != "fields":
                yield from all_of(frame.end.split(), may_end=True)
            self._made(calls)
            if frame.single:
                return
            again, last = frame.again.split(), frame.last.split()
            if (yield from one_of(again or ["{"], *([last] if last else []))) == 1:
                self._held.clear()
                return
            first = (yield from skip()) if again else "{"

    def _in_turn(self) -> Reading[None]:
        """Calls with members, behind the marker that is read, or as a whole answer."""
        frame, bare = self._form.frame, self._form.bare
        yield from all_of(frame.first.split()[not bare :])
        again, last = frame.again.split(), frame.last.split()
        first = yield from skip()
        made: list[CallPart] = []
        while True:
            made += yield from self._bodies.read(first)
            yield from all_of(frame.end.split(), may_end=not bare)
            if not bare:
                self._made(made)
                made = []
            if frame.single:
                break
            if again:
                ways = [again, last] if last else [again]
                if (yield from one_of(*ways, may_end=not bare)) != 0:
                    break
                first = yield from skip()
                continue
            first = yield from skip()
            if not (first or bare):
                break
            if last and first == last[0][0]:
                yield from all_of(last, first=first, may_end=not bare)
                break
        while bare and (char := (yield)):
            if not char.isspace():
                raise Broken
        if bare:
            self._made(made)
        self._held.clear()
