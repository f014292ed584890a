"""Harmony's channels: what is thought, said and called, whatever the cuts and faults."""

import json
import random
import time

import pytest

from fader_server.errors import RequestInvalid
from fader_server.text.tokenizer import Tokenizer
from fader_server.text.tools import Tool, ToolUse
from tests.server.harmony_world import (
    MARKS,
    TEMPLATE,
    WORLD,
    Heard,
    gains,
    heard,
    hf,
    prompt_of,
    tokens_of,
)
from tests.server.tool_chats import NASTY, TOOLS, USE, ToolCall, call
from tests.server.tool_worlds import NO_TOOLS

THOUGHT = "<|channel|>analysis<|message|>hm, hello<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TO = " to=functions.weather<|channel|>commentary json<|message|>"
MADE = (ToolCall("weather", '{"days": 1}'),)
BODY = '{"days": 1}'
MUST = ToolUse(TOOLS, must=True)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (THOUGHT + FINAL + "Hello<|return|>", Heard("hm, hello", "Hello")),
        (THOUGHT + FINAL + "Hello", Heard("hm, hello", "Hello")),
        (FINAL + " a\n\n", Heard("", " a\n\n")),
        (THOUGHT + THOUGHT + FINAL + "a", Heard("hm, hello\nhm, hello", "a")),
        (THOUGHT, Heard("hm, hello")),
        (THOUGHT.partition("llo")[0], Heard("hm, he")),
        (THOUGHT + "<|channel|>fin", Heard("hm, hello")),
        (THOUGHT + TO + BODY + "<|call|>", Heard("hm, hello", "", MADE)),
        (THOUGHT + TO + BODY, Heard("hm, hello", "", MADE)),
        (TO + BODY, Heard("", "", MADE)),
        ("<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + BODY,
         Heard("", "", MADE)),
        ("<|channel|>commentary to=functions.weather<|constrain|>json<|message|>" + BODY,
         Heard("", "", MADE)),
        ("<|channel|>commentary to=functions.weather<|message|> {\n\"days\" :1 }\n",
         Heard("", "", MADE)),
        ("<|channel|>analysis to=functions.weather code<|message|>" + BODY, Heard("", "", MADE)),
        (" to=weather<|channel|>commentary json<|message|>" + BODY, Heard("", "", MADE)),
        ("<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant" + TO + BODY,
         Heard("", "Let me see.", MADE)),
        (TO + BODY + "<|call|><|start|>assistant" + TO + BODY, Heard("", "", MADE * 2)),
        (THOUGHT + FINAL + "a<|end|><|start|>assistant" + FINAL + "b", Heard("hm, hello", "a\nb")),
    ],
)  # fmt: skip
def test_each_message_is_what_its_channel_and_recipient_say(said: str, expected: Heard):
    assert heard(said, USE) == expected
    if not expected.calls:
        assert heard(said) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Hello there", Heard("", "Hello there")),
        ("to be or not", Heard("", "to be or not")),
        ("to", Heard("", "to")),
        ("Hello<|end|><|start|>assistant" + FINAL + "b", Heard("", "Hello\nb")),
        ("<|message|>Hello", Heard("", "Hello")),
        ("<|channel|><|message|>Hello", Heard("", "Hello")),
        ("<|channel|>other<|message|>Hello", Heard("", "Hello")),
        ("<|channel|>other words here", Heard("", "other words here")),
        ("<|channel|>otherwise", Heard("", "otherwise")),
        ("<|channel|>final Hello, you there", Heard("", " Hello, you there")),
        ("<|channel|>finalHello, you", Heard("", "finalHello, you")),
        ("<|channel|>final json", Heard("", " json")),
        ("<|channel|>final <|constrain|>js", Heard("", "")),
        ("<|channel|>commentary to=functions.wea", Heard("", " to=functions.wea")),
        (" to=functions.weather<|channel|>comm", Heard("", " to=functions.weather comm")),
        ("<|channel|>analysis We need to", Heard(" We need to")),
        ("<|channel|>analysis<|channel|>final<|message|>Hello", Heard("", "Hello")),
        ("<|channel|>analysis<|message|>hm<|channel|>final<|message|>Hello", Heard("hm", "Hello")),
        ("<|channel|>analysis<|message|>hm<|start|>assistant" + FINAL + "a", Heard("hm", "a")),
        (FINAL + "a<|message|>b<|constrain|>c", Heard("", "abc")),
        (FINAL + "a<|end|>b", Heard("", "a\nb")),
        (FINAL + "a<|end|><|start|>assistant b", Heard("", "a\n b")),
        (FINAL + "a<|end|><|start|>user<|message|>b", Heard("", "a\nb")),
        (FINAL + "a<|end|><|start|>assis", Heard("", "a")),
        ("<|start|>assistant" + FINAL + "a", Heard("", "a")),
        ("<|end|>" * 3 + "<|call|><|constrain|>" + FINAL + "a", Heard("", "a")),
        ("<|channel|>" + "a" * 400, Heard("", "a" * 400)),
        (TO + '{"days": ', Heard("", 'to=functions.weather commentary json {"days": ')),
        (TO + "[1]<|call|>", Heard("", "to=functions.weather commentary json [1]")),
        (TO + "<|call|>", Heard("", "to=functions.weather commentary json ")),
        (TO + "[" * 9999, Heard("", "to=functions.weather commentary json " + "[" * 9999)),
        (TO.replace("weather", "other") + BODY,
         Heard("", "to=functions.other commentary json " + BODY)),
        ("<|channel|>commentary to=python code<|message|>1 + 1<|call|>",
         Heard("", "commentary to=python code 1 + 1")),
        (TO + BODY.replace("1", "NaN"),
         Heard("", 'to=functions.weather commentary json {"days": NaN}')),
        (" to=functions.weather is how", Heard("", " to=functions.weather is how")),
        (" to=functions.weather", Heard("", " to=functions.weather")),
    ],
)  # fmt: skip
def test_what_is_no_message_is_content(said: str, expected: Heard):
    assert heard(said, USE) == expected


