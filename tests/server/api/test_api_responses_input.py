"""What /v1/responses takes: items as the messages of a chat, tools, forms, and what it refuses."""

import json
from typing import Any

import httpx
import pytest
from openai.types.responses import Response

from fader_server.text.tools import Tool, ToolUse
from tests.server.api.api_fakes import MAX_LEN, World
from tests.server.api.test_api_bodies import check_envelope

ROUTE = "/v1/responses"
JSON = {"content-type": "application/json"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}
PLAIN = Tool("f", "d", SCHEMA)
NAMED = {"type": "function", "name": "f"}
FORM = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"city": "Köln"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "h"}]}
SHOWN = "{'id': 'c1', 'type': 'function', 'function': {'name': 'f', 'arguments': {'city': 'Köln'}}}"


async def ask(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    text = json.dumps({"model": "base", "input": "x", "max_output_tokens": 9} | body)
    return await client.post(ROUTE, content=text, headers=JSON)


async def taken(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await ask(client, **body)
    assert answer.status_code == 200, answer.text
    Response.model_validate(answer.json())
    return answer.json()


async def refused(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    answer = await ask(client, **body)
    assert answer.status_code == 400, answer.text
    assert "SECRET" not in answer.text
    return check_envelope(answer)


def text(said: str, kind: str = "input_text") -> dict[str, str]:
    return {"type": kind, "text": said}


AB = [text("a"), text("b")]
CHATS = {
    "text": ("hi 🦊", "user:hi 🦊\n"),
    "an easy message": ([USER], "user:x\n"),
    "parts": ([{"type": "message", "role": "user", "content": AB}], "user:ab\n"),
    "an answer": (
        [USER, {"type": "message", "id": "msg_1", "status": "completed", **SAID}, USER],
        "user:x\nassistant:Hm.\nuser:x\n",
    ),
    "a refusal": (
        [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
        "assistant:No.\n",
    ),
    "a call": (
        [USER, CALL, RESULT],
        f"user:x\nassistant:{{'tool_calls': [{SHOWN}]}}\n"
        "tool:sunny{'tool_call_id': 'c1', 'name': 'f'}\n",
    ),
    "words and calls": (
        [SAID, CALL, CALL | {"call_id": "c2", "arguments": "{"}, RESULT],
        f"assistant:Hm.{{'tool_calls': [{SHOWN}, {SHOWN}]}}\n".replace(
            f", {SHOWN}", ", " + SHOWN.replace("c1", "c2").replace("{'city': 'Köln'}", "{}")
        )
        + "tool:sunny{'tool_call_id': 'c1', 'name': 'f'}\n",
    ),
    "a result in parts": (
        [CALL, RESULT | {"output": [text("a"), text("b")]}],
        f"assistant:{{'tool_calls': [{SHOWN}]}}\ntool:ab{{'tool_call_id': 'c1', 'name': 'f'}}\n",
    ),
    "a thought, words and a call": (
        [THOUGHT, SAID, CALL, RESULT],
        f"assistant:Hm.{{'reasoning_content': 'h', 'tool_calls': [{SHOWN}]}}\n"
        "tool:sunny{'tool_call_id': 'c1', 'name': 'f'}\n",
    ),
    "a thought in summary": (
        [{"type": "reasoning", "summary": [text("s", "summary_text")]}, SAID],
        "assistant:Hm.{'reasoning_content': 's'}\n",
    ),
    "thoughts of nothing": (
        [USER, THOUGHT, USER, {"type": "reasoning", "summary": [], "encrypted_content": "e"}],
        "user:x\nuser:x\n",
    ),
    "a thought by its id": (
        [USER, {"type": "item_reference", "id": "rs_1"}, SAID],
        "user:x\nassistant:Hm.\n",
    ),
    "two answers": (
        [SAID, SAID, CALL],
        f"assistant:Hm.\nassistant:Hm.{{'tool_calls': [{SHOWN}]}}\n",
    ),
    "a thought after a call": (
        [CALL, THOUGHT, SAID],
        f"assistant:{{'tool_calls': [{SHOWN}]}}\nassistant:Hm.{{'reasoning_content': 'h'}}\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
async def test_items_are_the_messages_of_a_chat(client, world: World, name):
    items, chat = CHATS[name]
    await taken(client, input=items)
    assert bytes(world.engine.seen[0].prompt).decode() == chat


@pytest.mark.parametrize(
    ("items", "chat"),
    [
        ([USER], "system:Be kind.\nuser:x\n"),
        ([{"role": "developer", "content": "And brief."}, USER],
         "system:Be kind.\n\nAnd brief.\nuser:x\n"),
        ([{"role": "system", "content": AB}, {"role": "developer", "content": "C"}],
         "system:Be kind.\n\nab\n\nC\n"),
        ([USER, {"role": "system", "content": "later"}], "system:Be kind.\nuser:x\nsystem:later\n"),
    ],
)  # fmt: skip
async def test_instructions_lead_in_one_message(client, world: World, items, chat):
    await taken(client, input=items, instructions="Be kind.")
    assert bytes(world.engine.seen[0].prompt).decode() == chat
    await taken(client, input=items)
    assert "Be kind" not in bytes(world.engine.seen[1].prompt).decode()


BAD_INPUT = {
    "nothing": (None, "input is required"),
    "no items": ([], "input must be"),
    "no list": ({"role": "user"}, "input must be"),
    "too many": ([USER] * 4097, "input must be"),
    "no item": ([USER, 1], "input[1] must be a message"),
    "no role": ([USER, {"content": "x"}], "input[1] must be"),
    "another's role": ([{"role": "SECRET", "content": "x"}], "input[0] must have a role"),
    "no content": ([THOUGHT, {"role": "user"}], "input[1] must have content"),
    "an answer of no text": ([USER, THOUGHT, {"role": "assistant", "content": 5}],
                             "input[2] must have content"),
    "a picture": ([THOUGHT, USER, {"role": "user", "content": [{"type": "input_image"}]}],
                  "input[2] has a picture"),
    "a file": ([{"role": "user", "content": [{"type": "input_file", "file_id": "SECRET"}]}],
               "input[0] has a file"),
    "a result with a picture": ([CALL, RESULT | {"output": [{"type": "input_image"}]}],
                                "input[1] has a picture"),
    "a call without a name": ([CALL | {"name": "SECRET "}], "input[0] needs a name"),
    "a call without an id": ([CALL | {"call_id": None}], "input[0] needs a name"),
    "a result of nothing": ([USER, RESULT | {"output": None}], "input[1] needs a call_id"),
    "an item by its id": ([{"type": "item_reference", "id": "msg_1"}], "input[0] refers"),
    "an id alone": ([USER, {"id": "msg_1"}], "input[1] refers"),
    "a hosted call": ([{"type": "web_search_call", "id": "SECRET"}],
                      "input[0] is of type web_search_call"),
    "an unknown type": ([{"type": "SECRET!"}], "input[0] must be a message"),
    "surrogates": ([{"role": "user", "content": "\ud800"}], "input[0] must have content"),
    "a thought alone": ([THOUGHT], "input must be a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
async def test_what_is_no_input_is_one_400(client, world: World, name):
    items, begins = BAD_INPUT[name]
    error = await refused(client, input=items)
    assert error["param"] == "input"
    assert error["message"].startswith(begins)
    assert world.engine.seen == []


REFUSED = {
    "previous_response_id": "resp_1", "conversation": {"id": "c"}, "prompt": {"id": "p"},
    "background": True, "n": 2, "messages": [USER], "response_format": {"type": "text"},
    "max_tokens": 3, "max_completion_tokens": 3, "reasoning_effort": "low", "logprobs": True,
    "truncation": "SECRET", "moderation": {"model": "m"}, "return_token_ids": True,
    "metadata": {"a": 1}, "include": "SECRET", "text": "SECRET", "reasoning": ["low"],
    "stream_options": True, "instructions": 3, "max_output_tokens": 0, "top_logprobs": 21,
    "temperature": 3, "stop": [""], "chat_template": "SECRET", "use_beam_search": True,
    "instrutions": "typo", "adapter": "tone", "tools": {"a": 1}, "tool_choice": "any",
    "add_special_tokens": True, "max_tool_calls": -1, "add_generation_prompt": False, "logprob": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_done_is_refused_by_its_name(client, world: World, name):
    error = await refused(client, **{name: REFUSED[name]})
    assert error["param"] == name
    assert world.engine.seen == []


async def test_what_changes_nothing_is_taken(client, world: World):
    changes = {
        "background": False, "previous_response_id": None, "conversation": None, "prompt": None,
        "truncation": "auto", "store": True, "service_tier": "flex", "safety_identifier": "s",
        "prompt_cache_key": "k", "include": ["reasoning.encrypted_content"], "max_tool_calls": 3,
        "stream_options": {"include_obfuscation": False}, "text": {"verbosity": "low"},
        "reasoning": {"summary": "auto"}, "client_metadata": {"a": "b"}, "top_logprobs": 0,
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "user": "\ud800",
    }  # fmt: skip
    answer = await taken(client, seed=1, **changes)
    await taken(client, seed=1)
    first, second = world.engine.seen
    assert (first.prompt, first.params) == (second.prompt, second.params)
    assert (answer["store"], answer["truncation"], answer["user"]) == (False, "disabled", None)
    assert (answer["max_tool_calls"], answer["text"]["verbosity"]) == (3, "low")
    assert "fader_ignored_fields_total 0.0" in world.metrics.render().decode()
    tools = [TOOL | {"zzz": 1}, {"type": "web_search"}]
    await taken(client, zzz=1, text={"zzz": 1}, reasoning={"zzz": 1}, tools=tools)
    assert "fader_ignored_fields_total 5.0" in world.metrics.render().decode()


async def test_sampling_and_effort_reach_the_engine(client, world: World):
    answer = await taken(
        client, temperature=0.5, top_p=0.5, top_k=3, min_p=0.1, seed=7, presence_penalty=1,
        ignore_eos=True, stop=["q"], reasoning={"effort": "low"},
    )  # fmt: skip
    (request,) = world.engine.seen
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.5, 0.5, 3, 7)
    assert (params.min_p, params.presence_penalty, params.max_tokens) == (0.1, 1.0, 9)
    assert bytes(request.prompt).startswith(b"effort:low\n")
    assert (answer["temperature"], answer["reasoning"]["effort"]) == (0.5, "low")


def allowed(mode: object, *tools: object) -> dict[str, Any]:
    return {"type": "allowed_tools", "mode": mode, "tools": list(tools)}


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ({}, ToolUse((PLAIN,))),
        ({"tools": [TOOL | {"strict": True}]}, ToolUse((Tool("f", "d", SCHEMA, strict=True),))),
        ({"tools": [TOOL, {"type": "web_search"}]}, ToolUse((PLAIN,))),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [TOOL]}]}, ToolUse((PLAIN,))),
        ({"tool_choice": "required", "parallel_tool_calls": False},
         ToolUse((PLAIN,), must=True, parallel=False)),
        ({"tool_choice": NAMED}, ToolUse((PLAIN,), must=True, only=("f",), parallel=False)),
        ({"tool_choice": allowed("auto", NAMED)}, ToolUse((PLAIN,), only=("f",))),
        ({"tool_choice": allowed("required", NAMED)}, ToolUse((PLAIN,), must=True, only=("f",))),
    ],
)  # fmt: skip
async def test_tools_are_those_of_a_chat(client, world: World, extra, use):
    answer = await taken(client, **{"tools": [TOOL], **extra})
    assert world.tokenizer.uses == [(use, None)]
    assert answer["tools"] == [TOOL | {"strict": use.tools[0].strict}]
    assert answer["tool_choice"] == extra.get("tool_choice", "auto")


HOSTED = ("web_search", "file_search", "code_interpreter", "mcp", "custom", "local_shell")


@pytest.mark.parametrize(
    ("tools", "told"),
    [
        *(([{"type": kind}], kind) for kind in HOSTED),
        *(([TOOL, {"type": kind}], kind) for kind in HOSTED[1:]),
        ([{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}], "custom"),
        ([{"type": "namespace", "name": "SECRET ", "tools": []}], "namespace"),
        ([TOOL, {"type": "namespace", "name": "n", "tools": [TOOL]}], "two functions of one name"),
        ([TOOL | {"name": "SECRET "}], "needs a name"),
        ([TOOL | {"paramaters": 1}], "paramaters"),
        ([{"type": "function", "function": {"name": 1}}], "needs a name"),
    ],
)
async def test_what_are_no_functions_is_named(client, world: World, tools, told):
    error = await refused(client, tools=tools)
    assert error["param"] == "tools"
    assert told in error["message"]
    assert world.tokenizer.uses == []


@pytest.mark.parametrize(
    "choice",
    [
        *("any", 1, [], {}, {"type": "function"}, {"type": "function", "name": "g"}),
        {"type": "function", "function": {"name": "f"}},
        NAMED | {"more": 1},
        *({"type": "web_search"}, allowed("none", NAMED), allowed("auto"), allowed("auto", TOOL)),
    ],
)
async def test_what_is_no_choice_is_one_400(client, choice):
    error = await refused(client, tools=[TOOL], tool_choice=choice)
    assert error["param"] == "tool_choice"
    assert '"function": {' not in error["message"], "that is how a chat has it"


async def test_forms_are_those_of_a_chat(client, world: World):
    answer = await taken(client, text={"format": FORM})
    await taken(client, text={"format": {"type": "json_object"}})
    await taken(client, text={"format": {"type": "text"}})
    assert [json.loads(text) for text in world.tokenizer.schemas] == [SCHEMA, {"type": "object"}]
    assert answer["text"]["format"] == FORM
    for form, told in (({"type": "xml"}, "type text"), (FORM | {"name": "SECRET "}, "needs name")):
        error = await refused(client, text={"format": form})
        assert error["param"] == "text.format"
        assert told in error["message"]
    refuse = FORM | {"schema": {"type": "object", "title": "refuse"}}
    assert (await refused(client, text={"format": refuse}))["param"] == "text.format"


async def test_what_is_too_long_has_the_names_of_a_response(client):
    for body, param in (
        ({"input": "x" * MAX_LEN, "max_output_tokens": None}, "input"),
        ({"max_output_tokens": MAX_LEN}, "max_output_tokens"),
    ):
        error = await refused(client, **body)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
