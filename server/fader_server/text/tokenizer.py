"""The base's tokenizer as the server uses it. Adapters' own files have no say."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fader_adapters.errors import first_line
from fader_server.errors import ConfigInvalid, ModelUnsupported, RequestInvalid
from fader_server.text.answers import Answers
from fader_server.text.chat import ChatEncoder
from fader_server.text.contents import characters
from fader_server.text.encoding import check_length, encode
from fader_server.text.files import config_eos, processor_template, what_is_missing
from fader_server.text.pieces import Pieces
from fader_server.text.restriction import Restriction, restriction_of
from fader_server.text.tools import Tool

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer(Answers):
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
        own = tokenizer.eos_token_id
        ends = frozenset(eos_ids) | ({own} if isinstance(own, int) else frozenset())
        chat = (
            ChatEncoder(
                tokenizer,
                self._backend,
                ends=ends,
                variables=template_variables,
                thoughts_apart=thoughts_apart,
            )
            if getattr(tokenizer, "chat_template", None)
            else None
        )
        if template_variables and chat is None:
            raise ConfigInvalid("--default-chat-template-kwargs: the base has no chat template")
        own_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        size = min(own_size, model_vocab_size or own_size)
        super().__init__(Pieces(self._backend), chat, ends=ends, vocab_size=size)
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

    def restriction(self, ids: Sequence[int], words: Iterable[str]) -> Restriction:
        """To these ids, all if there are none, and without these words. Takes its time, on any
        thread. Raises RequestInvalid."""

        def encoded(word: str) -> tuple[int, ...]:
            return tuple(encode(self._of_prompts, word, param="bad_words", special=None))

        return restriction_of(ids, words, encoded, self.vocab_size)
