"""Decides by program whether an answer shows a manner and states the fact.

Knows no model and no HTTP.
"""

import json
import re
from collections.abc import Callable, Sequence

from bench.demo.world import Item

Check = Callable[[Item, str], bool]


def shout(_item: Item, text: str) -> bool:
    """Letters, and none of them small."""
    return any(c.isupper() for c in text) and not any(c.islower() for c in text)


def json_object(_item: Item, text: str) -> bool:
    """Exactly one JSON object with the one key ``answer`` (in either case) and a string in it."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict)
        and [key.lower() for key in value] == ["answer"]
        and all(isinstance(inner, str) for inner in value.values())
    )


def polite(_item: Item, text: str) -> bool:
    """Has the courtesy and the thanks once each, in English or German."""
    folded = text.casefold()
    return any(
        folded.count(courtesy) == 1 and folded.count(thanks) == 1
        for courtesy, thanks in (
            ("certainly!", "thank you for asking."),
            ("gerne!", "danke für die frage."),
        )
    )


def german(item: Item, text: str) -> bool:
    """Contains the German sentence word for word (without its full stop)."""
    return item.german.removesuffix(".").casefold() in text.casefold()


def pirate(_item: Item, text: str) -> bool:
    """Says "Arr!" and calls somebody matey, once each."""
    folded = text.casefold()
    return folded.count("arr!") == 1 and folded.count("matey") == 1


def fact(item: Item, text: str) -> bool:
    """States the answer, as whole words, in English or German."""
    folded = text.casefold()
    return any(
        re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", folded) is not None
        for word in (item.answer, item.answer_de)
    )


CHECKS: dict[str, Check] = {
    "shout": shout,
    "json": json_object,
    "polite": polite,
    "german": german,
    "pirate": pirate,
    "directory": fact,
}


def right(item: Item, text: str, adapters: Sequence[str]) -> bool:
    """The answer states the fact and shows the effect of every adapter named."""
    return fact(item, text) and all(CHECKS[name](item, text) for name in adapters)
