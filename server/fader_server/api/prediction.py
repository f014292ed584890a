"""What a client says its answer will be like: OpenAI's `prediction`. Knows nothing about tokens."""

from typing import Any

from fader_server.api.fields import Fields, is_text

_MOST_PARTS = 64
_LONGEST = 1 << 20
_FORM = f"must be content of 0 to {_LONGEST} characters: an object with type and content"


def read_prediction(fields: Fields) -> str:
    """The text; empty where nothing is foretold. Problems are noted in `fields`."""
    value = fields.raw("prediction")
    if value is None:
        return ""
    text = _text(value.get("content")) if _is_content(value) else None
    if text is None or len(text) > _LONGEST:
        fields.refuse("prediction", _FORM)
        return ""
    return text


def _is_content(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return isinstance(value, dict) and value.get("type") == "content"


def _text(content: Any) -> str | None:  # noqa: ANN401 - any JSON value
    """Of a text or a list of text parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    found = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts: list[Any] = [part.get("text") for part in found]
    good = len(texts) == len(parts) <= _MOST_PARTS and all(map(is_text, texts))
    return "".join(texts) if good else None
