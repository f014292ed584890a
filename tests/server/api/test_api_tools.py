"""Tools over HTTP: what is refused, what reaches the model, and calls in whole and streamed."""

import json
import re

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from fader_server.api import tools as tools_module
from fader_server.api.body import parse
from fader_server.api.fields import Fields
from fader_server.errors import RequestInvalid
from fader_server.text.tools import Tool, ToolUse
from tests.server.api.api_fakes import EOS, World, say
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import GOOD, check_envelope
from tests.server.api.test_api_streaming import events, text_of

ROUTE = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
PLAIN = Tool("f", "d", SCHEMA)
NAMED = {"type": "function", "function": {"name": "f"}}
OFFER = {"tools": [TOOL]}


def tool(**changes: object) -> dict:
    return {"type": "function", "function": {**TOOL["function"], **changes}}


def allowed(mode: object, *tools: object) -> dict:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(tools)}}


def called(city: str) -> str:
    arguments = json.dumps({"city": city}, ensure_ascii=False)
    return f'<call>{{"name": "f", "arguments": {arguments}}}</call>'


async def ask(client, **others):
    body = json.dumps(GOOD[ROUTE] | {"max_tokens": 400, **others})
    return await client.post(ROUTE, content=body, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ({}, ToolUse((PLAIN,))),
        ({"tool_choice": "auto", "parallel_tool_calls": None}, ToolUse((PLAIN,))),
        ({"parallel_tool_calls": False}, ToolUse((PLAIN,), parallel=False)),
        ({"tool_choice": "required"}, ToolUse((PLAIN,), must=True)),
        ({"tool_choice": NAMED}, ToolUse((PLAIN,), must=True, only=("f",), parallel=False)),
        ({"tool_choice": allowed("auto", NAMED)}, ToolUse((PLAIN,), only=("f",))),
        ({"tool_choice": allowed("required", NAMED)}, ToolUse((PLAIN,), must=True, only=("f",))),
        ({"tools": [tool(strict=True)]}, ToolUse((Tool("f", "d", SCHEMA, strict=True),))),
        ({"tools": [tool(strict=False, description=None)]}, ToolUse((Tool("f", "", SCHEMA),))),
        (
            {"tools": [tool(parameters=None)]},
            ToolUse((Tool("f", "d", {"type": "object", "properties": {}}),)),
        ),
        (
            {"tools": [tool(parameters={"anyOf": [{}], "x-guidance": {"lenient": True}})]},
            ToolUse((Tool("f", "d", {"type": "object", "anyOf": [{}]}),)),
        ),
    ],
)
async def test_what_is_offered_reaches_the_text_layer(client, world: World, extra, use):
    answer = await ask(client, **{**OFFER, **extra})
    assert answer.status_code == 200, answer.text
    assert world.tokenizer.uses == [(use, None)]
    (request,) = world.engine.seen
    assert (request.guide is not None) == use.must
    assert "'name': 'f'" in bytes(request.prompt).decode()


@pytest.mark.parametrize("choice", ["none", None])
async def test_without_tools_or_with_none_to_call_nothing_is_other_than_before(
    client, world, choice
):
    extra = {**OFFER, "tool_choice": "none"} if choice else {"tools": [], "tool_choice": "auto"}
    await ask(client, seed=1, **extra)
    await ask(client, seed=1)
    assert world.tokenizer.uses == []
    first, second = world.engine.seen
    assert (first.prompt, first.params, first.guide) == (second.prompt, second.params, None)


async def test_a_schema_for_the_content_goes_with_the_tools(client, world: World):
    form = {"type": "json_object"}
    await ask(client, **OFFER, response_format=form)
    assert world.tokenizer.uses == [(ToolUse((PLAIN,)), '{"type": "object"}')]
    assert world.tokenizer.schemas == []


