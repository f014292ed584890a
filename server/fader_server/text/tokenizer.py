"""The base's tokenizer as the server uses it. Adapters' own files have no say."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fader_adapters.errors import first_line
from fader_server.core import Guide
from fader_server.errors import ConfigInvalid, ModelUnsupported, RequestInvalid
from fader_server.text.chat import ChatEncoder
from fader_server.text.contents import characters
from fader_server.text.detokenizer import Detokenizer
from fader_server.text.encoding import check_length, encode
from fader_server.text.files import config_eos, processor_template, what_is_missing
from fader_server.text.pieces import Pieces
from fader_server.text.restriction import Restriction, restriction_of
from fader_server.text.shape import Shape
from fader_server.text.stream import Echo, TextStream
from fader_server.text.thought import Thought, ThoughtGuide, all_but
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_stream import ToolStream
from fader_server.text.tools import Tool, ToolUse

if TYPE_CHECKING:
    from fader_server.text.grammar import GrammarGuide
    from fader_server.text.guides import Guides


_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Safe to use from several threads, and long encodings do not stall the others."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        model_vocab_size: int | None = None,
        template_variables: Mapping[str, Any] = MappingProxyType({}),
        thoughts_apart: bool = True,
    ) -> None:
        """eos_ids: the generation config's, beside the tokenizer's. model_vocab_size: ids that the
        model has an embedding for; None: all. template_variables: of the chat template, for every
        chat. thoughts_apart: what a model thinks is no part of its answers.

        Raises ModelUnsupported, and ConfigInvalid for such variables."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, tokenizers.Tokenizer):
            raise ModelUnsupported(
                "expected a base with a tokenizer.json; its tokenizer runs in Python only"
            )
        # A private copy: transformers changes truncation and padding of its own under our feet.
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._of_prompts = self._backend
        if getattr(tokenizer, "split_special_tokens", False):
            self._of_prompts = tokenizers.Tokenizer.from_str(self._backend.to_str())
            self._of_prompts.encode_special_tokens = True  # a template's own are no such text
        self._max_model_len = max_model_len
        self._pieces = Pieces(self._backend)
        own = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids) | ({own} if isinstance(own, int) else frozenset())
        """Tokens that end an output."""
        self._chat = (
            ChatEncoder(tokenizer, self._backend, ends=self.eos_ids, variables=template_variables)
            if getattr(tokenizer, "chat_template", None)
            else None
        )
        if template_variables and self._chat is None:
            raise ConfigInvalid("--default-chat-template-kwargs: the base has no chat template")
        self._markers = self._chat.markers if self._chat is not None and thoughts_apart else None
        own_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.vocab_size = min(own_size, model_vocab_size or own_size)
        """One more than the highest id that is a token's and the model takes; its logits may be
        wider."""
        self._strangers = self.vocab_size < own_size
        """Whether a text may have tokens that the model does not take."""
        self.told: dict[str, str | None] = {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: getattr(tokenizer, name, None) for name in _NAMED},
            "chat_template": None if self._chat is None else self._chat.template,
        }
        """Of clients that tokenise here: as tokenizer_config.json has it."""

    @classmethod
    def load(
        cls,
        source: str,
        *,
        max_model_len: int,
        model_vocab_size: int | None = None,
        revision: str | None = None,
        template_variables: Mapping[str, Any] = MappingProxyType({}),
        thoughts_apart: bool = True,
    ) -> "Tokenizer":
        """From a folder or Hub id. No code of the source is ever run. Raises as the constructor."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False
            )
        except Exception as error:  # whatever a file on disk can cause; the library raises no less
            raise ModelUnsupported(
                f"cannot load the tokenizer of {source}: "
                f"{what_is_missing(source, revision) or first_line(error)}"
            ) from error
        if not getattr(tokenizer, "chat_template", None):
            tokenizer.chat_template = processor_template(source, revision)
        eos_ids = config_eos(source, revision)
        return cls(
            tokenizer,
            max_model_len=max_model_len,
            eos_ids=eos_ids,
            model_vocab_size=model_vocab_size,
            template_variables=template_variables,
            thoughts_apart=thoughts_apart,
        )

    def encode_prompt(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a raw prompt; control tokens in it are control tokens,
        unless the base's tokenizer_config.json says split_special_tokens.

        special: with the tokens the tokenizer adds by itself, such as BOS. Raises RequestInvalid,
        and ContextTooLong for a text too long to be worth encoding.
        """
        check_length(len(text), self._max_model_len, param="prompt")
        own = self._of_prompts if special else None
        ids = encode(self._of_prompts, text, param="prompt", special=own)
        return self._taken(ids, param="prompt")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] = (),
        effort: str | None = None,
        *,
        special: bool = False,
        speaks: bool = True,
        continues: bool = False,
    ) -> list[int]:
        """Ids of a chat; see ChatEncoder.encode. Control tokens in it are plain text."""
        if self._chat is None:
            raise RequestInvalid(
                "this model has no chat template: use /v1/completions", param="messages"
            )
        check_length(characters(messages, tools), self._max_model_len, param="messages")
        ids = self._chat.encode(
            messages, tools, effort, special=special, speaks=speaks, continues=continues
        )
        return self._taken(ids, param="messages")

    def _taken(self, ids: list[int], *, param: str) -> list[int]:
        """The same ids. Raises RequestInvalid for one that the model has no embedding for."""
        if self._strangers and (unknown := max(ids, default=0)) >= self.vocab_size:
            raise RequestInvalid(
                f"the text has {self.token_text(unknown)!r}, token {unknown} of the tokenizer; "
                f"the model has embeddings only for tokens 0 to {self.vocab_size - 1}",
                param=param,
            )
        return ids

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of all tokens: what a TextStream of them gives; special: with the names of
        special tokens."""
        detokenizer = Detokenizer(self._pieces)
        parts: list[str] = []
        for token in tokens:
            name = self._pieces.special_name(token) if special else None
            parts.append(detokenizer.feed(token) if name is None else detokenizer.flush() + name)
        return "".join(parts) + detokenizer.flush()

    def stream(
        self,
        *,
        after: Sequence[int] = (),
        stops: Iterable[str] = (),
        include_stop: bool = False,
    ) -> TextStream:
        """The text of a new choice. after: what it continues; leave it out for chat."""
        detokenizer = Detokenizer(self._pieces, after=after)
        return TextStream(detokenizer, stops=stops, include_stop=include_stop)

    def echo(self, prompt: Sequence[int]) -> Echo:
        """A prompt that is part of its choices' texts. Takes its time."""
        return Echo(self._pieces, prompt)

    def tool_stream(
        self, use: ToolUse, *, stops: Iterable[str] = (), include_stop: bool = False
    ) -> ToolStream:
        """The content and the calls of a new choice in a chat that was encoded with tools."""
        return ToolStream(
            self._pieces, self._tool_format, use, stops=stops, include_stop=include_stop
        )

    def thought(self, prompt: Sequence[int]) -> Thought | None:
        """Of a new choice in a chat with this prompt; None: no thoughts are told apart."""
        return None if self._markers is None else Thought(self._pieces, self._markers, prompt)

    def after_thought(self, guide: Guide, prompt: Sequence[int]) -> Guide:
        """The guide for the answer of a choice in a chat with this prompt, whatever it thinks."""
        if self._markers is None or (state := self._markers.state_after(prompt)) == "closed":
            return guide
        return ThoughtGuide(guide, self._markers, state, self._free)

    @cached_property
    def _free(self) -> bytes:
        return all_but(self.vocab_size, self.eos_ids)

    @property
    def thoughts_told(self) -> dict[str, str]:
        """How the base's thoughts are told apart, as a field for a log."""
        return {"markers": "none" if self._markers is None else " … ".join(self._markers.names)}

    @property
    def calls_told(self) -> dict[str, str | bool]:
        """What is known of how this base writes calls of tools, as fields for a log."""
        if self._chat is None:
            return {"form": "none", "reason": "there is no chat template"}
        form = self._chat.tool_format
        if form is None:
            return {"form": "none", "reason": self._chat.unread}
        names = {ord(char): self.token_text(token) for char, token in form.controls.items()}
        marker = form.frame.first.strip().translate(names)
        return {"form": form.told, "marker": marker, "several": form.between is not None}

    @property
    def _tool_format(self) -> ToolFormat:
        found = None if self._chat is None else self._chat.tool_format
        assert found is not None, "encode_chat takes no tools without one"
        return found

    def token_text(self, token: int) -> str:
        """A token for people: part of a character shows as U+FFFD, a special token by its name."""
        name = self._pieces.special_name(token)
        return name if name is not None else self._pieces.piece(token).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes a token adds inside a text; None for one that adds none."""
        return self._pieces.piece(token) or None

    async def guides(self, shape: Shape, count: int, *, tenant: str = "") -> "list[GrammarGuide]":
        """For so many outputs of one shape. Raises RequestInvalid, Overloaded."""
        shape = await self._guides.in_lark(shape, tenant=tenant)
        return await self._guides.start_shape(shape, count, tenant=tenant)

    def restriction(self, ids: Sequence[int], words: Iterable[str]) -> Restriction:
        """To these ids, all if there are none, and without these words. Takes its time, on any
        thread. Raises RequestInvalid."""

        def encoded(word: str) -> tuple[int, ...]:
            return tuple(encode(self._of_prompts, word, param="bad_words", special=None))

        return restriction_of(ids, words, encoded, self.vocab_size, self.eos_ids)

    async def tool_guides(
        self, use: ToolUse, shape: Shape | None, count: int, *, tenant: str = ""
    ) -> "list[GrammarGuide] | None":
        """For outputs that may or must call tools, and have the shape in their content; None: they
        need none. Raises RequestInvalid, Overloaded."""
        from fader_server.text.tool_grammar import tool_grammar

        if shape is not None:
            shape = await self._guides.in_lark(shape, tenant=tenant)
            # what is wrong with it is told by itself
            await self._guides.start_shape(shape, 0, tenant=tenant)
        grammar = tool_grammar(self._tool_format, use, shape)
        if grammar is None:
            return None
        return await self._guides.start(
            grammar, count, param="tools", noun="parameters", tenant=tenant
        )

    @cached_property
    def _guides(self) -> "Guides":
        """Imports the grammar library when the first schema comes."""
        from fader_server.text.guides import Guides
        from fader_server.text.vocabulary import read_vocabulary

        return Guides(partial(read_vocabulary, self._pieces, self.vocab_size, self.eos_ids))
