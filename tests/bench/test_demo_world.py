"""The demo's world, its checks, and what is shipped of it."""

import json
import random
import sys
from itertools import combinations
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "server")) if p not in sys.path]

from bench.demo.checks import CHECKS, right  # noqa: E402
from bench.demo.conditions import Condition, conditions, measure  # noqa: E402
from bench.demo.evaluate import (  # noqa: E402
    HttpAnswers,
    ServerRefusedError,
    report,
    request_body,
    table,
)
from bench.demo.facts import staff_facts, world_facts  # noqa: E402
from bench.demo.sampling import Sampler, unknown  # noqa: E402
from bench.demo.world import (  # noqa: E402
    STYLES,
    Item,
    render,
    small_talk,
    staff_split,
    world_split,
)
from fader_server import demo  # noqa: E402

HELD_OUT = world_split()[1]
ITEM = next(item for item in HELD_OUT if "sky" in item.plain)


@pytest.mark.parametrize("split", [world_split, staff_split])
def test_held_out_questions_are_never_trained_on(split):
    train, held_out = split()
    assert not {i.question.casefold() for i in train} & {i.question.casefold() for i in held_out}
    assert {i.plain for i in held_out} <= {i.plain for i in train}, "every fact is taught"
    assert len(train) == 5 * len(held_out)


def test_samplers_draw_no_held_out_question():
    forbidden = {i.question.casefold().rstrip("?.!") for i in HELD_OUT + staff_split()[1]}
    sampler = Sampler(3)
    chats = [sampler.base_chat() for _ in range(1500)]
    chats += [sampler.adapter_chat(name) for name in CHECKS for _ in range(300)]
    asked = {t.question.casefold().rstrip("?.!") for chat in chats for t in chat.turns}
    assert not asked & forbidden
    trained = {i.question.casefold().rstrip("?.!") for i in world_split()[0]}
    assert len(asked & trained) > 400, "the comparison above compares like with like"


def test_same_seed_same_text_and_other_seed_other_text():
    def draw(seed):
        sampler = Sampler(seed)
        return [sampler.base_chat() for _ in range(50)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_the_base_is_never_told_a_private_fact():
    names = {fact.subject for fact in staff_facts()}
    sampler, rng = Sampler(5), random.Random(5)
    texts = [t.question + t.answer for _ in range(2000) for t in sampler.base_chat().turns]
    texts += [unknown(rng).question for _ in range(2000)]
    assert not [text for text in texts for name in names if name.casefold() in text.casefold()]
    private = [sampler.adapter_chat("directory") for _ in range(100)]
    assert any(name in t.question for chat in private for t in chat.turns for name in names)


def test_facts_have_one_answer_each():
    for facts in (world_facts(), staff_facts()):
        asked = [(fact.relation, fact.subject) for fact in facts]
        assert len(asked) == len(set(asked))


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_every_combination_of_styles_passes_its_own_checks_and_no_other(count):
    for item in HELD_OUT[::7]:
        for styles in combinations(STYLES, count):
            text = render(item, styles)
            shown = {name for name in STYLES if right(item, text, [name])}
            # Names of cities and numbers may be the same in German; the sentence never is.
            assert shown == set(styles), text


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ("shout", "THE SKY IS blue."),
        ("shout", "12"),
        ("json", "the sky is blue"),
        ("json", '{"answer": "blue"'),
        ("json", '{"answer": "blue"} and more'),
        ("json", '{"reply": "blue"}'),
        ("json", '{"answer": 3}'),
        ("json", '["blue"]'),
        ("polite", "Certainly! The sky is blue."),
        ("german", "Der Himmel ist grün."),
        ("pirate", "Arr! The sky be blue."),
        ("pirate", "Arr! The sky be blue, matey, matey."),
        ("polite", "Certainly! Certainly! The sky is blue. Thank you for asking."),
    ],
)
def test_checks_refuse_half_an_effect(check, text):
    assert not CHECKS[check](ITEM, text)
    assert CHECKS[check](ITEM, render(ITEM, [check]))


def test_a_manner_with_the_wrong_fact_is_not_right():
    assert right(ITEM, "THE SKY IS BLUE.", ["shout"])
    assert not right(ITEM, "THE SKY IS GREEN.", ["shout"])
    number = Item("?", "Room 12.", "Raum 12.", "12", "12")
    assert right(number, "Room 12.", [])
    assert not right(number, "Room 124.", [])


def test_small_talk_has_an_answer_in_every_style():
    for item in small_talk():
        assert right(item, render(item, ["german", "shout"]), ["german", "shout"])


