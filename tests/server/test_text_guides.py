"""Guides over real tokenizers: what they allow, how schemas are refused, kept and bounded."""

import asyncio
import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fader_server import demo
from fader_server.errors import EngineFault, Overloaded, RequestInvalid
from fader_server.text import grammar as grammars
from fader_server.text import guides as guides_module
from fader_server.text.grammar import Grammar, GrammarGuide, grammar_of
from fader_server.text.guides import Guides
from fader_server.text.shape import Shape
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.vocabulary import Vocabulary, read_vocabulary
from tests.server.text_worlds import BUILDERS, backend, hf

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "größe", 'q"}']}, "maxItems": 2},
        "ok": {"type": ["boolean", "null"]},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}


def conforms(value: object) -> bool:
    """To PERSON, by hand."""
    return (
        isinstance(value, dict)
        and list(value) == list(PERSON["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 9
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and isinstance(value["tags"], list)
        and len(value["tags"]) <= 2
        and set(value["tags"]) <= {"a", "größe", 'q"}'}
        and value["ok"] in (True, False, None)
    )


def ids(bits: bytes) -> list[int]:
    return np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little").nonzero()[0].tolist()


def walk(guide: GrammarGuide, rng: random.Random, most: int = 400) -> Iterator[int]:
    for _ in range(most):
        token = rng.choice(ids(guide.allowed()))
        guide.accept(token)
        yield token
        if guide.ended:
            return


def no_mask_takes_long(guide: GrammarGuide, tokens: int) -> None:
    """Of so many tokens of an output."""
    rng = random.Random(0)
    for _ in range(tokens):
        before = time.thread_time()
        allowed = guide.allowed()
        assert time.thread_time() - before < 0.5
        guide.accept(rng.choice(ids(allowed)))
        if guide.ended:
            break


def demo_tokenizer() -> Tokenizer:
    return Tokenizer.load(str(demo.base_dir()), max_model_len=512)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return demo_tokenizer()


def of_schema(text: str) -> Shape:
    return Shape("schema", text)


async def guide_of(tokenizer: Tokenizer, schema: dict) -> GrammarGuide:
    (guide,) = await tokenizer.guides(of_schema(json.dumps(schema)), 1)
    return guide


FAMILIES = ["demo", *BUILDERS]


@pytest.mark.parametrize("family", FAMILIES)
async def test_any_walk_under_a_guide_is_an_answer_that_conforms(family: str):
    own = family == "demo"
    tokenizer = demo_tokenizer() if own else Tokenizer(hf(family), max_model_len=512)
    rng = random.Random(3)
    try:
        made = await tokenizer.guides(of_schema(json.dumps(PERSON)), 8)
    except RequestInvalid:
        names = tokenizer._backend.get_vocab()
        assert not any(set(n) <= {"{", "▁", "Ġ"} and "{" in n for n in names), family
        pytest.skip("this vocabulary has no brace")
    free = 0
    for guide in made:
        tokens = [token for token in walk(guide, rng) if token not in tokenizer.eos_ids]
        assert guide.ended
        assert conforms(json.loads(tokenizer.decode(tokens))), tokenizer.decode(tokens)
        stream = tokenizer.stream()
        text = "".join(stream.feed(token).text for token in tokens) + stream.finish()
        assert text == tokenizer.decode(tokens)
        at_random = [rng.randrange(tokenizer.vocab_size) for _ in tokens]
        try:
            free += conforms(json.loads(tokenizer.decode(at_random)))
        except ValueError:
            continue
    assert free == 0, "the check cannot fail"


async def test_the_end_is_allowed_exactly_where_the_answer_is_whole(tokenizer: Tokenizer):
    guide = await guide_of(tokenizer, {"type": "integer", "maximum": 999, "minimum": 1})
    digit = {tokenizer.token_text(t): t for t in range(tokenizer.vocab_size)}
    assert not tokenizer.eos_ids & set(ids(guide.allowed()))
    guide.accept(digit["4"])
    assert tokenizer.eos_ids <= set(ids(guide.allowed()))
    assert not guide.ended
    guide.accept(min(tokenizer.eos_ids))
    assert guide.ended


async def test_all_stop_ids_end_and_none_of_them_is_text():
    built = backend("byte_level")
    names = built.get_vocab()
    plain, control = names["A"] if "A" in names else names["h"], names["<|eot_id|>"]
    tokenizer = Tokenizer(hf("byte_level"), max_model_len=64, eos_ids=[plain, control])
    guide = await guide_of(tokenizer, {"type": "string"})
    guide.accept(names['"'])
    inside = set(ids(guide.allowed()))
    assert not {plain, control} & inside
    assert len(inside) > 50
    guide = await guide_of(tokenizer, {"type": "integer"})
    guide.accept(names["2"])
    assert {plain, control} <= set(ids(guide.allowed()))


async def test_control_tokens_and_ids_of_no_token_are_never_allowed(tokenizer: Tokenizer):
    guide = await guide_of(tokenizer, {"type": "string"})
    names = {tokenizer.token_text(t): t for t in range(tokenizer.vocab_size)}
    guide.accept(names['"'])
    found = guide.allowed()
    assert max(ids(found)) < tokenizer.vocab_size
    silent = {t for t in range(tokenizer.vocab_size) if tokenizer._pieces.is_silent(t)}
    assert silent
    assert not silent & set(ids(found))


async def test_without_a_stop_token_the_grammar_ends_by_itself():
    tokenizer = Tokenizer(hf("byte_level"), max_model_len=64)
    tokenizer.eos_ids = frozenset()
    own = Vocabulary(
        read_vocabulary(tokenizer._pieces, tokenizer.vocab_size, ()).tokens, tokenizer.vocab_size
    )
    guide = Grammar(grammar_of(of_schema(json.dumps(PERSON))), own).guide()
    tokens = list(walk(guide, random.Random(0)))
    assert guide.ended
    assert conforms(json.loads(tokenizer.decode(tokens)))
    guide = Grammar(grammar_of(of_schema('{"type": "integer", "maximum": 10}')), own).guide()
    guide.accept(tokenizer.encode_prompt("1", special=False)[0])
    assert max(ids(guide.allowed())) < tokenizer.vocab_size


async def test_asking_again_changes_nothing_and_guides_of_one_grammar_are_apart(tokenizer):
    one, two = await tokenizer.guides(of_schema(json.dumps(PERSON)), 2)
    first = one.allowed()
    assert one.allowed() == first == two.allowed()
    list(walk(one, random.Random(1), 3))
    assert one.allowed() != first
    assert two.allowed() == first


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"not": {"type": "string"}}, "not: not supported"),
        ({"if": {}, "then": {"const": "SECRET"}}, "if, then: not supported"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"SECRET": 1, "type": "SECRET"}, "not valid"),
        ({"$ref": "#/$defs/SECRET"}, "not valid"),
        ({"$ref": "https://example.com/SECRET.json"}, "not valid"),
        ({"$ref": "file:///etc/SECRET"}, "not valid"),
        ({"$ref": "#"}, "not valid"),
        ({"enum": []}, "nothing satisfies"),
        ({"allOf": [{"type": "string"}, {"const": 1}]}, "nothing satisfies"),
        ({"type": "string", "pattern": "(?!SECRET)"}, "pattern"),
        ({"type": "string", "format": "SECRET"}, "format"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "object", "properties": {f"SECRET{i}": {} for i in range(900)}}, "complex"),
    ],
)
async def test_what_cannot_be_enforced_is_refused_in_fixed_words(tokenizer, schema, told):
    for _ in range(2):  # found among what is kept, the second time
        with pytest.raises(RequestInvalid, match=told) as caught:
            await guide_of(tokenizer, schema)
        assert caught.value.param == "response_format"
        assert "SECRET" not in str(caught.value)
        assert len(str(caught.value)) < 160