MANY = [tool(name=f"f{i}") for i in range(129)]
BAD_TOOLS = [
    *("f", 1, {}, [1], [{}], [None], MANY, [TOOL, TOOL]),
    [{"type": "function"}],
    [{"type": "custom", "custom": {"name": "f"}}],
    [{"function": {"name": "f"}}],
    [{"type": "function", "function": []}],
    [TOOL, {**tool(name="g"), "functions": {}}],
    [{**TOOL, **{f"k{n}": 1 for n in range(65)}}],
    [{**TOOL, "strict": "SECRET"}],
    *([tool(name=name)] for name in (None, "", 1, "a b", "é", "x" * 65, "f\n", "<call>", [])),
    *([tool(description=text)] for text in (1, [], "\ud800")),
    *([tool(strict=value)] for value in (1, "true", [])),
    *([tool(parameters=value)] for value in (1, [], "{}", True, {"type": "string"}, {"type": 1})),
    *([tool(**{name: 1})] for name in ("paramaters", "parameter", "descripton", "strickt")),
    [tool(name=f"f{i}", **{f"k{i}": 1}) for i in range(65)],
    [tool(parameters={"properties": {"\ud800": {}}})],
    [tool(parameters={"properties": {"a": {"const": "SECRET\ud800"}}})],
    [tool(description="SECRET" * 50_000)],
    [tool(name=f"f{i}", description="x" * 5_000) for i in range(60)],
    [tool(parameters={"enum": [[] for _ in range(20_000)]})],
    [tool(parameters={"properties": {"a": {"maximum": 10**400}}})],
]


@pytest.mark.parametrize("choice", [{}, {"tool_choice": "none"}])
@pytest.mark.parametrize("tools", BAD_TOOLS)
async def test_what_are_no_tools_is_one_400(client, world: World, tools, choice):
    answer = await ask(client, tools=tools, **choice)
    assert answer.status_code == 400, answer.text
    error = check_envelope(answer)
    assert error["param"] == "tools"
    assert "SECRET" not in error["message"]
    assert world.engine.seen == world.tokenizer.uses == []


@pytest.mark.parametrize(
    ("level", "name", "meant"),
    [("item", "functions", "function"), ("function", "paramaters", "parameters")],
)
async def test_a_misspelt_key_of_a_tool_is_told(client, level, name, meant):
    wrong = tool(name="g", **{name: 1}) if level == "function" else tool(name="g") | {name: 1}
    error = check_envelope(await ask(client, tools=[TOOL, wrong]))
    assert error["param"] == "tools"
    assert error["message"] == f"tools has {name}, which is not known here; did you mean {meant}?"


async def test_what_others_write_beside_a_function_is_ignored_and_counted(client, world: World):
    cached = {"cache_control": {"type": "ephemeral"}}
    first = tool(returns={"type": "string"}, examples=[]) | cached
    tools = [first, tool(name="g") | cached | {"paramaters": None}]
    answer = await ask(client, tools=tools, zzz=1)
    assert answer.status_code == 200, answer.text
    assert world.tokenizer.uses == [(ToolUse((PLAIN, Tool("g", "d", SCHEMA))), None)]
    assert "returns" not in bytes(world.engine.seen[0].prompt).decode()
    assert "fader_ignored_fields_total 5.0" in world.metrics.render().decode()


@pytest.mark.parametrize(
    ("beside", "own", "strict"),
    [(True, None, True), (True, False, False), (None, True, True), (False, None, False)],
)
async def test_strict_beside_a_function_is_that_of_the_function(client, world, beside, own, strict):
    answer = await ask(client, tools=[tool(strict=own) | {"strict": beside}])
    assert answer.status_code == 200, answer.text
    assert world.tokenizer.uses == [(ToolUse((Tool("f", "d", SCHEMA, strict=strict),)), None)]
    assert "fader_ignored_fields_total 0.0" in world.metrics.render().decode()


KEPT = {
    "references": {"a": {"$ref": "https://example.com/SECRET"}},
    "patterns": {"a": {"pattern": "SECRET" * 100}},
    "counts": {"a": {"maxLength": 10**9}},
    "texts": {"a": {"const": "SECRET" * 400}},
}


