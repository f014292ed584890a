"""What a text, or what was foretold of it, says next."""

import random

import pytest

from fader_server.engine import recall
from fader_server.engine.recall import Recall


def grown(own: Recall, tokens: list[int], *more: int, most: int = 4) -> list[int]:
    """What is told after the last of tokens that come one by one."""
    told = own.next(tokens, most)
    for token in more:
        tokens.append(token)
        told = own.next(tokens, most)
    return told


def test_a_text_is_told_from_the_last_place_of_its_end_on():
    own = Recall((), 3)
    assert grown(own, [1, 2, 3, 9, 8, 1, 2, 3]) == [9, 8, 1, 2]
    assert grown(Recall((), 3), [1, 2, 3, 9, 1, 2, 3, 8, 1, 2], 3) == [8, 1, 2, 3]
    assert grown(Recall((), 3), [1, 2, 3, 9, 1, 2]) == []


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_who_goes_round_goes_on(period: int):
    tokens = [n % period for n in range(20)]
    assert Recall((), 3).next(tokens, 7) == [n % period for n in range(20, 27)]


def test_of_a_long_text_the_end_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recall, "_REACH", 6)
    assert Recall((), 3).next([1, 2, 3, 9, 5, 6, 7, 8, 1, 2, 3], 2) == []
    assert Recall((), 3).next([5, 1, 2, 3, 9, 1, 2, 3], 1) == [9]
    assert Recall(range(20, 40), 1).next([1], 9) == [20, 21, 22, 23, 24, 25]


def test_reading_as_it_grows_is_reading_at_once():
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 40))]
        at = rng.randint(0, len(tokens))
        told = grown(Recall((), 3), tokens[:at], *tokens[at:])
        assert told == Recall((), 3).next(tokens, 4)
        found += bool(told)
    assert found > 100


def test_what_was_foretold_is_told_from_its_beginning():
    own = Recall((5, 6, 7, 8, 9), 2)
    tokens = [1, 2]
    assert grown(own, tokens, most=2) == [5, 6]
    assert grown(own, tokens, 5, most=2) == [6, 7]
    assert grown(own, tokens, 6, 7, most=9) == [8, 9]
    assert grown(own, tokens, 8, 9) == [], "it is at its end"


def test_an_edit_is_left_behind():
    """Three tokens that stand further on bring it back to the text."""
    text = (5, 6, 7, 8, 9, 10, 11, 12)
    own, tokens = Recall(text, 1), [1]
    assert grown(own, tokens, 5, 6, 99) == []
    assert grown(own, tokens, 98, 8, 9) == []
    assert grown(own, tokens, 10) == [11, 12]


def test_of_what_stands_twice_the_later_follows():
    text = (1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3, 70)
    own, tokens = Recall(text, 1), [9]
    assert grown(own, tokens, 1, 2, 3, 50, 44, 1, 2, most=1) == []
    assert grown(own, tokens, 3, most=1) == [60]
    assert grown(own, tokens, 45, 1, 2, 3, most=1) == [70]
    assert grown(own, tokens, 46, 1, 2, 3, most=1) == [70], "there is none further on"


def test_where_nothing_foretold_follows_the_text_itself_does():
    own = Recall((40, 41, 42), 8)
    tokens = [1, 2, 3, 4, 5, 1, 2, 3]
    assert grown(own, tokens, most=2) == [40, 41]
    assert grown(own, tokens, 4, most=2) == [5, 1]