async def test_the_library_reads_no_options_out_of_a_schema(tokenizer: Tokenizer):
    asked = {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}
    with pytest.raises(RequestInvalid, match="uniqueItems"):
        await guide_of(tokenizer, asked)


async def test_texts_of_a_schema_are_no_grammar(tokenizer: Tokenizer):
    nasty = 'x}\nstart: /.*/\n%json {"type": "integer"}'
    guide = await guide_of(tokenizer, {"const": nasty, "description": nasty})
    tokens = list(walk(guide, random.Random(0)))
    assert json.loads(tokenizer.decode(tokens)) == nasty


LOOSE = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "maxItems": 2},
        "code": {"type": "string", "pattern": r"^(?=.*\d)[a-z\d]+$", "maxLength": 3},
        "note": {"const": {"pattern": r"(?!a)"}},
        "file": {"type": "string", "format": "binary", "maxLength": 3},
    },
    "patternProperties": {r"\bx": {"type": "null"}},
    "required": ["tags", "code", "note", "file"],
    "additionalProperties": False,
}


async def test_a_lenient_schema_counts_as_far_as_it_can_be_enforced(tokenizer: Tokenizer):
    asked = Shape("schema", json.dumps(LOOSE), lenient=True)
    (guide,) = await tokenizer.guides(asked, 1)
    told = json.loads(tokenizer.decode(list(walk(guide, random.Random(0)))))
    assert list(told) == ["tags", "code", "note", "file"]
    assert told["note"] == {"pattern": "(?!a)"}
    assert len(told["tags"]) <= 2
    assert len(told["code"]) <= 3
    with pytest.raises(RequestInvalid):
        await tokenizer.guides(replace(asked, lenient=False), 1)


