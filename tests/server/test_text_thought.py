"""Thoughts told apart from answers by tokens of a real tokenizer; guides wait for their end."""

import json
import random

import pytest

from fader_server.text.shape import Shape
from fader_server.text.thought import ThoughtGuide, all_but
from fader_server.text.tokenizer import Tokenizer
from tests.server.test_text_guides import PERSON, conforms, ids, walk
from tests.server.text_worlds import TEMPLATES, hf

MARKERS = ("<think>", "</think>")
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
ALWAYS = QWEN.replace(
    "<think>\n\n</think>\n\n{% endif %}{% endif %}", "{% endif %}<think>\n{% endif %}"
)
SHAPE = Shape("schema", json.dumps(PERSON))


def made(template=QWEN, family="byte_level", **more) -> Tokenizer:
    source = hf(family, template, structure=MARKERS)
    return Tokenizer(source, max_model_len=512, **more)


def chat(*contents, thought=""):
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    if thought:
        messages[1]["reasoning_content"] = thought
    return messages


def told(tokenizer: Tokenizer, said: str, prompt=(), cut=None) -> tuple[str, str]:
    """(thought, answer) of an output."""
    thought, stream = tokenizer.thought(prompt), tokenizer.stream()
    assert thought is not None
    parts, answer = [], ""
    for token in tokenizer.encode_prompt(said, special=False)[:cut]:
        part = thought.take(token)
        if part is None:
            answer += stream.feed(token).text
        else:
            parts.append(part)
    return "".join(parts) + thought.finish(), answer + stream.finish()


@pytest.mark.parametrize("family", ["byte_level", "llama", "gemma"])
def test_a_thought_and_its_answer_are_two_texts_without_the_breaks_between(family):
    tokenizer = made(family=family)
    said = "<think>\nsay\n\nhello\n</think>\n\nhello world"
    thought, answer = told(tokenizer, said)
    assert (thought.strip(" "), answer.strip(" ")) == ("say\n\nhello", "hello world")


def test_characters_of_several_tokens_stay_whole_on_either_side():
    assert told(made(), "<think>größe 你好 😀</think>😀 naïve") == ("größe 你好 😀", "😀 naïve")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("hello world", ("", "hello world")),
        ("hello <think> world</think>", ("", "hello <think> world</think>")),
        ("<think>a<think>b</think>c", ("a<think>b", "c")),
        ("<think></think>\n\nhello", ("", "hello")),
        ("<think>\n\n", ("", "")),
        ("<think>one</think>two</think>three", ("one", "two</think>three")),
    ],
)
def test_only_what_an_output_begins_with_is_thought(said, expected):
    assert told(made(), said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("<|channel>thought\nhello thought\n<channel|>\nworld", ("hello thought", "world")),
        ("<|channel>thoughtful<channel|>world", ("ful", "world")),
        ("<|channel>hello<channel|>world", ("hello", "world")),
        ("<|channel>tho<channel|>world", ("", "world")),
        ("<|channel>thought\n<channel|>world", ("", "world")),
        ("hello", ("", "hello")),
    ],
)
def test_a_label_behind_the_first_marker_is_no_part_of_a_thought(said, expected):
    names = ("<|channel>", "<channel|>")
    template = QWEN.replace(MARKERS[0], names[0]).replace(MARKERS[1], names[1])
    source = hf("byte_level", template, structure=names)
    assert told(Tokenizer(source, max_model_len=512), said) == expected


def test_a_thought_that_is_cut_off_is_all_there_is():
    assert told(made(), "<think>hello world", cut=3)[1] == ""
    assert told(made(), "hello", made(ALWAYS).encode_chat(chat("x"))) == ("hello", "")


def test_the_prompts_last_words_say_where_an_output_begins():
    tokenizer, always = made(), made(ALWAYS)
    assert told(tokenizer, "hello", tokenizer.encode_chat(chat("x"))) == ("", "hello")
    assert told(always, "a</think>\n\nb", always.encode_chat(chat("x"))) == ("a", "b")
    quiet = tokenizer.encode_chat(chat("x"), (), "none")
    assert told(tokenizer, "<think>a</think>b", quiet) == ("", "<think>a</think>b")