@pytest.mark.parametrize("name", KEPT)
async def test_what_is_too_much_for_a_grammar_is_refused_where_one_is_made(client, world, name):
    parameters = {"properties": KEPT[name]}
    loose = {"tools": [tool(parameters=parameters)]}
    strict = {"tools": [tool(parameters=parameters, strict=True)]}
    assert (await ask(client, **loose)).status_code == 200
    beside = {"tools": [*loose["tools"], tool(name="g", strict=True)]}
    form = loose | {"response_format": {"type": "json_object"}}
    required, named = ({**loose, "tool_choice": choice} for choice in ("required", NAMED))
    for body in (strict, beside, form, required, named):
        answer = await ask(client, **body)
        assert answer.status_code == 400, answer.text
        assert check_envelope(answer)["param"] == "tools"
        assert "SECRET" not in answer.text
    assert len(world.engine.seen) == 1


def test_tools_within_the_bounds_pass():
    long = "x" * (tools_module.MAX_TEXT // 128 - 200)
    fields = Fields({"tools": [tool(name=f"f{i}", description=long) for i in range(128)]})
    use = tools_module.read_tools(fields)
    fields.finish()
    assert use is not None
    assert len(use.tools) == 128


@pytest.mark.parametrize(
    "choice",
    [
        *("any", "f", 1, True, [], {}, "NONE"),
        {"type": "function"},
        {"type": "function", "function": {}},
        {"type": "function", "function": {"name": 1}},
        {"type": "function", "function": {"name": "g"}},
        {"type": "function", "function": {"name": "f"}, "more": 1},
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}},
        *(allowed(mode, NAMED) for mode in ("none", None, {})),
        *(allowed("auto", *tools) for tools in ((), (NAMED, "f"), (NAMED,) * 129, (TOOL,))),
        allowed("auto", NAMED, {"type": "function", "function": {"name": "g"}}),
        {**allowed("auto", NAMED), "more": 1},
        {"type": "function", "name": "f"},
    ],
)
async def test_what_is_no_choice_is_one_400(client, world: World, choice):
    answer = await ask(client, **OFFER, tool_choice=choice)
    assert answer.status_code == 400, answer.text
    assert check_envelope(answer)["param"] == "tool_choice"
    assert world.engine.seen == []


@pytest.mark.parametrize("choice", ["required", NAMED, allowed("auto", NAMED)])
async def test_a_call_cannot_be_asked_for_without_tools(client, choice):
    error = check_envelope(await ask(client, tool_choice=choice))
    assert error["param"] == "tool_choice"


async def test_parallel_tool_calls_is_true_or_false(client):
    error = check_envelope(await ask(client, **OFFER, parallel_tool_calls="no"))
    assert error["param"] == "parallel_tool_calls"


async def test_a_base_that_cannot_be_read_says_so(client, world: World):
    error = check_envelope(await ask(client, tools=[tool(name="unreadable")]))
    assert error["param"] == "tools"
    assert world.idle


def past(**changes: object) -> dict:
    function = {"name": "f", "arguments": '{"city": "Köln"}'}
    return {"id": "c1", "type": "function", "function": function, **changes}


def history(call: object, *, content: object = None, id: object = "c1") -> list[dict]:
    return [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": content, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "sunny", "tool_call_id": id},
    ]


@pytest.mark.parametrize("offer", [{}, OFFER])
async def test_past_calls_reach_the_text_layer_as_objects(client, world: World, offer):
    answer = await ask(client, messages=history(past()), **offer)
    assert answer.status_code == 200, answer.text
    shown = bytes(world.engine.seen[0].prompt).decode()
    assert "'function': {'name': 'f', 'arguments': {'city': 'Köln'}}" in shown
    assert "tool:sunny{'tool_call_id': 'c1', 'name': 'f'}" in shown


@pytest.mark.parametrize(
    "said",
    [
        {"content": None, "refusal": "No."},
        {"content": [{"type": "refusal", "refusal": "No."}]},
        {"content": "No.", "refusal": None},
    ],
)
async def test_a_refusal_is_what_an_assistant_said(client, world: World, said):
    asked = {"role": "user", "content": "x"}
    answer = await ask(client, messages=[asked, {"role": "assistant", **said}, asked])
    assert answer.status_code == 200, answer.text
    assert "assistant:No.\n" in bytes(world.engine.seen[0].prompt).decode()
    for bad in ({**asked, "refusal": "No."}, {"role": "assistant", "content": "", "refusal": 1}):
        assert check_envelope(await ask(client, messages=[bad]))["param"] == "messages"
    part = [{"type": "refusal", "refusal": "No."}]
    assert (await ask(client, messages=[{"role": "user", "content": part}])).status_code == 400


