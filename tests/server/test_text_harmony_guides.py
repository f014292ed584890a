"""Answers in harmony's channels under a guide: thoughts are free, calls and content conform."""

import json
import random

import pytest

from fader_server.core import Guide
from fader_server.errors import RequestInvalid
from fader_server.text.shape import Shape
from fader_server.text.tools import ToolUse
from tests.server.harmony_world import WORLD, heard, prompt_of, tokens_of
from tests.server.test_text_guides import ids
from tests.server.test_text_tool_guides import STRICT, TOOLS, conforms, walk, write

THOUGHT = "<|channel|>analysis<|message|>hm, hello<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CLOCK = '{"zone": "utc"}'
CALLS = (
    " to=functions.clock<|channel|>commentary json<|message|>",
    "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.clock json<|message|>",
)
SHAPE = Shape("schema", '{"type": "object", "properties": {"a": {"type": "boolean"}}, '
              '"required": ["a"], "additionalProperties": false}')  # fmt: skip
END = tokens_of("<|end|>")[0]


async def guide_of(use: ToolUse | None, shape: Shape | None = None, *, prompt: str = "") -> Guide:
    """For an answer behind a prompt that ends with these words."""
    if use is None:
        assert shape is not None
        made = await WORLD.guides(shape, 1, chat=True)
    else:
        found = await WORLD.tool_guides(use, shape, 1)
        assert found is not None
        made = found
    return WORLD.after_thought(made[0], [*prompt_of(), *tokens_of(prompt)])


@pytest.mark.parametrize("tools", [TOOLS, STRICT])
async def test_what_must_call_thinks_calls_once_and_says_nothing(tools):
    thoughts = 0
    for seed, use in enumerate(
        [*(ToolUse(tools, must=True),) * 9, *(ToolUse(tools, must=True, only=("clock",)),) * 3]
    ):
        guide = await guide_of(use)
        tokens = walk(WORLD, guide, random.Random(seed), often=END)
        found = heard(tokens, use)
        assert guide.ended
        assert found.text == ""
        ((name, given),) = found.made
        assert conforms(name, given)
        assert name in {tool.name for tool in use.offered}
        thoughts += bool(found.thought)
        free = [random.Random(seed).randrange(WORLD.vocab_size) for _ in tokens]
        assert heard(free, use).calls == (), "the check cannot fail"
    assert 0 < thoughts < 12


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lead", ["", THOUGHT, THOUGHT * 2])
async def test_a_call_may_be_written_in_the_ways_that_models_do(call: str, lead: str):
    for use in (ToolUse(TOOLS, must=True), ToolUse(STRICT)):
        tokens = tokens_of(lead + call + CLOCK)
        guide = await guide_of(use)
        assert write(guide, tokens) == len(tokens)
        assert guide.ended or set(ids(guide.allowed())) >= WORLD.eos_ids
        wrong = tokens_of(lead + call + CLOCK.replace("utc", "mars"))
        assert write(await guide_of(use), wrong) < len(wrong)
        other = tokens_of(lead + call.replace("clock", "other") + CLOCK)
        assert write(await guide_of(use), other) < len(other)


async def test_an_answer_that_must_call_says_nothing_and_does_not_end_before():
    must = ToolUse(TOOLS, must=True)
    for said in ("hello", FINAL, "<|channel|>commentary<|message|>"):
        assert write(await guide_of(must), tokens_of(said)) < len(tokens_of(said))
        assert write(await guide_of(ToolUse(STRICT)), tokens_of(said)) == (
            0 if said == "hello" else len(tokens_of(said))
        )
    guide = await guide_of(must)
    assert not WORLD.eos_ids & set(ids(guide.allowed()))
    write(guide, tokens_of(THOUGHT[:50]))
    assert not WORLD.eos_ids & set(ids(guide.allowed()))


async def test_who_may_call_may_say_something_before_or_instead():
    said = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    for rest in (CALLS[0] + CLOCK, FINAL + "No. <tool>"):
        tokens = tokens_of(THOUGHT + said + THOUGHT + rest)
        guide = await guide_of(ToolUse(STRICT))
        assert write(guide, tokens) == len(tokens)
        assert set(ids(guide.allowed())) >= WORLD.eos_ids
    assert await WORLD.tool_guides(ToolUse(TOOLS), None, 1) is None


@pytest.mark.parametrize("use", [None, ToolUse(TOOLS), ToolUse(STRICT)])
async def test_a_shape_is_that_of_the_final_channel(use: ToolUse | None):
    for seed in range(10):
        guide = await guide_of(use, SHAPE)
        tokens = walk(WORLD, guide, random.Random(seed), often=END)
        found = heard(tokens, use)
        assert guide.ended
        assert bool(found.text) != bool(found.calls)
        assert found.calls or set(json.loads(found.text)) == {"a"}
        assert found.text or use is not None
    for head in (FINAL, "<|channel|>final <|constrain|>json<|message|>"):
        tokens = tokens_of(THOUGHT + head + '{"a": true}')
        assert write(await guide_of(use, SHAPE), tokens) == len(tokens)
    for wrong in (FINAL + "x", "<|channel|>commentary<|message|>x", '{"a": true}'):
        tokens = tokens_of(wrong)
        assert write(await guide_of(use, SHAPE), tokens) < len(tokens)


async def test_a_shape_of_what_is_no_chat_is_that_of_the_whole_text():
    (guide,) = await WORLD.guides(SHAPE, 1)
    tokens = tokens_of('{"a": true}')
    assert write(guide, tokens) == len(tokens)


async def test_a_guide_begins_where_the_prompt_leaves_the_answer():
    tokens = tokens_of('{"a": true}')
    guide = await guide_of(None, SHAPE, prompt=FINAL + "So: ")
    assert write(guide, tokens) == len(tokens)
    rest = tokens_of("hm<|end|><|start|>assistant" + FINAL)
    guide = await guide_of(None, SHAPE, prompt="<|channel|>analysis<|message|>so")
    assert write(guide, [*rest, *tokens]) == len(rest) + len(tokens)
    with pytest.raises(RequestInvalid, match="final channel") as caught:
        await guide_of(ToolUse(TOOLS, must=True), prompt=FINAL + "So: ")
    assert caught.value.param == "messages"


async def test_a_shape_or_tool_of_no_use_is_refused_by_its_name():
    with pytest.raises(RequestInvalid, match="response_format has a schema") as caught:
        await guide_of(ToolUse(TOOLS), Shape("schema", '{"not": {}}'))
    assert caught.value.param == "response_format"
    with pytest.raises(RequestInvalid) as caught:
        await guide_of(None, Shape("schema", '{"not": {}}'))
    assert caught.value.param == "response_format"


@pytest.mark.parametrize(
    ("kind", "text"),
    [("choice", '["ab", "cd"]'), ("regex", "(ab|cd)"), ("grammar", 'start: "ab" | "cd"'),
     ("grammar", 'root ::= "ab" | "cd"')],
)  # fmt: skip
async def test_shapes_of_every_kind_stand_in_the_final_channel(kind, text: str):
    for use in (None, ToolUse(STRICT)):
        for said, good in (("ab", True), ("ac", False)):
            tokens = tokens_of(THOUGHT + FINAL + said)
            guide = await guide_of(use, Shape(kind, text, "guided_regex"))
            assert (write(guide, tokens) == len(tokens)) == good