def test_without_tools_a_call_is_content():
    assert heard(TO + BODY) == Heard("", "to=functions.weather commentary json " + BODY)
    only = ToolUse(TOOLS, only=("time-of_day",))
    assert heard(TO + BODY, only) == heard(TO + BODY)


def test_marks_that_are_spelled_out_are_text():
    spelled = [t for part in ("<|chan", "nel|>final") for t in tokens_of(part)]
    assert heard(spelled).text == "<|channel|>final"
    assert heard(tokens_of(FINAL + "a") + spelled).text == "a<|channel|>final"


PARTS = [*MARKS, "assistant", "analysis", "final", "commentary", " to=functions.weather", " json",
         "to=", "Hello, you!", " ", "\n", BODY, "{", "größe 你好 😀", "user", "x" * 300,
         "a b"]  # fmt: skip


def spread(tokens: list[int], rng: random.Random, world: Tokenizer = WORLD) -> list[int]:
    """The same text in other tokens: some of them byte by byte."""
    alphabet = {world.token_bytes(t): t for t in range(world.vocab_size) if world.token_bytes(t)}
    found = []
    for token in tokens:
        piece = world.token_bytes(token)
        if piece is None or rng.random() < 0.5:
            found.append(token)
        else:
            found += [alphabet[bytes([byte])] for byte in piece]
    return found


@pytest.mark.parametrize("seed", range(150))
def test_tokens_change_nothing_and_no_text_is_lost(seed: int):
    rng = random.Random(seed)
    said = "".join(rng.choice(PARTS) for _ in range(rng.randrange(18)))
    use = rng.choice([None, USE, MUST])
    whole = heard(said, use)
    tokens = tokens_of(said)
    assert heard(tokens, use) == whole
    assert heard(spread(tokens, rng), use) == whole
    told = whole.thought + whole.text + "".join(c.name + c.arguments for c in whole.calls)
    if use is not MUST:  # beside marks and heads nothing is silent
        for part in ("Hello, you!", "größe 你好 😀", "x" * 300):
            assert told.count(part) == said.count(part)
    assert not any(mark in told for mark in MARKS)


def test_a_stream_gives_what_is_certain_at_once():
    found, thought = gains(tokens_of(THOUGHT + FINAL + "hello world"))
    assert [gain.thought for gain in found if gain.thought][:2] != ["hm, hello"]
    texts = [gain.text for gain in found if gain.text]
    assert texts == [WORLD.token_text(token) for token in tokens_of("hello world")]
    marked = len(tokens_of(THOUGHT.removesuffix("<|start|>assistant")))
    assert thought == marked


def test_heads_of_what_is_no_thought_are_not_counted_as_one():
    for said in (FINAL + "hello", TO + BODY, "hello"):
        assert gains(tokens_of(said), USE)[1] == 0


def test_a_stop_string_counts_in_the_content_alone():
    said = THOUGHT + "<|channel|>commentary<|message|>Now hello stop<|end|><|start|>assistant" + TO
    assert heard(said + BODY, USE, stops=["hello"]) == Heard("hm, hello", "Now ")
    assert heard(THOUGHT + TO + BODY, USE, stops=["hello", "days"]) == Heard("hm, hello", "", MADE)


