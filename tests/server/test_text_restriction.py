"""`allowed_token_ids` and `bad_words` as guides over token ids, alone and over other guides."""

import json
import random

from fader_server.text.restriction import Restriction, restriction_of
from fader_server.text.shape import Shape
from tests.server.test_text_guides import demo_tokenizer, ids, walk

SIZE, END = 20, 19


def made(allowed=(), words=()) -> Restriction:
    """Over ids 0 to 19, the last of which ends an output; letters are their places, blank is 18."""

    def encode(word: str) -> tuple[int, ...]:
        return tuple(18 if char == " " else ord(char) - ord("a") for char in word)

    return restriction_of(allowed, words, encode, SIZE)


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


async def test_a_guides_words_come_where_nothing_else_may():
    tokenizer = demo_tokenizer()
    for texts, told in ((["red", "blue"], {"blue"}), (["red"], {"red"})):
        found = set()
        for seed, guide in enumerate(
            await tokenizer.guides(Shape("choice", json.dumps(texts)), 20)
        ):
            first = [t for t in ids(guide.allowed()) if tokenizer.decode([t])[0] == "r"]
            words = [tokenizer.decode([token]) for token in first]
            restricted = tokenizer.restriction((), words).guide(guide)
            tokens = list(walk(restricted, random.Random(seed)))  # pyright: ignore[reportArgumentType]
            assert restricted.ended
            found.add(tokenizer.decode(t for t in tokens if t not in tokenizer.eos_ids))
        assert found == told


def test_a_word_comes_where_nothing_else_is_permitted():
    guide = made((3, 5), ["d", "ef"]).guide(None)
    assert ids(guide.allowed()) == [5]
    assert ids(made((3,), ["d"]).guide(None).allowed()) == [3]


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
