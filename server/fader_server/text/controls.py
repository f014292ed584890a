"""Keeps what clients write from being control tokens, whatever a template makes of it.

Control tokens in their strings are rendered as private characters, so that every control token of
the rendered text is the template's. Those get the secret names they have in a twin of the
tokenizer; then the strings get their words back, and the twin, encoding all in one pass, sees
plain text.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers

from fader_server.errors import ModelUnsupported, RequestInvalid

_MARKUP = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")
_PRIVATE = range(0xE000, 0xF900)
_ESCAPED = re.compile(r"\\u(e[0-9a-f]{3}|f[0-8][0-9a-f]{2})")
"""Private characters as templates may write them that show values as Python does."""
_SCHEMA = frozenset((
    "$defs", "$ref", "additionalProperties", "allOf", "anyOf", "array", "boolean", "const",
    "default", "description", "enum", "format", "function", "integer", "items", "name", "null",
    "number", "object", "oneOf", "parameters", "properties", "required", "string", "title", "type",
))  # fmt: skip
"""Words that templates look up in the tools they are given: they stay as they are."""


class Controls:
    """Of one tokenizer and template. Nothing changes after construction."""

    def __init__(self, backend: tokenizers.Tokenizer, template: str) -> None:
        """Raises ModelUnsupported when the tokenizer's control tokens cannot be told from text."""
        self._template = template
        added = backend.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special}
        # Not special, yet structure when the template writes it: <tool_response>. The assistant's
        # own past words may hold it.
        structure = {
            t.content
            for t in added
            if not t.special and _MARKUP.fullmatch(t.content) and t.content in template
        }
        nonce = secrets.token_hex(8)
        controls = sorted(special | structure, key=len, reverse=True)
        self.secret = {name: f"\ue000{nonce}.{at}\ue001" for at, name in enumerate(controls)}
        self.twin = _twin(backend, self.secret)
        self.all = _any_of(self.secret)
        self.special_only = _any_of(name for name in self.secret if name in special)
        self._names = "\0".join(controls)
        self._heads = tuple({name[:size] for name in controls for size in range(1, len(name))})
        self._tails = tuple({name[size:] for name in controls for size in range(1, len(name))})

    def marking(self, given: Iterable[Any]) -> "Marking":
        """Private characters nobody uses here: a seam, and one for each control token found."""
        texts = [text for value in given for text in strings(value)]
        used = set(self._template).union(*texts)
        used |= {chr(int(code, 16)) for text in texts for code in _ESCAPED.findall(text)}
        patterns = (self.all, self.special_only)
        names = sorted({name for text in texts for p in patterns for name in p.findall(text)})
        unused = [char for char in map(chr, _PRIVATE) if char not in used][: len(names) + 1]
        if len(unused) <= len(names):
            raise RequestInvalid("the messages use every private character", param="messages")
        return Marking(self, unused[0], dict(zip(names, unused[1:], strict=True)))

    def seamed(self, text: str, seam: str) -> str:
        """With the seam where the text around it could complete a control token."""
        body = text.strip()
        inside = body != "" and body in self._names
        head = seam if inside or body.startswith(self._tails) else ""
        tail = seam if inside or body.endswith(self._heads) else ""
        at = text.find(body)
        return text[:at] + head + body + tail + text[at + len(body) :]


class Marking:
    """How the strings of one chat are rendered."""

    def __init__(self, controls: Controls, seam: str, stand_ins: Mapping[str, str]) -> None:
        self._controls = controls
        self._seam = seam
        self._stand_ins = stand_ins

    def text(self, text: str, *, spoken: bool = False) -> str:
        """Without any control token, and nothing that the template's text could make one of.

        spoken: by the assistant, whose past words may hold structure.
        """
        found = self._controls.special_only if spoken else self._controls.all
        return self._controls.seamed(
            found.sub(lambda match: self._stand_ins[match[0]], text), self._seam
        )

    def json(self, value: Any) -> Any:  # noqa: ANN401 - any JSON value
        """The same for every string of a JSON value, keys included."""
        if isinstance(value, str):
            marked = self.text(value)
            return value if value in _SCHEMA and marked.strip(self._seam) == value else marked
        if isinstance(value, Mapping):
            return {self.json(key): self.json(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.json(item) for item in value]
        return value

    def restored(self, rendered: str) -> str:
        """For the twin: the template's control tokens by their secret names, all else as it was."""
        words = {self._seam: "", **{char: name for name, char in self._stand_ins.items()}}
        words |= {f"\\u{ord(char):04x}": name for char, name in words.items()}
        written = {**words, **self._controls.secret}
        pattern = _any_of([*self._controls.secret, *words])
        return pattern.sub(lambda match: written[match[0]], rendered)


def strings(value: object) -> Iterator[str]:
    """Every string of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _twin(backend: tokenizers.Tokenizer, secret: Mapping[str, str]) -> tokenizers.Tokenizer:
    """The same tokenizer, ids and splitting, with the given added tokens under secret names."""
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        if token["content"] in secret:
            token |= {
                "content": secret[token["content"]],
                "single_word": False,
                "normalized": False,
            }
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(name, name): at for name, at in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(name, name), score] for name, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = secret.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if not _merges_into(m, secret)]
    spec["post_processor"] = None
    twin = tokenizers.Tokenizer.from_str(json.dumps(spec))
    moved = [n for n, other in secret.items() if backend.token_to_id(n) != twin.token_to_id(other)]
    if moved:
        raise ModelUnsupported(
            f"expected a tokenizer whose control tokens can be renamed; {moved[0]} could not"
        )
    return twin


def _merges_into(merge: str | list[str], secret: Mapping[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in secret or right in secret or left + right in secret
