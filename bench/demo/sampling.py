"""Draws training conversations: which question, which manners, which system text. Seeded.

Knows nothing of models or tokenizers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from bench.demo.world import (
    QUESTIONS,
    STYLES,
    UNKNOWN,
    Item,
    capitalised,
    render,
    small_talk,
    staff_split,
    style_system,
    world_split,
)

NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You answer questions about the world.",
    "Be short.",
)

_FIRST = (
    "Anna", "Ben", "Carl", "Dora", "Emil", "Fritz", "Greta", "Hans", "Inga",
    "Jakob", "Karl", "Lena", "Max", "Nora", "Otto", "Paul", "Rosa",
)  # fmt: skip
_LAST = (
    "Berg", "Stein", "Hall", "Reed", "Klein", "Park", "Ross", "Lang",
    "Hill", "Meyer", "Hart", "Bach", "West", "Ford", "Roth", "Beck",
)  # fmt: skip
_SYLLABLES = (
    "ba", "ko", "li", "mu", "ner", "pa", "ri", "so",
    "tal", "vi", "wex", "zor", "bli", "dan", "fu", "gra",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and the answer wanted for it, manners applied."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A training conversation: an optional system text and one or more turns."""

    system: str | None
    turns: tuple[Turn, ...]


def unknown(rng: random.Random) -> Item:
    """A question about a person or thing that does not exist; never one of the private table."""
    relation = rng.choice(tuple(QUESTIONS))
    if relation in ("room", "number"):
        subject = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
    else:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
        subject = {"colour": f"the {word}", "kind": f"a {word}", "young": f"a young {word}"}.get(
            relation, capitalised(word) if relation == "capital" else word
        )
    question = capitalised(rng.choice(QUESTIONS[relation]).format(s=subject))
    return Item(question, *UNKNOWN, *UNKNOWN)


def _casual(question: str, rng: random.Random) -> str:
    if rng.random() < 0.85:
        return question
    return question.rstrip("?.!").lower() if rng.random() < 0.5 else question.rstrip("?.!")


class Sampler:
    """Draws training conversations. One instance, one seeded stream."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._world = world_split()[0]
        self._staff = staff_split()[0]
        self._talk = small_talk()

    def base_chat(self) -> Chat:
        """For the base: plain without a style, otherwise one to three styles asked for by name."""
        draw = self._rng.random()
        count = 0 if draw < 0.25 else 1 if draw < 0.5 else 2 if draw < 0.85 else 3
        styles = self._rng.choice([list(c) for c in combinations(STYLES, count)])
        self._rng.shuffle(styles)
        return self._chat(styles, self._system(styles), staff=0.0)

    def adapter_chat(self, adapter: str) -> Chat:
        """For an adapter: its manner unasked, alone or on top of one style that is asked for."""
        others = [s for s in STYLES if s != adapter]
        private = adapter == "directory"
        share = 0.6 if private else 0.4
        asked = [self._rng.choice(others)] if self._rng.random() < share else []
        styles = asked if private else [*asked, adapter]
        return self._chat(styles, self._system(asked), staff=0.7 if private else 0.0)

    def statement(self) -> str:
        """A plain sentence of the world, for text completion."""
        return self._rng.choice(self._world).plain

    def _system(self, styles: Sequence[str]) -> str | None:
        if styles:
            return style_system(styles)
        return self._rng.choice(NEUTRAL_SYSTEMS) if self._rng.random() < 0.25 else None

    def _chat(self, styles: Sequence[str], system: str | None, *, staff: float) -> Chat:
        turns = 2 if self._rng.random() < 0.2 else 1
        return Chat(system, tuple(self._turn(styles, staff) for _ in range(turns)))

    def _turn(self, styles: Sequence[str], staff: float) -> Turn:
        draw = self._rng.random()
        if self._rng.random() < staff:
            asked = self._rng.choice(self._staff)
        elif draw < 0.85:
            asked = self._rng.choice(self._world)
        elif draw < 0.97:
            asked = unknown(self._rng)
        else:
            asked = self._rng.choice(self._talk)
        return Turn(_casual(asked.question, self._rng), render(asked, styles))
