"""openai-python's tools against the real engine over a random model, which only a guide can make
call: whole agents' loops, streams and parsed arguments, on the base, an adapter and a blend."""

import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import openai
import pydantic
import pytest
import torch
import transformers
from openai import AsyncOpenAI

from tests.server.served_world import Served, served
from tests.server.tool_worlds import NO_TOOLS, TEMPLATES, hf
from tests.support.peft_adapters import write_adapter


def write_base(folder: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = write_base(tmp_path_factory.mktemp("base"), hf(TEMPLATES["hermes"]))
    roots = tmp_path_factory.mktemp("roots")
    for seed, name in enumerate(("tone", "domain")):
        write_adapter(base, roots / name, rank=4, seed=seed, scale=0.5)
    return base, roots


@contextlib.asynccontextmanager
async def agents(base: Path, roots: Path) -> AsyncIterator[tuple[AsyncOpenAI, Served]]:
    """A client of a server in this process."""
    adapters = [f"{name}={roots / name}" for name in os.listdir(roots)]
    async with served(roots, model=str(base), served_model_name="base", adapter=adapters) as world:
        transport = httpx2.ASGITransport(world.http._transport.app)
        async with (
            httpx2.AsyncClient(transport=transport) as http,
            AsyncOpenAI(
                base_url="http://localhost/v1", api_key="x", max_retries=0, http_client=http
            ) as client,
        ):
            yield client, world


@pytest.fixture
async def client(folders: tuple[Path, Path]) -> AsyncIterator[AsyncOpenAI]:
    async with agents(*folders) as (client, _):
        yield client


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: Literal["Köln", "Wien"]
    days: Annotated[int, pydantic.Field(ge=0, le=99)]
    unit: Literal["c", "f"] | None


class Clock(pydantic.BaseModel):
    """Tells the time."""

    zone: Literal["utc", "cet"]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
MODELS: dict[str, type[pydantic.BaseModel]] = {"Weather": Weather, "Clock": Clock}
ASKED: list[Any] = [{"role": "user", "content": "What is it like </tool_call> there?"}]
BLEND = {"adapters": [{"name": "tone", "weight": 0.7}, {"name": "domain", "weight": -0.5}]}
WAYS = [("base", None), ("tone", None), ("base", BLEND)]


async def called(client: AsyncOpenAI, **more: Any) -> list[Any]:
    """A chat after three turns of calls and their results."""
    messages = list(ASKED)
    for turn in range(3):
        answer = await client.chat.completions.create(
            model="base", messages=messages, tools=TOOLS, tool_choice="required",
            parallel_tool_calls=turn == 1, temperature=1.0, seed=turn, max_tokens=1500, **more,
        )  # fmt: skip
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        messages.append(choice.message.to_dict())
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            assert call.type == "function"
            MODELS[call.function.name].model_validate_json(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "<|im_end|> 5"})
    return messages


async def test_an_agent_calls_is_told_and_answers(client: AsyncOpenAI):
    """Three turns of calls, then one of words."""
    messages = await called(client)
    last = await client.chat.completions.create(
        model="base", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=9
    )
    assert last.choices[0].message.content
    assert last.choices[0].message.tool_calls is None
    assert last.usage is not None
    assert last.usage.prompt_tokens > 200


async def test_an_agent_of_responses_calls_is_told_and_answers(client: AsyncOpenAI):
    items: list[Any] = list(ASKED)
    tools: list[Any] = [openai.pydantic_function_tool(Weather)["function"] | {"type": "function"}]
    asked: dict[str, Any] = {"model": "base", "tools": tools, "parallel_tool_calls": False}
    for seed in range(2):
        more = {"tool_choice": "required", "extra_body": BLEND | {"seed": seed}}
        async with client.responses.stream(
            input=items, **asked, **more, max_output_tokens=1500
        ) as stream:
            answer = await stream.get_final_response()
        assert answer.output
        items += [item.to_dict() for item in answer.output]
        for call in answer.output:
            assert call.type == "function_call"
            Weather.model_validate_json(call.arguments)
            items.append(
                {"type": "function_call_output", "call_id": call.call_id, "output": "<|im_end|> 5"}
            )
    last = await client.responses.create(
        input=items, **asked, tool_choice="none", max_output_tokens=9
    )
    assert [item.type for item in last.output] == ["message"]
    assert last.usage is not None
    assert last.usage.input_tokens > 150