LOST = [
    *("", " ", "[]", "1", "null", '"x"', "{", '{"a": NaN}', '{"a": 1, "a": 2}', "{'a': 1}"),
    *('{"a":' * 40 + "1" + "}" * 40, '{"a": "\\ud83d"}', '{"\\ud83d": 1}', '{"a": "\ud800"}'),
    *('{"a": ' + "1" * 5000 + "}", None, 1, True, [], [{}], {"a": "\ud83d"}),
]


@pytest.mark.parametrize("given", LOST)
async def test_past_arguments_that_are_no_json_object_are_none(client, world: World, given):
    answer = await ask(client, messages=history(arguments(given)))
    assert answer.status_code == 200, answer.text
    assert "{'name': 'f', 'arguments': {}}" in bytes(world.engine.seen[0].prompt).decode()


async def test_past_arguments_may_be_left_out(client, world: World):
    answer = await ask(client, messages=history(past(function={"name": "f"})))
    assert answer.status_code == 200, answer.text
    assert "{'name': 'f', 'arguments': {}}" in bytes(world.engine.seen[0].prompt).decode()


async def test_past_arguments_may_be_an_object(client, world: World):
    answer = await ask(client, messages=history(arguments({"city": "Köln"})))
    assert answer.status_code == 200, answer.text
    assert "'arguments': {'city': 'Köln'}" in bytes(world.engine.seen[0].prompt).decode()


def test_past_arguments_are_bounded_as_the_body_is():
    deep: dict = {}
    for _ in range(40):
        deep = {"a": deep}
    with pytest.raises(RequestInvalid, match="deeper"):
        parse(json.dumps({"messages": history(arguments(deep))}).encode())


def shown_calls(world: World) -> list[dict]:
    """The ids and names that the text layer saw, of calls and of answers, in order."""
    text = bytes(world.engine.seen[-1].prompt).decode()
    return [
        dict(zip(("id", "name"), pair, strict=True))
        for pair in re.findall(r"'(?:tool_call_)?id': '(\w+)'.*?'name': '(\w+)'", text)
    ]


@pytest.mark.parametrize("id", [None, ""])
async def test_a_past_call_without_an_id_has_one_that_every_template_takes(client, world, id):
    nameless = {"function": past()["function"], **({} if id is None else {"id": id})}
    ids = []
    for extra in ([], [{"role": "user", "content": "more"}]):
        messages = [*history(past()), *history(nameless, id=id), *extra]
        answer = await ask(client, messages=messages)
        assert answer.status_code == 200, answer.text
        first, _, call, its_answer = shown_calls(world)
        assert call == its_answer
        assert re.fullmatch(r"[a-zA-Z0-9]{9}", call["id"])
        assert call["id"] != first["id"]
        ids.append(call["id"])
    assert ids[0] == ids[1], "a chat that goes on keeps its prefix"


async def test_calls_without_ids_are_told_apart(client, world: World):
    call = {"function": past()["function"]}
    spoken = {"role": "assistant", "content": None, "tool_calls": [call, call]}
    answer = await ask(client, messages=[spoken, spoken])
    assert answer.status_code == 200, answer.text
    ids = re.findall(r"'id': '(\w+)'", bytes(world.engine.seen[0].prompt).decode())
    assert len(ids) == len(set(ids)) == 4


@pytest.mark.parametrize("id", [None, "", ...])
async def test_an_answer_without_an_id_is_that_of_the_one_call_left(client, world: World, id):
    result = {"role": "tool", "content": "rain"}
    result |= {} if id is ... else {"tool_call_id": id}
    second = {"id": "c2", "function": {"name": "g", "arguments": "{}"}}
    spoken = {"role": "assistant", "content": "", "tool_calls": [second]}
    answer = await ask(client, messages=[*history(past()), spoken, result])
    assert answer.status_code == 200, answer.text
    shown = bytes(world.engine.seen[0].prompt).decode()
    assert "tool:rain{'tool_call_id': 'c2', 'name': 'g'}" in shown


