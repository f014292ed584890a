"""Prompts of an exact length that no prefix cache has seen. Token ids only, no text."""

import random
from collections.abc import Sequence

from fader_server.errors import ConfigInvalid


class PromptSource:
    """Random token-id prompts, never the same one twice in the source's life.

    `vocabulary`: the ids to draw from (a range, or ids a tokenizer was seen to give). `key` seeds
    the ids: a run puts a fresh nonce in it, since a server that is measured twice with the same
    prompts answers the second time from its prefix cache.
    """

    def __init__(self, vocabulary: Sequence[int], *, length: int, key: str) -> None:
        if length < 1:
            raise ConfigInvalid(f"--prompt-tokens must be at least 1, got {length}")
        if len(vocabulary) < 2:
            raise ConfigInvalid(f"a vocabulary needs at least 2 ids, got {len(vocabulary)}")
        self._vocabulary = vocabulary
        self._length = length
        self._rng = random.Random(f"prompts:{key}")  # noqa: S311 (load, not secrets)
        self._seen: set[tuple[int, ...]] = set()

    def take(self) -> tuple[int, ...]:
        """The next prompt. ConfigInvalid when so few exist that new ones cannot be found."""
        for _ in range(100):
            prompt = tuple(self._rng.choices(self._vocabulary, k=self._length))
            if prompt not in self._seen:
                self._seen.add(prompt)
                return prompt
        raise ConfigInvalid(
            f"no new prompt of {self._length} tokens left in a vocabulary of "
            f"{len(self._vocabulary)}: ask for longer prompts or fewer requests"
        )

    def many(self, count: int) -> list[tuple[int, ...]]:
        """The next `count` prompts."""
        return [self.take() for _ in range(count)]