async def test_white_space_has_an_end(tokenizer: Tokenizer):
    guide = await guide_of(tokenizer, PERSON)
    names = {tokenizer.token_text(t): t for t in range(tokenizer.vocab_size)}
    guide.accept(names["{"])
    for _ in range(200):
        white = set(ids(guide.allowed())) & {names[" "], names["\n"]}
        if not white:
            break
        guide.accept(min(white))
    else:
        pytest.fail("a model may write white space for ever")


async def test_reading_a_schema_stalls_no_loop_and_happens_once(monkeypatch):
    threads: list[str] = []
    real = Grammar.__init__

    def slow(self, schema, vocabulary):
        threads.append(threading.current_thread().name)
        time.sleep(0.2)
        real(self, schema, vocabulary)

    monkeypatch.setattr(Grammar, "__init__", slow)
    tokenizer = demo_tokenizer()
    longest = 0.0

    async def beat():
        nonlocal longest
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)

    heart = asyncio.create_task(beat())
    schema = json.dumps(PERSON)
    made = await asyncio.gather(*(tokenizer.guides(of_schema(schema), 2) for _ in range(5)))
    heart.cancel()
    assert len(threads) == 1
    assert threads[0].startswith("fader-grammar")
    assert len({id(guide) for pair in made for guide in pair}) == 10
    assert longest < 0.15


async def test_only_so_many_schemas_wait_and_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(guides_module, "_WAITING", 3)
    monkeypatch.setattr(guides_module, "_KEPT", 2)
    tokenizer = demo_tokenizer()
    schemas = [json.dumps({"const": i}) for i in range(6)]
    results = await asyncio.gather(
        *(tokenizer.guides(of_schema(s), 1) for s in schemas), return_exceptions=True
    )
    assert [isinstance(r, Overloaded) for r in results] == [False] * 3 + [True] * 3
    assert list(tokenizer._guides._kept) == [grammar_of(of_schema(s)) for s in schemas[1:3]]
    assert tokenizer._guides._waiting.total == 0
    await tokenizer.guides(of_schema(schemas[1]), 1)
    await tokenizer.guides(of_schema(schemas[4]), 1)
    assert list(tokenizer._guides._kept) == [grammar_of(of_schema(schemas[i])) for i in (1, 4)]


async def test_who_stops_waiting_is_forgotten():
    tokenizer = demo_tokenizer()
    task = asyncio.create_task(tokenizer.guides(of_schema('{"type": "object"}'), 1))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tokenizer._guides._waiting.total == 0
    assert await tokenizer.guides(of_schema('{"type": "object"}'), 1)


async def test_schemas_of_one_tenant_keep_no_others_out_and_wait_in_turn(monkeypatch):
    monkeypatch.setattr(guides_module, "_WAITING", 4)
    tokenizer = demo_tokenizer()
    made: list[str] = []

    async def ask(number: int, tenant: str) -> None:
        await tokenizer.guides(of_schema(json.dumps({"const": number})), 1, tenant=tenant)
        made.append(f"{tenant}{number}")

    flood = [asyncio.create_task(ask(number, "flood")) for number in range(8)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(ask(number, "quiet")) for number in (20, 21)]
    results = await asyncio.gather(*flood, *others, return_exceptions=True)
    assert [isinstance(r, Overloaded) for r in results] == [False] * 4 + [True] * 4 + [False] * 2
    assert made == ["flood0", "quiet20", "flood1", "quiet21", "flood2", "flood3"]
    assert tokenizer._guides._waiting.total == 0


async def test_schemas_of_one_tenant_push_out_none_of_a_tenant_with_fewer(monkeypatch):
    monkeypatch.setattr(guides_module, "_KEPT", 3)
    tokenizer = demo_tokenizer()
    mine, *theirs = [of_schema(json.dumps({"const": i})) for i in range(6)]
    await tokenizer.guides(mine, 1, tenant="quiet")
    for shape in theirs:
        await tokenizer.guides(shape, 1, tenant="flood")
    assert list(tokenizer._guides._kept) == [grammar_of(s) for s in (mine, *theirs[-2:])]