@pytest.mark.parametrize("calls", [[], [past(), past(id="c2")]])
async def test_an_answer_without_an_id_is_refused_where_it_may_be_of_none_or_two(client, calls):
    spoken = {"role": "assistant", "content": "x", "tool_calls": calls}
    messages = [spoken, {"role": "tool", "content": "rain"}]
    error = check_envelope(await ask(client, messages=messages))
    assert error["param"] == "messages"
    assert error["message"].startswith("messages[1] of a tool needs tool_call_id")
    answered = {"role": "tool", "content": "sun", "tool_call_id": "c1"}
    status = (await ask(client, messages=[spoken, answered, messages[1]])).status_code
    assert status == (200 if calls else 400)


async def test_an_answer_without_calls_may_say_so(client):
    for nothing in (None, []):
        messages = [{"role": "assistant", "content": "x", "tool_calls": nothing}]
        assert (await ask(client, messages=messages)).status_code == 200


def arguments(text: object) -> dict:
    return past(function={"name": "f", "arguments": text})


BAD_HISTORY = [
    *(history(call) for call in (1, {}, None, past(id=1), past(id=[]), past(id="x" * 257))),
    *(history(past(type="custom")), history(past(function=None)), history(past(function=[]))),
    *(history(past(function={"name": name, "arguments": "{}"})) for name in (None, 1, "", "a b")),
    *(history(past(), id=id) for id in (1, [], "x" * 257, "\ud800")),
    [{"role": "user", "content": "x", "tool_calls": [past()]}],
    [{"role": "assistant", "tool_calls": {"a": 1}}],
    [{"role": "assistant", "tool_calls": [past()] * 129}],
    [{"role": "assistant", "content": "x", "function_call": {"name": "f", "arguments": "{}"}}],
    [{"role": "tool", "content": "x"}],
    [{"role": "tool", "content": "x"}, *history(past())],
]


@pytest.mark.parametrize("messages", BAD_HISTORY)
async def test_what_is_no_past_call_is_one_400(client, world: World, messages):
    answer = await ask(client, messages=messages, **OFFER)
    assert answer.status_code == 400, answer.text
    error = check_envelope(answer)
    assert error["param"] == "messages"
    assert re.match(r"messages\[[0-2]\] ", error["message"])
    assert world.engine.seen == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_must_come_and_is_cut_has_what_came_of_it(worlds, stream):
    world = worlds(script=say(called("Köln")))
    async with asgi(world) as client:
        body = {**GOOD[ROUTE], **OFFER, "tool_choice": NAMED, "max_tokens": 44, "stream": stream}
        if stream:
            chunks = await events(client, ROUTE, body)
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
            parts = [
                call
                for chunk in chunks
                for call in chunk["choices"][0]["delta"].get("tool_calls", ())
            ]
            assert {part["index"] for part in parts} == {0}
            assert [part["function"].get("name") for part in parts if "id" in part] == ["f"]
            arguments = "".join(part["function"]["arguments"] for part in parts)
            finish = chunks[-1]["choices"][0]["finish_reason"]
            assert text_of([c for c in chunks if "content" not in c["choices"][0]["delta"]]) == ""
        else:
            (choice,) = (await client.post(ROUTE, json=body)).json()["choices"]
            assert choice["message"]["content"] is None
            (call,) = choice["message"]["tool_calls"]
            arguments, finish = call["function"]["arguments"], choice["finish_reason"]
    assert finish == "length"
    assert arguments == '{"city": "K'


SAID = f"Let me see.\n{called('Köln')}\n{called('<b>')}"


