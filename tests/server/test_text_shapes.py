"""Guides of regular expressions and choices: what can be written under them, and how they end."""

import contextlib
import json
import random
import re
import time

import pytest

from fader_server.errors import EngineFault, RequestInvalid
from fader_server.text.shape import Shape
from fader_server.text.tokenizer import Tokenizer
from tests.server.test_text_guides import demo_tokenizer, no_mask_takes_long, walk
from tests.server.text_worlds import hf

CHOICES = ("yes", "yes please", "no", 'q"\\/\n', "größe 🦊", "%json {}", "a|b", "</s>", " x")
PATTERNS = (
    r"[A-Z]{2}-[0-9]{3}",
    r"^(ja|nein)$",
    r"^a|b$",
    r"[0-9]{4}/[0-9]{2}",
    r"(?i:ok)[^\n/]{0,5}",
    'x"\\\\y\\n"|z',
    "a\nb|c",
    "start: .\n%ignore /x/",
    r"\p{Lu}\p{Ll}{1,6}",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return demo_tokenizer()


async def texts(tokenizer: Tokenizer, shape: Shape, number: int = 40) -> list[str]:
    """What random models write under it, each to its own end."""
    rng, found = random.Random(7), []
    for guide in await tokenizer.guides(shape, number):
        tokens = [token for token in walk(guide, rng) if token not in tokenizer.eos_ids]
        assert guide.ended
        found.append(tokenizer.decode(tokens))
    return found


async def test_an_answer_is_one_of_the_choices_and_any_of_them(tokenizer: Tokenizer):
    found = await texts(tokenizer, Shape("choice", json.dumps(CHOICES)), 400)
    assert set(found) == set(CHOICES)


@pytest.mark.parametrize("family", ["byte_level", "llama", "gemma"])
async def test_choices_are_written_by_other_tokenizers_too(family: str):
    tokenizer = Tokenizer(hf(family), max_model_len=512)
    assert set(await texts(tokenizer, Shape("choice", '["yes", "no"]'), 60)) == {"yes", "no"}


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_an_answer_matches_the_whole_expression(tokenizer: Tokenizer, pattern: str):
    by_python = re.compile(
        pattern.replace(r"\p{Lu}", "[^\\W\\d_]").replace(r"\p{Ll}", "[^\\W\\d_]")
    )
    found = await texts(tokenizer, Shape("regex", pattern))
    assert len(set(found)) > 1
    for text in found:
        assert by_python.fullmatch(text), (pattern, text)


GRAMMARS = (
    ('start: "a" ITEM~1..3 "b"\nITEM: /[0-9]/ ","', r"a([0-9],){1,3}b"),
    (
        '?start: pair\npair: WORD ":" WORD\nWORD: /[a-z]{1,3}/\n%ignore / /',
        " *[a-z]{1,3} *: *[a-z]{1,3} *",
    ),
    ('root ::= "a" item+ "b"\nitem ::= [0-9]{1,2} [,;] # one\n', r"a([0-9]{1,2}[,;])+b"),
    ('root ::= ("ja" | "nein") "\\n"?', r"(ja|nein)\n?"),
    ('start: "a" // } no end\n | "}" | /[{}]/', "a|[{}]"),
)


@pytest.mark.parametrize(("grammar", "pattern"), GRAMMARS)
async def test_an_answer_follows_a_grammar_as_lark_or_gbnf(
    tokenizer: Tokenizer, grammar: str, pattern: str
):
    found = await texts(tokenizer, Shape("grammar", grammar))
    assert len(set(found)) > 1
    for text in found:
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ("no grammar", "guided_grammar has a grammar that is not valid here"),
        ("start: nobody", "guided_grammar has a grammar that is not valid here"),
        ('start: "a" }\nmore: %lark { start: "b"', "guided_grammar has a grammar"),
        ("start: " + "(" * 3000 + '"a"' + ")" * 3000, "that is not valid here"),
        ("root ::= nobody", "guided_grammar is no valid GBNF"),
        ("::=", "guided_grammar is no valid GBNF"),
        ("root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "guided_grammar is no valid GBNF"),
    ],
)
async def test_what_is_no_grammar_here_is_told_by_its_field(
    tokenizer: Tokenizer, grammar: str, told: str
):
    with pytest.raises(RequestInvalid, match=told) as caught:
        await tokenizer.guides(Shape("grammar", grammar, "guided_grammar"), 1)
    assert caught.value.param == "guided_grammar"


@pytest.mark.parametrize("pattern", ["(", "a(?=b)", r"a\b", r"(a)\1", "[z-a]", "*"])
async def test_what_is_no_expression_here_is_told_by_its_field(tokenizer: Tokenizer, pattern: str):
    told = "guided_regex has a pattern that is invalid or looks around"
    with pytest.raises(RequestInvalid, match=told) as caught:
        await tokenizer.guides(Shape("regex", pattern, "guided_regex"), 1)
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize(
    "pattern",
    [
        "(a?){4096}a{4096}",
        "(a|aa|aaa|b){1,8192}",
        "([ab]*a[ab]{400}c)+",
        "((((a{0,90}){0,90}){0,90}){0,90}){0,90}",
        r"(\p{L}|\p{N}|\w|[^x]){0,8192}z",
        "(.*a){64}",
    ],
)
async def test_a_hostile_expression_costs_its_request_and_little_else(pattern: str):
    tokenizer = demo_tokenizer()
    await tokenizer.guides(Shape("choice", '["a"]'), 1)
    began = time.process_time()
    with contextlib.suppress(RequestInvalid, EngineFault):
        (guide,) = await tokenizer.guides(Shape("regex", pattern, "guided_regex"), 1)
        no_mask_takes_long(guide, 200)
    assert time.process_time() - began < 4.0


async def test_a_choice_that_no_token_writes_is_refused():
    tokenizer = Tokenizer(hf("words"), max_model_len=512)
    with pytest.raises(RequestInvalid, match="guided_choice has choices"):
        await tokenizer.guides(Shape("choice", '["\U0001f98a"]', "guided_choice"), 1)