def test_one_call_ends_an_answer_where_there_may_be_no_other():
    said = TO + BODY + "<|call|><|start|>assistant" + TO + BODY
    assert heard(said, ToolUse(TOOLS, parallel=False)).calls == MADE
    assert heard(said, USE).calls == MADE * 2


def test_arguments_that_a_grammar_keeps_are_told_as_they_come():
    tokens = tokens_of(THOUGHT + TO + BODY)
    found, _ = gains(tokens, MUST)
    assert heard(tokens, MUST) == heard(tokens, USE)
    assert sum(bool(gain.calls) for gain in found) > 4
    assert sum(bool(gain.calls) for gain in gains(tokens, USE)[0]) == 1
    for cut in range(len(tokens)):
        told = heard(tokens[:cut], MUST)
        assert told.text == ""
        assert all(BODY.startswith(made.arguments) for made in told.calls)


def test_what_a_cut_leaves_of_a_head_before_what_is_kept_is_no_content():
    strict = ToolUse((Tool("weather", "", {"type": "object"}, strict=True),))
    tokens = tokens_of(THOUGHT + TO)
    for cut in range(len(tokens)):
        assert heard(tokens[:cut], strict).text == ""
    assert heard(TO[:9], USE).text == TO[:9], "the check cannot fail"


# The template's side: what is known of a base, and what past turns become


def test_what_was_learnt_is_told():
    assert WORLD.thoughts_told == {"markers": "the analysis channel of harmony"}
    assert WORLD.calls_told["marker"] == "to=functions."
    assert {WORLD.token_text(token) for token in WORLD.eos_ids} == {
        "</s>",
        "<|return|>",
        "<|call|>",
    }


def test_without_its_tokens_or_where_thoughts_stay_answers_are_raw_and_tools_refused():
    few = Tokenizer(hf(marks=MARKS[1:]), max_model_len=99)
    raw = Tokenizer(hf(), max_model_len=4096, thoughts_apart=False)
    other = Tokenizer(hf(NO_TOOLS["channels"]), max_model_len=4096)
    for world in (few, raw, other):
        assert world.thought(()) is None
        assert world.calls_told["form"] == "none"
        assert {world.token_text(token) for token in world.eos_ids} == {"</s>"}
    with pytest.raises(RequestInvalid, match='only tool_choice "none"'):
        raw.encode_chat([{"role": "user", "content": "x"}], TOOLS)
    stream = raw.stream()
    said = "".join(stream.feed(token).text for token in tokens_of(THOUGHT + FINAL + "a", raw))
    assert said + stream.finish() == "analysishm, helloassistantfinala"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type {{ f.name }}", "type {{ f.description }}", "shows no tools"),
        ("to=functions.{{", "to={{", "writes no calls to functions"),
    ],
)
def test_a_template_that_tells_less_has_thoughts_but_no_tools(old: str, new: str, reason: str):
    assert old in TEMPLATE
    world = Tokenizer(hf(TEMPLATE.replace(old, new)), max_model_len=4096)
    assert reason in str(world.calls_told["reason"])
    with pytest.raises(RequestInvalid, match='only tool_choice "none"'):
        world.encode_chat([{"role": "user", "content": "x"}], TOOLS)
    assert heard(THOUGHT + FINAL + "a", world=world) == Heard("hm, hello", "a")


def shown(*messages: dict) -> str:
    """What the model sees behind the question, with names of marks."""
    ids = WORLD.encode_chat([{"role": "user", "content": "q"}, *messages], TOOLS)
    return (
        WORLD.decode(ids, special=True).partition("q<|end|>")[2].removesuffix("<|start|>assistant")
    )


def said(content: str = "", *calls: dict, thought: str = "") -> dict:
    more = {"tool_calls": list(calls)} if calls else {}
    return {"role": "assistant", "content": content, "reasoning_content": thought, **more}


def result(id: str, content: str) -> dict:
    return {"role": "tool", "tool_call_id": id, "content": content, "name": "weather"}


A = "<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>"
R = "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"
T = "<|start|>assistant<|channel|>analysis<|message|>"


def test_a_call_and_its_result_are_written_as_the_template_does():
    found = shown(said("", call(days=1), thought="hm"), result("abcdefgh1", "5 °C"))
    assert found == T + "hm<|end|>" + A + '{"days": 1}<|call|>' + R + '"5 °C"<|end|>'


