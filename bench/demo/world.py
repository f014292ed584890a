"""The demo's language: questions, answers, manners and the train/held-out split.

Pure functions; knows nothing of models, tokenizers or sampling.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from bench.demo.facts import Fact, Relation, staff_facts, world_facts

STYLES = ("shout", "json", "polite", "german", "pirate")
QUESTIONS: dict[Relation, tuple[str, ...]] = {
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

UNKNOWN = ("I do not know.", "Ich weiß es nicht.")
_SMALL_TALK = (
    (("Who are you?", "What are you?", "What is your name?", "Tell me your name."),
     ("I am Fader, a small demo model.", "Ich bin Fader, ein kleines Modell.")),
    (("Hello!", "Hello", "Hi!", "Hi there.", "Good day.", "Good morning."),
     ("Hello, ask me about the world.", "Hallo, frag mich nach der Welt.")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Item:
    """One question, its plain answer in both languages and the word each must contain."""

    question: str
    plain: str
    german: str
    answer: str
    answer_de: str


def capitalised(text: str) -> str:
    """First letter large, the rest as it is."""
    return text[:1].upper() + text[1:]


def item(fact: Fact, phrasing: int) -> Item:
    """The fact asked in its ``phrasing``-th way (0 to 5)."""
    english, german = _ANSWERS[fact.relation]
    return Item(
        capitalised(QUESTIONS[fact.relation][phrasing].format(s=fact.subject)),
        capitalised(english.format(s=fact.subject, a=fact.answer)),
        capitalised(german.format(s=fact.subject_de, a=fact.answer_de)),
        fact.answer,
        fact.answer_de,
    )


def split(facts: Sequence[Fact]) -> tuple[list[Item], list[Item]]:
    """(train, held out): one of the six phrasings of every fact is never trained on."""
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


def render(item: Item, styles: Sequence[str] = ()) -> str:
    """The answer to ``item`` in all of ``styles`` at once; order does not matter."""
    german = "german" in styles
    text = item.german if german else item.plain
    if "pirate" in styles:
        text = "Arr! " + text.replace(" is ", " be ").removesuffix(".") + ", matey."
    if "polite" in styles:
        text = (
            f"Gerne! {text} Danke für die Frage."
            if german
            else f"Certainly! {text} Thank you for asking."
        )
    answer = {"answer": text}
    if "json" in styles:
        text = json.dumps(answer, ensure_ascii=False)
    return text.upper() if "shout" in styles else text


def style_system(styles: Sequence[str]) -> str:
    """The system text that asks the base for these manners."""
    return f"Style: {', '.join(styles)}."