def test_thoughts_of_earlier_answers_do_not_count():
    tokenizer = made()
    prompt = tokenizer.encode_chat(chat("x", "y", "z", thought="hm"))
    assert tokenizer.decode(prompt).count("</think>") == 1
    assert told(tokenizer, "<think>a</think>b", prompt) == ("a", "b")


def test_past_thoughts_reach_templates_that_read_them_and_are_no_control_tokens():
    tokenizer = made()
    with_it = tokenizer.encode_chat(chat("x", "y", "z", thought="hm <|im_end|>"))
    without = tokenizer.encode_chat(chat("x", "y", "z"))
    assert "hm <|im_end|>" in tokenizer.decode(with_it)
    ends = tokenizer.encode_prompt("<|im_end|>", special=False)
    assert [with_it.count(token) for token in ends] == [without.count(token) for token in ends]
    deaf = made(TEMPLATES["chatml"])
    assert deaf.encode_chat(chat("x", "y", "z", thought="hm")) == deaf.encode_chat(
        chat("x", "y", "z")
    )


def test_past_thoughts_have_the_name_that_the_template_reads_them_by():
    for read in ("m.thinking", "m['thinking']"):
        named = made(QWEN.replace("m.reasoning_content", read))
        assert named.encode_chat(chat("x", "y", "z", thought="hm")) == made().encode_chat(
            chat("x", "y", "z", thought="hm")
        )
    switch = made(QWEN.replace("m.reasoning_content", "thinking"))
    assert "hm" not in switch.decode(switch.encode_chat(chat("x", "y", "z", thought="hm")))


def test_without_markers_or_where_the_operator_wants_none_nothing_is_told_apart():
    assert made(TEMPLATES["chatml"]).thought(()) is None  # the template has none
    source = hf("byte_level", QWEN)
    assert Tokenizer(source, max_model_len=9).thought(()) is None  # they are several tokens
    assert made(thoughts_apart=False).thought(()) is None
    assert made(thoughts_apart=False).thoughts_told == {"markers": "none"}
    assert made().thoughts_told == {"markers": "<think> … </think>"}


async def guide_of(tokenizer, prompt):
    (guide,) = await tokenizer.guides(SHAPE, 1)
    return guide, tokenizer.after_thought(guide, prompt)


async def test_a_guide_lets_a_thought_be_and_then_holds():
    tokenizer, rng = made(), random.Random(3)
    begin, end = (tokenizer.encode_prompt(m, special=False)[0] for m in MARKERS)
    for chosen in (True, False):
        bare, guide = await guide_of(tokenizer, tokenizer.encode_chat(chat("x")))
        assert set(ids(guide.allowed())) == {*ids(bare.allowed()), begin}
        if chosen:
            guide.accept(begin)
            free = set(ids(guide.allowed()))
            assert free == set(range(tokenizer.vocab_size)) - tokenizer.eos_ids
            for token in rng.sample(sorted(free - {end}), 20):
                guide.accept(token)
                assert not guide.ended
            guide.accept(end)
            assert ids(guide.allowed()) == ids(bare.allowed())
        said = tokenizer.decode(walk(guide, rng))
        assert guide.ended
        assert conforms(json.loads(said))


async def test_a_guide_begins_where_the_prompt_leaves_the_thought():
    always, rng = made(ALWAYS), random.Random(4)
    _, guide = await guide_of(always, always.encode_chat(chat("x")))
    assert len(ids(guide.allowed())) == always.vocab_size - len(always.eos_ids)
    guide.accept(always.encode_prompt("</think>", special=False)[0])
    assert conforms(json.loads(always.decode(walk(guide, rng))))
    quiet = made()
    bare, guide = await guide_of(quiet, quiet.encode_chat(chat("x"), (), "none"))
    assert guide is bare
    plain = made(thoughts_apart=False)
    bare, guide = await guide_of(plain, plain.encode_chat(chat("x")))
    assert guide is bare
    assert not isinstance(guide, ThoughtGuide)


def test_bits_are_set_for_all_but():
    assert ids(all_but(19, frozenset({0, 18}))) == list(range(1, 18))
    assert len(all_but(19, frozenset())) == 3
