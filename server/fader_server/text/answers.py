"""What comes out of a base: text, thoughts and calls of tools, as its chat template has them, and
guides that keep them to what a request asks for."""

from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

from fader_server.core import Guide
from fader_server.text.chat import ChatEncoder
from fader_server.text.detokenizer import Detokenizer
from fader_server.text.harmony import PREFIX
from fader_server.text.harmony_reader import Channels
from fader_server.text.harmony_stream import ChannelStream
from fader_server.text.pieces import Pieces
from fader_server.text.shape import Shape
from fader_server.text.stream import Echo, TextStream
from fader_server.text.thought import Thought, ThoughtGuide, all_but
from fader_server.text.tool_format import ToolFormat
from fader_server.text.tool_stream import ToolStream
from fader_server.text.tools import ToolUse

if TYPE_CHECKING:
    from fader_server.text.grammar import GrammarGuide
    from fader_server.text.guides import Guides


class Answers:
    """Of one base. Nothing but its grammars changes after construction."""

    def __init__(
        self, pieces: Pieces, chat: ChatEncoder | None, *, ends: frozenset[int], vocab_size: int
    ) -> None:
        """chat: None where there are none. ends: tokens that end an output."""
        self._pieces = pieces
        self._chat = chat
        self._markers = None if chat is None else chat.markers
        self._harmony = None if chat is None else chat.harmony
        self.eos_ids = ends if self._harmony is None else ends | self._harmony.ends
        """Tokens that end an output."""
        self.vocab_size = vocab_size
        """One more than the highest id that is a token's and the model takes; its logits may be
        wider."""

    def decode(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of all tokens: what a TextStream of them gives; special: with the names of
        special tokens."""
        detokenizer = Detokenizer(self._pieces)
        parts: list[str] = []
        for token in tokens:
            name = self._pieces.special_name(token) if special else None
            parts.append(detokenizer.feed(token) if name is None else detokenizer.flush() + name)
        return "".join(parts) + detokenizer.flush()

    def echo(self, prompt: Sequence[int]) -> Echo:
        """A prompt that is part of its choices' texts. Takes its time."""
        return Echo(self._pieces, prompt)

    def stream(
        self,
        *,
        after: Sequence[int] = (),
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: object = None,
    ) -> TextStream | ChannelStream:
        """The text of a new choice. after: what it continues; leave it out for chat. thought: its
        own."""
        if isinstance(thought, Channels):
            return ChannelStream(
                self._pieces, thought, None, after=after, stops=stops, include_stop=include_stop
            )
        detokenizer = Detokenizer(self._pieces, after=after)
        return TextStream(detokenizer, stops=stops, include_stop=include_stop)

    def tool_stream(
        self,
        use: ToolUse,
        *,
        stops: Iterable[str] = (),
        include_stop: bool = False,
        thought: object = None,
    ) -> ToolStream | ChannelStream:
        """The content and the calls of a new choice in a chat that was encoded with tools.
        thought: its own."""
        if isinstance(thought, Channels):
            return ChannelStream(self._pieces, thought, use, stops=stops, include_stop=include_stop)
        return ToolStream(
            self._pieces, self._tool_format, use, stops=stops, include_stop=include_stop
        )

    def thought(self, prompt: Sequence[int]) -> Thought | Channels | None:
        """Of a new choice in a chat with this prompt; None: no thoughts are told apart."""
        if self._harmony is not None:
            return Channels(self._pieces, self._harmony, prompt)
        return None if self._markers is None else Thought(self._pieces, self._markers, prompt)

    def after_thought(self, guide: Guide, prompt: Sequence[int]) -> Guide:
        """The guide for the answer of a choice in a chat with this prompt, whatever it thinks.
        Raises RequestInvalid where the prompt has begun a message that cannot become one."""
        if self._harmony is not None:
            from fader_server.text.harmony_grammar import follow_head

            follow_head(guide, self._harmony, prompt)
            return guide
        if self._markers is None or (state := self._markers.state_after(prompt)) == "closed":
            return guide
        return ThoughtGuide(guide, self._markers, state, self._free)

    @cached_property
    def _free(self) -> bytes:
        return all_but(self.vocab_size, self.eos_ids)

    @property
    def thoughts_told(self) -> dict[str, str]:
        """How the base's thoughts are told apart, as a field for a log."""
        if self._harmony is not None:
            return {"markers": "the analysis channel of harmony"}
        return {"markers": "none" if self._markers is None else " … ".join(self._markers.names)}

    @property
    def calls_told(self) -> dict[str, str | bool]:
        """What is known of how this base writes calls of tools, as fields for a log."""
        if self._chat is None:
            return {"form": "none", "reason": "there is no chat template"}
        if self._chat.unread:
            return {"form": "none", "reason": self._chat.unread}
        if self._harmony is not None:
            return {
                "form": "a message of harmony a call",
                "marker": f"to={PREFIX}",
                "several": False,
            }
        form = self._tool_format
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

    async def guides(
        self, shape: Shape, count: int, *, tenant: str = "", chat: bool = False
    ) -> "list[GrammarGuide]":
        """For so many outputs of one shape; chat: for answers of one. Raises RequestInvalid,
        Overloaded."""
        harmony = self._harmony if chat else None
        shape = await self._guides.in_lark(shape, tenant=tenant)
        # what is wrong with it is told by itself
        made = await self._guides.start_shape(shape, 0 if harmony else count, tenant=tenant)
        if harmony is None:
            return made
        from fader_server.text.harmony_grammar import harmony_grammar

        grammar = harmony_grammar(harmony, None, shape)
        assert grammar is not None
        return await self._guides.start(
            grammar, count, param=shape.param, noun="a shape", tenant=tenant
        )

    async def tool_guides(
        self, use: ToolUse, shape: Shape | None, count: int, *, tenant: str = ""
    ) -> "list[GrammarGuide] | None":
        """For outputs that may or must call tools, and have the shape in their content; None: they
        need none. Raises RequestInvalid, Overloaded."""
        from fader_server.text.harmony_grammar import harmony_grammar
        from fader_server.text.tool_grammar import tool_grammar

        if shape is not None:
            shape = await self._guides.in_lark(shape, tenant=tenant)
            # what is wrong with it is told by itself
            await self._guides.start_shape(shape, 0, tenant=tenant)
        grammar = (
            tool_grammar(self._tool_format, use, shape)
            if self._harmony is None
            else harmony_grammar(self._harmony, use, shape)
        )
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
