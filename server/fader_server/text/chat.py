"""Chats to token ids by the base's own template. What a client writes is never a control token."""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2
import tokenizers
from transformers import PreTrainedTokenizerBase

from fader_server.errors import ConfigInvalid, ModelUnsupported, RequestInvalid
from fader_server.text.contents import text_of, with_short_ids
from fader_server.text.controls import Controls, Marking
from fader_server.text.effort import variables_for, variables_read
from fader_server.text.encoding import encode
from fader_server.text.harmony import as_template_takes, find_harmony
from fader_server.text.roles import ROLES
from fader_server.text.thought import find_markers
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_probe import Unread, find_format
from fader_server.text.tools import Tool

_THOUGHTS = {
    "reasoning_content": re.compile("reasoning_content"),
    "thinking": re.compile(r"""\w\.thinking\b|["']thinking["']"""),
}
"""Fields of messages that templates read what was thought from, and how they do."""
_FIELDS = ("content", "name", "tool_call_id", *_THOUGHTS)
_WORD = "parrot"
"""What a template is asked to repeat."""
_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_OURS = frozenset((*_ARGUMENTS, "messages", "eos_token", "bos_token"))
"""What rendering itself gives a template, or takes."""
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatEncoder:
    """Safe to use from several threads: nothing changes after construction."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        backend: tokenizers.Tokenizer,
        *,
        ends: Collection[int] = (),
        variables: Mapping[str, Any] = MappingProxyType({}),
        thoughts_apart: bool = True,
    ) -> None:
        """ends: tokens that end an answer. variables: of the template, for every chat.
        thoughts_apart: what the model thinks is no part of its answers.

        Raises ModelUnsupported when the tokenizer's control tokens cannot be told from text, or
        when it has several templates and none of them is the default, and ConfigInvalid for
        variables that the template does not read."""
        self._tokenizer = tokenizer
        self._backend = backend
        try:
            self.template = str(tokenizer.get_chat_template())
        except ValueError as error:
            raise ModelUnsupported(f"expected one default chat template: {error}") from error
        self._parts = _wants_parts(tokenizer)
        with_tools = str(tokenizer.get_chat_template(tools=[]))
        self._read = variables_read(self.template) | variables_read(with_tools)
        self._variables = _checked(variables, self._read)
        found_markers = find_markers(backend, self.template + with_tools)
        self.markers = found_markers if thoughts_apart else None
        """Around what the model thinks; None where the template has none."""
        self._thought_field = next(
            (name for name, read in _THOUGHTS.items() if read.search(self.template)), None
        )
        self._controls = Controls(backend, self.template + with_tools)
        added = backend.get_added_tokens_decoder().items()
        special = {entry.content: token for token, entry in added if entry.special}
        self.harmony = find_harmony(self._try, special) if thoughts_apart else None
        """Where answers are in harmony's channels."""
        found = (
            find_format(self._try, special, ends)
            if self.harmony is None
            else Unread(self.harmony.unread)
        )
        self.tool_format: ToolFormat | None = found if isinstance(found, ToolFormat) else None
        """None where the template has no calls of tools, none that can be read, or harmony's."""
        self.unread = found.reason if isinstance(found, Unread) else ""
        """Why there are no calls, in words; empty: there are."""
        self._short_ids = self._takes_id("parrot024") and not self._takes_id("call_parrot24")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        *,
        special: bool = False,
        speaks: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """Ids of the rendered chat, ready for the assistant to speak, unless it never `speaks`, or
        `continues` the last message.

        messages: `role`, `content`, a string, optionally `name`, `tool_call_id`,
        `reasoning_content`, which reaches templates that read it, and `tool_calls`, each with `id`,
        and `function` with `name` and `arguments`, an object. tools: what is offered. effort: one
        of EFFORTS; None, or a template that knows of none: as it is by itself. special: with the
        tokens that the tokenizer adds by itself, beside those of the template. Raises
        RequestInvalid.
        """
        if not messages:
            raise RequestInvalid("expected at least one message", param="messages")
        plain = [self._message(at, message) for at, message in enumerate(messages)]
        if self._short_ids:  # a chat may have begun at another server
            plain = [with_short_ids(message) for message in plain]
        shown = [tool.shown for tool in tools]
        if shown and self.unread:
            raise RequestInvalid(
                "this model's chat template has no calls of tools that this server can read: only "
                'tool_choice "none" is possible',
                param="tools",
            )
        marking = self._controls.marking([plain, shown])
        marked = [self._marked(message, marking) for message in plain]
        marked_tools = marking.json(shown)
        written = self._written(marked)
        text = self._with_effort(written, marked_tools, effort, speaks and not continues, continues)
        backend = self._backend
        if marked != plain or marked_tools != shown:
            backend, text = self._controls.twin, marking.restored(text)
        return encode(backend, text, param="messages", special=self._backend if special else None)

    def _with_effort(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        effort: str | None,
        speaks: bool,
        continues: bool,
    ) -> str:
        asked = variables_for(effort, self._read)
        try:
            return self._render(messages, tools, prompt=speaks, asked=asked, continues=continues)
        except RequestInvalid:
            if not asked or self._try(messages, tools, prompt=speaks, continues=continues) is None:
                raise
            raise RequestInvalid(
                f"the model's chat template refuses the effort {effort!r}", param="reasoning_effort"
            ) from None

    def _message(self, at: int, message: Mapping[str, Any]) -> dict[str, Any]:
        role = message.get("role")
        if role not in ROLES:
            raise RequestInvalid(
                f"expected a role out of {', '.join(ROLES)}", param=f"messages[{at}].role"
            )
        if role == "developer" and "developer" not in self.template:
            role = "system"
        fields: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), at)}
        for field in ("name", "tool_call_id"):
            if isinstance(message.get(field), str):
                fields[field] = message[field]
        if message.get("reasoning_content") and self._thought_field is not None:
            fields[self._thought_field] = message["reasoning_content"]
        if message.get("tool_calls"):
            if self.unread:
                raise RequestInvalid(
                    "this model's chat template has no calls of tools that this server can read",
                    param="messages",
                )
            fields["tool_calls"] = message["tool_calls"]
        return fields

    def _marked(self, message: dict[str, Any], marking: Marking) -> dict[str, Any]:
        fields = dict(message)
        for field in _FIELDS:
            if field in fields:
                fields[field] = marking.text(fields[field], spoken=message["role"] == "assistant")
        if "tool_calls" in fields:
            fields["tool_calls"] = [_marked_call(call, marking) for call in fields["tool_calls"]]
        return fields

    def _written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As the template takes calls."""
        if self.harmony is not None:
            return as_template_takes(messages)
        form = self.tool_format
        return [form.history(m) if form and "tool_calls" in m else m for m in messages]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        *,
        prompt: bool,
        asked: Mapping[str, Any] = MappingProxyType({}),
        continues: bool = False,
    ) -> str:
        given = _in_parts(messages) if self._parts else messages
        offered: list[Any] | None = tools or None
        try:
            text = self._tokenizer.apply_chat_template(
                given,
                tools=offered,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=continues,
                **{**self._variables, **asked},
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

    def _takes_id(self, id: str) -> bool:
        """Whether the template takes a call with this id and its result."""
        function = {"name": _WORD, "arguments": {}}
        call = {"id": id, "type": "function", "function": function}
        messages = [
            {"role": "user", "content": _WORD},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": _WORD, "tool_call_id": id, "name": _WORD},
        ]
        return self._try(self._written(messages), [], prompt=True) is not None

    def _try(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        *,
        prompt: bool,
        continues: bool = False,
    ) -> str | None:
        """The same; None: the template refuses."""
        try:
            return self._render(messages, tools, prompt=prompt, continues=continues)
        except RequestInvalid:
            return None


def _checked(variables: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """The same. Raises ConfigInvalid for one that the template does not read, or that is ours."""
    for name in variables:
        if name in _OURS or name not in read:
            free = ", ".join(sorted(set(read) - _OURS)) or "none"
            raise ConfigInvalid(
                f"--default-chat-template-kwargs: the chat template has no variable {name!r} to "
                f"set; those it reads: {free}"
            )
    return dict(variables)


def _marked_call(call: Mapping[str, Any], marking: Marking) -> dict[str, Any]:
    function = call["function"]
    return {
        "id": marking.text(call["id"]),
        "type": "function",
        "function": {
            "name": marking.text(function["name"]),
            "arguments": marking.json(function["arguments"]),
        },
    }


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
