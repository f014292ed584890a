"""What is around calls, out of the text before, between and behind some; and whether it tells them
from other text."""

from fader_server.text.tool_format import Frame, ToolFormat
from fader_server.text.tool_samples import common_start


def frame_of(head: str, apart: str | None, tail: str) -> Frame:
    """Around several bodies, of what is before the first, between two and after the last."""
    if apart is None:
        return Frame(head, tail, "", "")
    end = common_start(tail, apart)
    if end != tail:
        end = end.rstrip("< \n")
    return Frame(head, end, apart.removeprefix(end), tail.removeprefix(end))


def recognised(found: ToolFormat) -> bool:
    """Whether each call can be told from text, and its end from what follows."""
    frame, lists = found.frame, found.body in ("object", "list")
    if found.notation is not None:
        return frame.first.strip() != ""
    if found.bare:
        return lists and not frame.end.strip() and found.between is None
    again = found.between is None or lists or frame.again.strip()
    return bool(again) and (found.body != "fields" or bool(frame.end.strip()))