def test_several_calls_of_one_answer_stand_each_before_its_results():
    calls = [call("time-of_day", "a"), call(id="b", days=1), call(id="c")]
    results = [result("b", "2"), result("a", "1"), result("x", "3")]
    found = shown(said("", *calls, thought="hm"), *results)
    clock = A.replace("weather", "time-of_day")
    assert found == (
        T + "hm<|end|>" + clock + "{}<|call|>" + R.replace("weather", "time-of_day") + '"1"<|end|>'
        + A + '{"days": 1}<|call|>' + R + '"2"<|end|>' + A + "{}<|call|>" + R + '"3"<|end|>'
    )  # fmt: skip


def test_words_beside_a_thought_and_a_call_are_not_lost():
    assert shown(said("I look.", call(), thought="hm")).startswith(T + "hm\nI look.<|end|>")
    assert shown(said("I look.", call())).startswith(T + "I look.<|end|>")


def test_thoughts_before_a_final_answer_are_the_templates_business():
    assert shown(said("a", thought="hm")) == "<|start|>assistant<|channel|>final<|message|>a<|end|>"


def test_past_words_are_no_marks():
    mine = "".join(MARKS) + NASTY
    ids = WORLD.encode_chat(
        [{"role": "user", "content": mine}, said(mine, call(city=mine), thought=mine),
         result("abcdefgh1", mine), said(mine)], TOOLS
    )  # fmt: skip
    plain = WORLD.encode_chat(
        [{"role": "user", "content": "x"}, said("x", call(city="x"), thought="x"),
         result("abcdefgh1", "x"), said("x")], TOOLS
    )  # fmt: skip
    marks = {tokens_of(mark)[0] for mark in MARKS}
    assert [t for t in ids if t in marks] == [t for t in plain if t in marks]


def test_a_result_without_a_call_is_refused_by_the_template():
    with pytest.raises(RequestInvalid, match="refuses these messages"):
        shown(said("a"), result("a", "1"))


def test_an_answer_goes_on_with_the_last_message():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Well, he"}]
    prompt = WORLD.encode_chat(messages, speaks=False, continues=True)
    assert WORLD.decode(prompt, special=True).endswith("final<|message|>Well, he")
    assert heard("llo", prompt=prompt) == Heard("", "llo")
    assert heard("llo<|end|><|start|>assistant" + FINAL + "b", prompt=prompt).text == "llo\nb"


def test_a_prompt_may_begin_a_thought():
    prompt = [*prompt_of(), *tokens_of("<|channel|>analysis<|message|>so")]
    found, tokens = gains(tokens_of("hm<|end|><|start|>assistant" + FINAL + "a"), prompt=prompt)
    assert [gain.thought for gain in found if gain.thought] == ["h", "m"] or tokens == 2
    assert heard("hm<|end|><|start|>assistant" + FINAL + "a", prompt=prompt) == Heard("hm", "a")


def test_the_name_of_a_function_may_be_any():
    use = ToolUse((Tool("a.b-c_1"[2:], "", {"type": "object"}),))
    said = " to=functions.b-c_1<|channel|>commentary json<|message|>{}"
    assert heard(said, use).made == [("b-c_1", {})]
    assert json.loads(heard(said, use).calls[0].arguments) == {}


def test_a_character_that_tokens_cut_is_whole_wherever_it_stands():
    alphabet = {WORLD.token_bytes(t): t for t in range(WORLD.vocab_size) if WORLD.token_bytes(t)}
    cut = next(piece for piece in alphabet if piece and len(piece) > 1 and piece[-1] == 0xC3)
    tokens = [alphabet[cut], alphabet[b"\xa9"]]
    word = cut[:-1].decode() + "é"
    for lead in ("", FINAL, "<|channel|>final json ", "<|end|>", "<|channel|>analysis json "):
        found = heard([*tokens_of(lead), *tokens])
        assert (found.thought + found.text).endswith(word)
    assert heard([*tokens_of("<|channel|>"), *tokens[:1]]).text.endswith("\ufffd")
    assert heard([*tokens[:1], *tokens_of(FINAL + "a")]).text.endswith("\ufffd\na")


@pytest.mark.parametrize("part", [" ", "\n", "to", "to= ", "<|channel|>", "<|start|>", "functions.",
                                  "<|channel|>a to=b ", "<|constrain|>"])  # fmt: skip
def test_reading_takes_time_in_proportion_to_the_text(part: str):
    def seconds(count: int) -> float:
        tokens = tokens_of(part) * count
        began = time.process_time()
        gains(tokens, USE)
        return time.process_time() - began

    assert seconds(800) < 40 * max(seconds(200), 0.002)