async def test_calls_are_told_apart_from_content(worlds):
    world = worlds(script=say(SAID))
    async with asgi(world) as client:
        body = (await ask(client, **OFFER, n=2)).json()
    ChatCompletion.model_validate(body)
    for choice in body["choices"]:
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        calls = choice["message"]["tool_calls"]
        assert [json.loads(c["function"]["arguments"])["city"] for c in calls] == ["Köln", "<b>"]
        assert {c["function"]["name"] for c in calls} == {"f"}
        assert {c["type"] for c in calls} == {"function"}
    ids = [c["id"] for choice in body["choices"] for c in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", id) for id in ids)
    assert body["usage"]["completion_tokens"] == 2 * (len(SAID.encode()) + 1)


async def test_an_answer_of_calls_alone_has_no_content(worlds):
    world = worlds(script=say(f"\n{called('x')}\n"))
    async with asgi(world) as client:
        message = (await ask(client, **OFFER)).json()["choices"][0]["message"]
    assert message["content"] is None
    assert len(message["tool_calls"]) == 1


async def test_the_same_text_without_tools_is_text(worlds):
    world = worlds(script=say(SAID))
    async with asgi(world) as client:
        choice = (await ask(client)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "text", ["plain", '<call>{"name": "g", "arguments": {}}</call>', "<call>{", "a <call"]
)
async def test_text_that_is_no_call_is_content(worlds, text):
    world = worlds(script=say(text))
    async with asgi(world) as client:
        choice = (await ask(client, **OFFER)).json()["choices"][0]
        chunks = await events(client, ROUTE, GOOD[ROUTE] | OFFER | {"stream": True})
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert text_of(chunks) == text


async def test_a_stream_has_one_chunk_a_call_and_is_the_whole_answer(worlds):
    world = worlds(script=say(SAID))
    body = GOOD[ROUTE] | OFFER | {"stream": True, "max_tokens": 400}
    body["stream_options"] = {"include_usage": True}
    async with asgi(world) as client:
        chunks = await events(client, ROUTE, body)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(c["delta"].get("content", "") for c in choices) == "Let me see."
    calls = [call for c in choices for call in c["delta"].get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert [json.loads(c["function"]["arguments"])["city"] for c in calls] == ["Köln", "<b>"]
    ends = [(c["finish_reason"], c["delta"]) for c in choices if c["finish_reason"]]
    assert ends == [("tool_calls", {})], "clients look for it behind the calls"
    assert chunks[-1]["usage"]["completion_tokens"] == len(SAID.encode()) + 1


async def test_one_call_is_the_end_where_there_may_be_no_other(worlds):
    world = worlds(script=say(SAID + "more"))
    async with asgi(world) as client:
        choice = (await ask(client, **OFFER, parallel_tool_calls=False)).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert world.engine.aborted == [world.engine.seen[0].id]


async def test_an_answer_that_is_cut_off_says_so_and_keeps_its_whole_calls(worlds):
    world = worlds(script=say(SAID))
    most = len(SAID.encode()) - len('"}}</call>')
    async with asgi(world) as client:
        choice = (await ask(client, **OFFER, max_tokens=most)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1
    assert "<b>" in choice["message"]["content"]


async def test_stop_strings_end_content_and_do_not_count_in_calls(worlds):
    world = worlds(script=say(SAID))
    async with asgi(world) as client:
        whole = (await ask(client, **OFFER, stop=["Köln"])).json()["choices"][0]
        cut = (await ask(client, **OFFER, stop=["me"])).json()["choices"][0]
        kept = (await ask(client, **OFFER, stop=["me"], include_stop_str_in_output=True)).json()
    assert len(whole["message"]["tool_calls"]) == 2
    assert cut["message"] == {"role": "assistant", "content": "Let ", "refusal": None}
    assert cut["finish_reason"] == "stop"
    assert kept["choices"][0]["message"]["content"] == "Let me"


async def test_logprobs_are_those_of_every_token_calls_included(worlds):
    world = worlds(script=say(SAID))
    async with asgi(world) as client:
        choice = (await ask(client, **OFFER, logprobs=True)).json()["choices"][0]
    assert len(choice["logprobs"]["content"]) == len(SAID.encode())


async def test_a_guided_call_ends_at_the_models_stop_tokens_also_under_ignore_eos(client, world):
    await ask(client, **OFFER, tool_choice="required", ignore_eos=True)
    await ask(client, **OFFER, ignore_eos=True)
    guided, free = (request.params.stop_token_ids for request in world.engine.seen)
    assert guided == {EOS}
    assert free == frozenset()


async def test_tokenize_counts_tools(client):
    body = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
    counts = [
        (await client.post("/tokenize", json=body | more)).json()["count"]
        for more in ({}, OFFER, OFFER | {"tool_choice": "none"})
    ]
    assert counts[0] == counts[2] < counts[1]