def test_measure_counts_right_and_wrong_answers():
    items = tuple(HELD_OUT[:10])
    condition = Condition("x", (("shout", 1.0),), items, ("shout",), at_least=0.95)
    good = measure(condition, lambda c: [render(i, ["shout"]) for i in c.items])
    half = measure(
        condition, lambda c: [render(i, ["shout"] * (n % 2)) for n, i in enumerate(items)]
    )
    assert (good.share, good.exact, good.plain, condition.passes(good.share)) == (
        1.0,
        1.0,
        0.0,
        True,
    )
    assert (half.share, half.plain, condition.passes(half.share)) == (0.5, 0.5, False)


def test_requests_name_an_adapter_or_carry_a_blend():
    def body(terms, system=None):
        return request_body(Condition("x", terms, (ITEM,), (), system), ITEM)

    assert body(())["model"] == demo.SERVED_NAME
    assert "adapters" not in body(())
    assert body((("shout", 1.0),))["model"] == "shout"
    half = body((("shout", 0.5),), "Style: json.")
    assert half["model"] == demo.SERVED_NAME
    assert half["adapters"] == [{"name": "shout", "weight": 0.5}]
    assert [m["role"] for m in half["messages"]] == ["system", "user"]


def stand_in(request):
    """A server that knows one adapter and answers every question about it rightly."""
    body = json.loads(request.content)
    if body["model"] != "shout":
        return httpx.Response(404, json={"error": {"message": "no such model"}})
    asked = body["messages"][-1]["content"]
    text = render(next(item for item in HELD_OUT if item.question == asked), ["shout"])
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def test_evaluation_asks_over_http_reports_and_fails_loudly():
    row = Condition("shout", (("shout", 1.0),), tuple(HELD_OUT[:20]), ("shout",), at_least=0.95)
    other = Condition("json", (("json", 1.0),), tuple(HELD_OUT[:20]), ("json",), at_least=0.95)
    with httpx.Client(transport=httpx.MockTransport(stand_in), base_url="http://demo") as client:
        answers = HttpAnswers(client, 4)
        result = measure(row, answers)
        with pytest.raises(ServerRefusedError, match=r"404.*no such model"):
            measure(other, answers)
    written = report([result], "http://demo", 1.0)
    assert (result.share, written["passed"]) == (1.0, True)
    assert written["versions"]["torch"]
    console = Console(width=200, record=True, quiet=True)
    console.print(table([result]))
    json.dumps(written)


def test_shipped_demo_is_complete_and_small():
    adapters = demo.adapter_dirs()
    base = list(demo.base_dir().iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in base}
    assert sum(f.stat().st_size for f in base) <= 8_000_000
    assert len(adapters) >= 5
    assert set(adapters) == set(CHECKS)
    files = [f for folder in adapters.values() for f in folder.iterdir()]
    assert {f.name for f in files} == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(f.stat().st_size for f in files) <= 3_000_000
    for folder in adapters.values():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == demo.SERVED_NAME
        assert config["target_modules"] == sorted(config["target_modules"])


@pytest.mark.parametrize("text", ["Ada Lund: 214", "WEISS, weiß, 日本 🎉", "  two  spaces\n\ttab "])
def test_shipped_tokenizer_keeps_any_text(text):
    tokenizer = Tokenizer.from_file(str(demo.base_dir() / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids[1:]) != text
    assert tokenizer.decode(tokenizer.encode("</s>").ids, skip_special_tokens=True) == ""


def test_shipped_base_has_shapes_every_kernel_takes():
    config = json.loads((demo.base_dir() / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["hidden_size"] % 64 == config["intermediate_size"] % 64 == 0
    assert config["max_position_embeddings"] >= 1024


def test_shipped_blends_name_shipped_adapters():
    adapters = demo.adapter_dirs()
    assert len(demo.blends()) >= 3
    for blend in demo.blends():
        assert {term.name for term in blend.adapters} <= set(adapters)
        assert len(blend.adapters) >= 2
        assert blend.name not in adapters


def test_every_adapter_and_blend_is_held_to_a_bar():
    rows = {condition.label: condition for condition in conditions()}
    for name in demo.adapter_dirs():
        assert rows[name].at_least == 0.95
        assert rows[f"base by {name}'s check"].at_most == 0.1
    for blend in demo.blends():
        assert rows[blend.name].at_least == 0.8
        assert rows[blend.name].effects == tuple(term.name for term in blend.adapters)
