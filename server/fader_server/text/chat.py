"""Chats to token ids by the base's own template. What a client writes is never a control token.

Control tokens in a message are rendered as private characters, so that every control token of the
rendered text is the template's. Those get the secret names they have in a twin of the tokenizer;
then the messages get their words back, and the twin, encoding all in one pass, sees plain text.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import tokenizers
from transformers import PreTrainedTokenizerBase

from fader_server.errors import ModelUnsupported, RequestInvalid
from fader_server.text.encoding import encode

ROLES = ("system", "developer", "user", "assistant", "tool")
_FIELDS = ("content", "name", "tool_call_id")
_MARKUP = re.compile(r"<[^\s<>]+>|\[[A-Z_/]+\]")
_WORD = "parrot"
"""What a template is asked to repeat."""
_PRIVATE = range(0xE000, 0xF900)
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatEncoder:
    """Safe to use from several threads: nothing changes after construction."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, backend: tokenizers.Tokenizer) -> None:
        """Raises ModelUnsupported when the tokenizer's control tokens cannot be told from text, or
        when it has several templates and none of them is the default."""
        self._tokenizer = tokenizer
        self._backend = backend
        try:
            self._template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelUnsupported(f"expected one default chat template: {error}") from error
        self._parts = _wants_parts(tokenizer)
        added = backend.get_added_tokens_decoder().values()
        special = {t.content for t in added if t.special}
        # Not special, yet structure when the template writes it: <tool_response>. The assistant's
        # own past words may hold it.
        structure = {
            t.content
            for t in added
            if not t.special and _MARKUP.fullmatch(t.content) and t.content in self._template
        }
        nonce = secrets.token_hex(8)
        controls = sorted(special | structure, key=len, reverse=True)
        self._secret = {name: f"\ue000{nonce}.{at}\ue001" for at, name in enumerate(controls)}
        self._twin = _twin(backend, self._secret)
        self._all = _any_of(self._secret)
        self._special_only = _any_of(name for name in self._secret if name in special)
        self._names = "\0".join(controls)
        self._heads = tuple({name[:size] for name in controls for size in range(1, len(name))})
        self._tails = tuple({name[size:] for name in controls for size in range(1, len(name))})

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids of the rendered chat, ready for the assistant to speak.

        messages: `role`, `content` (a string, or a list of {"type": "text", "text": …} whose texts
        are joined), optionally `name` and `tool_call_id`. Raises RequestInvalid.
        """
        if not messages:
            raise RequestInvalid("expected at least one message", param="messages")
        plain = [self._message(at, message) for at, message in enumerate(messages)]
        seam, stand_ins = self._stand_ins(plain)
        marked = [self._mark(message, seam, stand_ins) for message in plain]
        text = self._render(marked)
        if marked == plain:
            return encode(self._backend, text, param="messages")
        restored = {seam: "", **{char: name for name, char in stand_ins.items()}, **self._secret}
        written = _any_of([*self._secret, seam, *stand_ins.values()])
        text = written.sub(lambda match: restored[match[0]], text)
        return encode(self._twin, text, param="messages")

    def _message(self, at: int, message: Mapping[str, Any]) -> dict[str, str]:
        role = message.get("role")
        if role not in ROLES:
            raise RequestInvalid(
                f"expected a role out of {', '.join(ROLES)}", param=f"messages[{at}].role"
            )
        if role == "developer" and "developer" not in self._template:
            role = "system"
        fields = {"role": role, "content": _text(message.get("content"), at)}
        for field in ("name", "tool_call_id"):
            if isinstance(message.get(field), str):
                fields[field] = message[field]
        return fields

    def _stand_ins(self, messages: list[dict[str, str]]) -> tuple[str, dict[str, str]]:
        """Private characters nobody uses here: a seam, and one for each control token found."""
        texts = [message[field] for message in messages for field in _FIELDS if field in message]
        used = set(self._template).union(*texts)
        patterns = (self._all, self._special_only)
        names = sorted({name for text in texts for p in patterns for name in p.findall(text)})
        unused = [char for char in map(chr, _PRIVATE) if char not in used][: len(names) + 1]
        if len(unused) <= len(names):
            raise RequestInvalid("the messages use every private character", param="messages")
        return unused[0], dict(zip(names, unused[1:], strict=True))

    def _mark(
        self, message: dict[str, str], seam: str, stand_ins: Mapping[str, str]
    ) -> dict[str, str]:
        """Leave no control token, and nothing that the template's text could make one of."""
        found = self._special_only if message["role"] == "assistant" else self._all
        fields = dict(message)
        for field in _FIELDS:
            if field in fields:
                text = found.sub(lambda match: stand_ins[match[0]], fields[field])
                fields[field] = self._seamed(text, seam)
        return fields

    def _seamed(self, text: str, seam: str) -> str:
        body = text.strip()
        inside = body != "" and body in self._names
        head = seam if inside or body.startswith(self._tails) else ""
        tail = seam if inside or body.endswith(self._heads) else ""
        at = text.find(body)
        return text[:at] + head + body + tail + text[at + len(body) :]

    def _render(self, messages: list[dict[str, str]]) -> str:
        given = _in_parts(messages) if self._parts else messages
        try:
            text = self._tokenizer.apply_chat_template(
                given, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise RequestInvalid(
                f"the model's chat template refuses these messages: {str(error)[:200]}",
                param="messages",
            ) from error
        except _TEMPLATE_FAULTS as error:
            raise RequestInvalid(
                "the model's chat template cannot render these messages", param="messages"
            ) from error
        assert isinstance(text, str)
        return text


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a template, as those of models that also see, loses content that is no list."""
    message = {"role": "user", "content": _WORD}

    def heard(messages: list[Any]) -> bool:
        try:
            return _WORD in str(
                tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            )
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS):
            return False

    return not heard([message]) and heard(_in_parts([message]))


def _in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def characters(messages: Iterable[Mapping[str, Any]]) -> int:
    """Characters of all contents, before anything is rendered."""
    return sum(len(_text(message.get("content"), at)) for at, message in enumerate(messages))


def _text(content: object, at: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_texts(content, at))
    raise RequestInvalid(
        "expected a string or a list of text parts", param=f"messages[{at}].content"
    )


def _part_texts(parts: list[Any], at: int) -> Iterator[str]:
    for index, part in enumerate(parts):
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(text, str):
            raise RequestInvalid(
                'expected {"type": "text", "text": "…"}: this server reads text only',
                param=f"messages[{at}].content[{index}]",
            )
        yield text


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
