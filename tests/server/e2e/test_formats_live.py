"""openai-python's chats and responses over bases whose answers are in channels, or whose calls are
members in a notation: a random model, which only a guide can make call."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.server import harmony_world, tool_worlds
from tests.server.e2e.test_tools_live import (
    ASKED,
    MODELS,
    TOOLS,
    Weather,
    agents,
    called,
    write_base,
)

TOKENIZERS = {
    "harmony": harmony_world.hf,
    "gemma4": lambda: tool_worlds.hf(tool_worlds.TEMPLATES["gemma4"]),
    "lfm2_silent": lambda: tool_worlds.hf(tool_worlds.TEMPLATES["lfm2_silent"]),
}
SHAPE: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "s",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"a": {"enum": ["x", "y"]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: write_base(tmp_path_factory.mktemp(name), make()) for name, make in TOKENIZERS.items()
    }


@pytest.fixture
async def client(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> AsyncIterator[AsyncOpenAI]:
    async with agents(folders[request.param], tmp_path) as (client, _):
        yield client


def likely(name: str) -> dict[str, int]:
    """So that a random model ends its thoughts."""
    if name != "harmony":
        return {}
    return {str(harmony_world.tokens_of("<|end|>")[0]): 6}


EACH = pytest.mark.parametrize(
    ("client", "name"), [(n, n) for n in TOKENIZERS], indirect=["client"]
)


@EACH
async def test_an_agent_calls_is_told_and_answers(client: AsyncOpenAI, name: str):
    messages = await called(client, logit_bias=likely(name))
    last = await client.chat.completions.create(
        model="base", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=9, seed=1
    )
    assert last.choices[0].message.tool_calls is None
    assert last.usage is not None
    assert last.usage.prompt_tokens > 150


@EACH
async def test_a_stream_is_the_whole_answer(client: AsyncOpenAI, name: str):
    ways: list[dict[str, Any]] = [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "Weather"}}},
        {"tool_choice": "auto", "response_format": SHAPE},
        {"tool_choice": "auto", "max_tokens": 60},
        {"tools": [], "max_tokens": 60},
        {"tools": [], "response_format": SHAPE},
    ]
    kinds: set[str] = set()
    for seed, way in enumerate(ways * 2):
        asked: dict[str, Any] = {
            "model": "base", "messages": ASKED, "tools": TOOLS, "temperature": 1.0, "seed": seed,
            "max_tokens": 1500, "logit_bias": likely(name), "logprobs": True, **way,
        }  # fmt: skip
        whole = await client.chat.completions.create(**asked)
        told: dict[str, str] = {"content": "", "reasoning_content": "", "finish": ""}
        calls: dict[int, list[str]] = {}
        scores = 0
        async for chunk in await client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                told["content"] += choice.delta.content or ""
                told["reasoning_content"] += getattr(choice.delta, "reasoning_content", None) or ""
                told["finish"] += choice.finish_reason or ""
                scores += len(choice.logprobs.content or ()) if choice.logprobs else 0
                for part in choice.delta.tool_calls or ():
                    assert part.function
                    found = calls.setdefault(part.index, ["", ""])
                    found[0] += part.function.name or ""
                    found[1] += part.function.arguments or ""
        (one,) = whole.choices
        assert told["content"] == (one.message.content or "")
        assert told["reasoning_content"] == (getattr(one.message, "reasoning_content", None) or "")
        assert told["finish"] == one.finish_reason
        expected = [[c.function.name, c.function.arguments] for c in one.message.tool_calls or ()]
        assert list(calls.values()) == expected
        assert one.logprobs
        assert scores == len(one.logprobs.content or ())
        if expected:
            kinds.add("calls")
            for function, arguments in expected:
                MODELS[function].model_validate_json(arguments)
        elif "response_format" in way:
            kinds.add("shape")
            assert json.loads(one.message.content or "")["a"] in ("x", "y")
        if way.get("tool_choice") in ("required", ways[1]["tool_choice"]):
            assert expected
        if told["reasoning_content"]:
            kinds.add("thought")
            assert whole.usage
            assert whole.usage.completion_tokens_details
            assert whole.usage.completion_tokens_details.reasoning_tokens
    assert kinds == {"calls", "shape", *(["thought"] if name == "harmony" else ())}


@EACH
async def test_a_response_has_items_of_what_is_thought_said_and_called(
    client: AsyncOpenAI, name: str
):
    items: list[Any] = list(ASKED)
    tools: list[Any] = [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}]
    asked: dict[str, Any] = {"model": "base", "tools": tools, "parallel_tool_calls": False}
    kinds: set[str] = set()
    for seed in range(3):
        more = {"tool_choice": "required", "max_output_tokens": 1500}
        more |= {"extra_body": {"seed": seed, "logit_bias": likely(name)}}
        async with client.responses.stream(input=items, **asked, **more) as stream:
            answer = await stream.get_final_response()
        whole = await client.responses.create(input=items, **asked, **more)
        assert [item.type for item in whole.output] == [item.type for item in answer.output]
        kinds |= {item.type for item in answer.output}
        items += [item.to_dict() for item in answer.output]
        calls = [item for item in answer.output if item.type == "function_call"]
        (call,) = calls
        Weather.model_validate_json(call.arguments)
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "5"})
    assert kinds == {"function_call", *(["reasoning"] if name == "harmony" else ())}