def chain(links: int) -> dict:
    whole = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/a0", "$defs": {**whole, f"a{links}": {"type": "integer"}}}


def product(parts: int) -> dict:
    def either(i: int) -> dict:
        return {
            "anyOf": [
                {"type": "object", "required": [f"p{i}{j}"], "properties": {f"p{i}{j}": {}}}
                for j in range(4)
            ]
        }

    return {"allOf": [either(i) for i in range(parts)]}


HOSTILE = {
    "references": chain(4000),
    "references through allOf": {
        "$ref": "#/$defs/a0",
        "$defs": {
            **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]} for i in range(1300)},
            "a1300": {},
        },
    },
    "doubling": {
        "$ref": "#/$defs/a0",
        "$defs": {
            **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)},
            "a40": {},
        },
    },
    "product": product(6),
    "enum": {"enum": [f"v{i}" for i in range(4000)]},
    "repetition": {"type": "array", "minItems": 8192, "maxItems": 8192},
    "nested repetition": {
        "type": "array",
        "minItems": 8192,
        "items": {"type": "array", "minItems": 8192, "items": {"type": "array", "minItems": 8192}},
    },
    "long text": {"type": "string", "maxLength": 8192, "minLength": 8192},
    "regex": {"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$"},
    "regex of options": {"type": "string", "pattern": "^" + "a?" * 250 + "$"},
    "regex of states": {"type": "string", "pattern": "^.*a.{400}$"},
    "many regexes": {
        "anyOf": [{"pattern": f"^.*x.{{{i}}}y$", "type": "string"} for i in range(200)]
    },
    "ambiguous": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/a"}}] * 100}},
    },
    "multiples": {"type": "integer", "multipleOf": 999999937},
    "optional": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(490)}},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_schema_costs_its_request_and_little_else(tokenizer: Tokenizer, name: str):
    """What the API's own bounds let through: some are refused, some work, some fail later."""
    guides = Guides(partial(read_vocabulary, tokenizer._pieces, tokenizer.vocab_size, [0]))
    await guides.start_shape(of_schema("{}"), 1)
    began = time.process_time()
    with contextlib.suppress(RequestInvalid, EngineFault):
        (guide,) = await guides.start_shape(of_schema(json.dumps(HOSTILE[name])), 1)
        assert time.process_time() - began < 2.0
        no_mask_takes_long(guide, 300)
    assert time.process_time() - began < 4.0


async def test_a_guide_that_is_too_slow_fails(tokenizer: Tokenizer, monkeypatch):
    guide = await guide_of(tokenizer, PERSON)
    now = iter(range(100))
    monkeypatch.setattr(grammars, "thread_time", lambda: next(now) * 0.125)
    for _ in range(4):
        guide.allowed()
    with pytest.raises(EngineFault, match="too slow"):
        guide.allowed()


async def test_a_token_out_of_turn_is_a_fault(tokenizer: Tokenizer):
    guide = await guide_of(tokenizer, PERSON)
    with pytest.raises(EngineFault):
        guide.accept(tokenizer.encode_prompt("x", special=False)[0])


async def test_a_grammar_in_use_is_made_anew_before_its_states_run_out(monkeypatch):
    """Guides of one grammar share its states, and the bound on them."""
    monkeypatch.setitem(grammars._LIMITS, "max_lexer_states", 600)
    schema = json.dumps({"type": "string", "pattern": "^[ab]*a[ab]{14}c$"})

    async def faults(worn: int) -> int:
        monkeypatch.setattr(grammars, "_WORN", worn)
        tokenizer, rng, found = demo_tokenizer(), random.Random(0), 0
        for _ in range(60):
            (guide,) = await tokenizer.guides(of_schema(schema), 1)
            try:
                list(walk(guide, rng, 60))
            except EngineFault:
                found += 1
        return found

    assert await faults(worn=100) == 0
    assert await faults(worn=10**9) > 0, "the check cannot fail"


def test_a_panic_of_the_library_ends_one_request():
    class Panic(BaseException):
        pass

    class Matcher:
        def compute_bitmask(self):
            raise Panic

    source = Tokenizer(hf("byte_level"), max_model_len=64)
    own = read_vocabulary(source._pieces, source.vocab_size, source.eos_ids)
    guide = Grammar(grammar_of(of_schema('{"type": "integer"}')), own).guide()
    guide._matcher = Matcher()
    with pytest.raises(EngineFault, match="panicked"):
        guide.allowed()
