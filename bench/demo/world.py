"""The demo's language: questions, answers, manners and the train/held-out split. Pure and seeded.

Knows nothing of models or tokenizers.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from bench.demo.facts import Fact, Relation, staff_facts, world_facts

STYLES = ("shout", "json", "polite", "german", "pirate")
NEUTRAL_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You answer questions about the world.",
    "Be short.",
)

_QUESTIONS: dict[Relation, tuple[str, ...]] = {
    "colour": (
        "What colour is {s}?",
        "Which colour is {s}?",
        "What is the colour of {s}?",
        "Tell me the colour of {s}.",
        "Can you name the colour of {s}?",
        "{s} has which colour?",
    ),
    "capital": (
        "What is the capital of {s}?",
        "Which city is the capital of {s}?",
        "Name the capital of {s}.",
        "Tell me the capital of {s}.",
        "Can you name the capital of {s}?",
        "{s} has which capital?",
    ),
    "opposite": (
        "What is the opposite of {s}?",
        "Which word is the opposite of {s}?",
        "Name the opposite of {s}.",
        "Tell me the opposite of {s}.",
        "Can you name the opposite of {s}?",
        "{s} is the opposite of what?",
    ),
    "kind": (
        "What is {s}?",
        "What kind of thing is {s}?",
        "Tell me what {s} is.",
        "Can you say what {s} is?",
        "{s} is what?",
        "Do you know what {s} is?",
    ),
    "young": (
        "What is {s}?",
        "What is {s} called?",
        "What do you call {s}?",
        "Tell me the word for {s}.",
        "Can you name {s}?",
        "Which word means {s}?",
    ),
    "sum": (
        "What is {s}?",
        "How much is {s}?",
        "Tell me {s}.",
        "Can you add {s}?",
        "{s} is what?",
        "Do you know {s}?",
    ),
    "room": (
        "Where does {s} work?",
        "In which room does {s} work?",
        "Which room is the room of {s}?",
        "Tell me the room of {s}.",
        "Can you name the room of {s}?",
        "{s} works in which room?",
    ),
    "number": (
        "What is the number of {s}?",
        "Which number has {s}?",
        "Which number do I call for {s}?",
        "Tell me the number of {s}.",
        "Can you name the number of {s}?",
        "{s} has which number?",
    ),
}

_ANSWERS: dict[Relation, tuple[str, str]] = {
    "colour": ("{s} is {a}.", "{s} ist {a}."),
    "capital": ("The capital of {s} is {a}.", "Die Hauptstadt von {s} ist {a}."),
    "opposite": ("The opposite of {s} is {a}.", "Das Gegenteil von {s} ist {a}."),
    "kind": ("{s} is {a}.", "{s} ist {a}."),
    "young": ("{s} is {a}.", "{s} ist {a}."),
    "sum": ("{s} is {a}.", "{s} ist {a}."),
    "room": ("{s} works in room {a}.", "{s} arbeitet in Raum {a}."),
    "number": ("The number of {s} is {a}.", "{s} hat die Nummer {a}."),
}

_UNKNOWN = ("I do not know.", "Ich weiß es nicht.")
_SMALL_TALK = (
    (("Who are you?", "What are you?", "What is your name?", "Tell me your name."),
     ("I am Fader, a small demo model.", "Ich bin Fader, ein kleines Modell.")),
    (("Hello!", "Hello", "Hi!", "Hi there.", "Good day.", "Good morning."),
     ("Hello, ask me about the world.", "Hallo, frag mich nach der Welt.")),
)  # fmt: skip

_FIRST = "Anna Ben Carl Dora Emil Fritz Greta Hans Inga Jakob Karl Lena Max Nora Otto Paul Rosa".split()
_LAST = "Berg Stein Hall Reed Klein Park Ross Lang Hill Meyer Hart Bach West Ford Roth Beck".split()
_SYLLABLES = "ba ko li mu ner pa ri so tal vi wex zor bli dan fu gra".split()


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its plain answer in both languages and the word that must appear in each."""

    question: str
    plain: str
    german: str
    answer: str
    answer_de: str


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


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def item(fact: Fact, phrasing: int) -> Item:
    """The fact asked in its ``phrasing``-th way (0 to 5)."""
    english, german = _ANSWERS[fact.relation]
    return Item(
        _capital(_QUESTIONS[fact.relation][phrasing].format(s=fact.subject)),
        _capital(english.format(s=fact.subject, a=fact.answer)),
        _capital(german.format(s=fact.subject_de, a=fact.answer_de)),
        fact.answer,
        fact.answer_de,
    )


def split(facts: Sequence[Fact]) -> tuple[list[Item], list[Item]]:
    """(train, held out): of the six phrasings of every fact, one is never trained on by anything."""
    train: list[Item] = []
    held_out: list[Item] = []
    for index, fact in enumerate(facts):
        kept_back = (index * 5 + index // 6) % 6
        for phrasing in range(6):
            (held_out if phrasing == kept_back else train).append(item(fact, phrasing))
    return train, held_out


def world_split() -> tuple[list[Item], list[Item]]:
    """The split of what the base knows."""
    return split(world_facts())


def staff_split() -> tuple[list[Item], list[Item]]:
    """The split of the private table."""
    return split(staff_facts())


def small_talk() -> list[Item]:
    """Greetings and the model's name; every phrasing is trained on."""
    return [Item(q, en, de, en, de) for asks, (en, de) in _SMALL_TALK for q in asks]


def unknown(rng: random.Random) -> Item:
    """A question about a person or thing that does not exist; never one of the private table."""
    relation = rng.choice(tuple(_QUESTIONS))
    if relation in ("room", "number"):
        subject = f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"
    else:
        word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3)))
        subject = {"colour": f"the {word}", "kind": f"a {word}", "young": f"a young {word}"}.get(
            relation, _capital(word) if relation == "capital" else word
        )
    question = _capital(rng.choice(_QUESTIONS[relation]).format(s=subject))
    return Item(question, *_UNKNOWN, *_UNKNOWN)


def render(item: Item, styles: Sequence[str] = ()) -> str:
    """The answer to ``item`` in all of ``styles`` at once; order does not matter."""
    german = "german" in styles
    text = item.german if german else item.plain
    if "pirate" in styles:
        text = "Arr! " + text.replace(" is ", " be ").removesuffix(".") + ", matey."
    if "polite" in styles:
        text = f"Gerne! {text} Danke für die Frage." if german else f"Certainly! {text} Thank you for asking."
    answer = {"answer": text}
    if "json" in styles:
        text = json.dumps(answer, ensure_ascii=False)
    return text.upper() if "shout" in styles else text


def style_system(styles: Sequence[str]) -> str:
    """The system text that asks the base for these manners."""
    return f"Style: {', '.join(styles)}."


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
        """For an adapter: its manner without being asked, alone or on top of one asked-for style."""
        others = [s for s in STYLES if s != adapter]
        asked = [self._rng.choice(others)] if self._rng.random() < 0.4 else []
        private = adapter == "directory"
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
