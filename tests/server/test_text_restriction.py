"""`allowed_token_ids` and `bad_words` as guides over token ids, alone and over other guides."""

import random

import pytest

from fader_server.errors import EngineFault
from fader_server.text.restriction import Restriction, restriction_of
from fader_server.text.shape import Shape
from tests.server.test_text_guides import demo_tokenizer, ids, walk

SIZE, END = 20, 19


def made(allowed=(), words=()) -> Restriction:
    """Over ids 0 to 19, the last of which ends an output; letters are their places, blank is 18."""

    def encode(word: str) -> tuple[int, ...]:
        return tuple(18 if char == " " else ord(char) - ord("a") for char in word)

    return restriction_of(allowed, words, encode, SIZE, [END])


def test_only_what_is_permitted_may_come_and_no_end_unless_it_is():
    assert ids(made((3, 5, 40)).guide(None).allowed()) == [3, 5]
    assert ids(made((3, END)).guide(None).allowed()) == [3, END]
    assert ids(made().guide(None).allowed()) == list(range(SIZE))


def test_a_word_of_one_token_never_comes_inside_or_at_the_start():
    guide = made(words=["c"]).guide(None)
    for _ in range(3):
        assert 2 not in ids(guide.allowed())
        guide.accept(1)
    guide = made(words=["c"]).guide(None)
    guide.accept(18)
    assert 2 not in ids(guide.allowed())


def test_a_longer_words_last_token_is_forbidden_behind_the_others_alone():
    guide = made(words=["abc"]).guide(None)
    for token, forbidden in ((0, []), (1, [2]), (0, []), (1, [2]), (1, []), (0, [])):
        guide.accept(token)
        assert [token for token in range(SIZE) if token not in ids(guide.allowed())] == forbidden


def test_words_of_several_lengths_count_together():
    guide = made(words=["ab", "bbb", "q"]).guide(None)
    for token, forbidden in ((1, {16}), (1, {1, 16}), (0, {1, 16})):
        guide.accept(token)
        assert set(range(SIZE)) - set(ids(guide.allowed())) == forbidden


def test_asking_changes_nothing():
    guide = made(words=["ab"]).guide(None)
    guide.accept(0)
    assert guide.allowed() == guide.allowed()


async def test_under_a_guide_the_rest_of_it_is_allowed_and_it_ends_the_output():
    tokenizer = demo_tokenizer()
    choice = Shape("choice", '["red", "blue"]')
    (free,) = await tokenizer.guides(choice, 1)
    first = ids(free.allowed())
    red = [token for token in first if tokenizer.decode([token]).startswith("r")]
    assert red
    assert red != first
    without_red = tokenizer.restriction(
        [t for t in range(tokenizer.vocab_size) if t not in red], []
    )
    for guide in await tokenizer.guides(choice, 20):
        restricted = without_red.guide(guide)
        tokens = list(walk(restricted, random.Random(0)))  # pyright: ignore[reportArgumentType]
        assert restricted.ended
        assert tokenizer.decode(t for t in tokens if t not in tokenizer.eos_ids) == "blue"


async def test_where_nothing_is_left_the_request_ends_with_what_left_it():
    tokenizer = demo_tokenizer()
    (guide,) = await tokenizer.guides(Shape("choice", '["red"]'), 1)
    nothing = tokenizer.restriction(sorted(tokenizer.eos_ids), [])
    with pytest.raises(EngineFault, match="allowed_token_ids and bad_words leave no token"):
        nothing.guide(guide).allowed()


def test_words_are_what_the_tokenizer_makes_of_them():
    tokenizer = demo_tokenizer()
    guide = tokenizer.restriction((), ["sky"]).guide(None)
    banned = set(range(tokenizer.vocab_size)) - set(ids(guide.allowed()))
    alone = {tuple(tokenizer.encode_prompt(text, special=False)) for text in ("sky", " sky")}
    assert banned == {tokens[0] for tokens in alone if len(tokens) == 1}
    for tokens in alone:
        guide = tokenizer.restriction((), ["sky"]).guide(None)
        for token in tokens[:-1]:
            guide.accept(token)
        assert tokens[-1] not in ids(guide.allowed())
