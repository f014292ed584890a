"""What is measured: which model or blend, on which held-out questions, by which check and bar.

Shared by the offline measurement (PEFT) and the one through a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.demo.checks import right
from bench.demo.world import STYLES, Item, render, staff_split, style_system, world_split
from fader_server.demo import adapter_dirs, blends

CANCELLED = ("shout", "german", "pirate")
"""Adapters whose negative takes back the manner that a system text asks for."""

Terms = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """One row of the table. ``at_least``/``at_most`` are the bars, shares from 0 to 1."""

    label: str
    terms: Terms
    items: tuple[Item, ...]
    effects: tuple[str, ...]
    system: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def right(self, item: Item, text: str) -> bool:
        """The answer states the fact and shows every effect."""
        return right(item, text, self.effects)

    def passes(self, share: float) -> bool:
        """The share is on the right side of the bar; True where there is none."""
        above = self.at_least is None or share >= self.at_least
        return above and (self.at_most is None or share <= self.at_most)


def conditions() -> list[Condition]:
    """Everything the README states, in its order."""
    world, staff = tuple(world_split()[1]), tuple(staff_split()[1])

    def items_for(names: Sequence[str]) -> tuple[Item, ...]:
        return staff if "directory" in names else world

    names = sorted(adapter_dirs(), key=lambda name: (*STYLES, "directory").index(name))
    rows = [Condition("base, plain", (), world, (), at_least=0.95)]
    for name in names:
        rows.append(
            Condition(f"base by {name}'s check", (), items_for([name]), (name,), at_most=0.1)
        )
        rows.append(Condition(name, ((name, 1.0),), items_for([name]), (name,), at_least=0.95))
    for blend in blends():
        used = tuple(term.name for term in blend.adapters)
        terms = tuple((term.name, term.weight) for term in blend.adapters)
        rows.append(Condition(blend.name, terms, items_for(used), used, at_least=0.8))
    return rows + dose_rows(world)


def dose_rows(world: tuple[Item, ...]) -> list[Condition]:
    """What γ other than 1 does: part doses, and −1 against a manner asked for by system text."""
    doses = [("json", 0.25), ("json", 0.75), *((name, 0.5) for name in STYLES)]
    rows = [
        Condition(f"{name} at γ={gamma:g}", ((name, gamma),), world, (name,))
        for name, gamma in sorted(doses)
    ]
    for name in STYLES:
        system = style_system([name])
        label = f"'{system}' + {name} at γ=-1"
        bar = 0.1 if name in CANCELLED else None
        rows += [
            Condition(f"'{system}'", (), world, (name,), system, at_least=0.95),
            Condition(label, ((name, -1.0),), world, (name,), system, at_most=bar),
        ]
    return rows


Answer = Callable[[Condition], list[str]]


@dataclass(frozen=True, slots=True)
class Result:
    """A measured row, in shares from 0 to 1, with some of its answers.

    right: states the fact and shows every effect. exact: is the wanted answer to the letter.
    plain: is the base's plain answer to the letter.
    """

    condition: Condition
    share: float
    exact: float
    plain: float
    samples: tuple[tuple[str, str], ...]


def measure(condition: Condition, answer: Answer) -> Result:
    """Asks every question of the row once, greedily."""
    texts = answer(condition)
    pairs = list(zip(condition.items, texts, strict=True))
    hits = sum(condition.right(item, text) for item, text in pairs)
    exact = sum(text == render(item, condition.effects) for item, text in pairs)
    plain = sum(text == item.plain for item, text in pairs)
    total = len(pairs)
    shown = tuple((item.question, text) for item, text in pairs[:: max(1, total // 5)])
    return Result(condition, hits / total, exact / total, plain / total, shown)