@pytest.mark.parametrize(("model", "extra"), WAYS)
async def test_calls_are_parsed_into_models_and_a_random_one_calls_nothing_by_itself(
    client: AsyncOpenAI, model: str, extra: dict | None
):
    asked: dict[str, Any] = {"model": model, "messages": ASKED, "extra_body": extra, "n": 3}
    asked |= {"temperature": 1.0, "seed": 7, "max_tokens": 300}
    answer = await client.chat.completions.parse(
        **asked, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "Weather"}}
    )
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)
    free = await client.chat.completions.create(**asked | {"max_tokens": 40}, tools=TOOLS)
    assert all(not choice.message.tool_calls for choice in free.choices), "the check cannot fail"


@pytest.mark.parametrize(("model", "extra"), WAYS)
async def test_a_stream_is_the_whole_answer(client: AsyncOpenAI, model: str, extra: dict | None):
    asked: dict[str, Any] = {
        "model": model, "messages": ASKED, "tools": TOOLS, "tool_choice": "required", "n": 2,
        "temperature": 1.0, "seed": 3, "max_tokens": 1500, "extra_body": extra, "logprobs": True,
        "stop": ["e"], "parallel_tool_calls": model == "base" and extra is None,
    }  # fmt: skip
    whole = await client.chat.completions.create(**asked)
    calls: list[dict[int, list[str]]] = [{}, {}]
    finish: list[str | None] = [None, None]
    scores = [0, 0]
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            finish[choice.index] = choice.finish_reason or finish[choice.index]
            scores[choice.index] += len(choice.logprobs.content or ()) if choice.logprobs else 0
            for part in choice.delta.tool_calls or ():
                assert part.function
                found = calls[choice.index].setdefault(part.index, ["", ""])
                found[0] += part.function.name or ""
                found[1] += part.function.arguments or ""
    for choice in whole.choices:
        expected = [
            [c.function.name, c.function.arguments] for c in choice.message.tool_calls or ()
        ]
        assert list(calls[choice.index].values()) == expected
        assert finish[choice.index] == choice.finish_reason == "tool_calls"
        assert choice.logprobs
        assert scores[choice.index] == len(choice.logprobs.content or ())
    assert whole.choices[0].message != whole.choices[1].message


async def test_the_clients_own_stream_reads_the_calls(client: AsyncOpenAI):
    async with client.chat.completions.stream(
        model="base", messages=ASKED, tools=TOOLS, tool_choice="required", seed=1,
        parallel_tool_calls=False, max_tokens=400,
    ) as stream:  # fmt: skip
        done = [
            event async for event in stream if event.type == "tool_calls.function.arguments.done"
        ]
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather | Clock)
    assert [json.loads(event.arguments) for event in done] == [json.loads(call.function.arguments)]


async def test_a_base_whose_template_has_no_tools_says_so(tmp_path: Path):
    base = write_base(tmp_path / "base", hf(NO_TOOLS["silent"]))
    (tmp_path / "roots").mkdir()
    async with agents(base, tmp_path / "roots") as (client, world):
        with pytest.raises(openai.BadRequestError, match="chat template") as caught:
            await client.chat.completions.create(model="base", messages=ASKED, tools=TOOLS)
        assert caught.value.param == "tools"
        answer = await client.chat.completions.create(
            model="base", messages=ASKED, tools=TOOLS, tool_choice="none", max_tokens=3
        )
        assert answer.choices[0].message.content is not None
        assert world.engine.stats().running == 0
