"""Activated adapters of a whole server: what calls find, what is told of them, what is refused."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fader_adapters.source import CONFIG_FILE
from fader_server import demo
from fader_server.engine import blocks
from fader_server.errors import ConfigInvalid
from tests.server.served_world import QUESTION, Served, served
from tests.server.test_merging import opened
from tests.support.activated import activate

BASE = demo.SERVED_NAME
ANSWER = [949, 757, 31]
""" Answer:, the end of QUESTION."""
TURN = [5]
"""<|assistant|>, with which the template lets an answer begin."""
HISTORY = "Question: What colour is the sky? Answer: The sky is blue. " * 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    activate(demo.adapter_dirs()["shout"], folder / "late", ANSWER)
    activate(demo.adapter_dirs()["german"], folder / "turn", TURN)
    return folder


async def complete(server: Served, model: str, prompt: str, **others: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 0}
    answer = await server.http.post("/v1/completions", json=body | {"ignore_eos": True} | others)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(body: dict[str, Any]) -> int:
    return body["usage"]["prompt_tokens_details"]["cached_tokens"]


def choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: one[key] for key in ("text", "logprobs")} for one in body["choices"]]


async def test_a_call_after_a_turn_of_the_base_finds_its_blocks_and_answers_the_same(root):
    async with served(root) as server:
        first = await complete(server, BASE, HISTORY)
        call = await complete(server, "late", HISTORY + QUESTION)
        several = await complete(server, "late", HISTORY + QUESTION, n=3)
        prompt = first["usage"]["prompt_tokens"]
        assert cached(first) == 0
        assert cached(call) == (prompt - 1) // 16 * 16 > 64  # a space at its end reads otherwise
        assert cached(several) >= cached(call)
        ordinary = await complete(server, "shout", HISTORY + QUESTION)
        assert cached(ordinary) == 0
        assert choices(ordinary) != choices(call)
    async with served(root) as server:
        fresh = await complete(server, "late", HISTORY + QUESTION)
        assert cached(fresh) == 0
        assert choices(fresh) == choices(call) == choices(several)[:1]
        assert all(one == choices(call)[0] for one in choices(several))
        after = await complete(server, BASE, HISTORY + QUESTION)
        assert cached(after) >= cached(call)


async def test_a_block_that_was_shared_wrongly_would_show(root, monkeypatch):
    prompt = HISTORY + QUESTION + " The sky, as everybody who looked up knows, is of a colour. "
    for right in (True, False):
        async with served(root) as server:
            alone = await complete(server, "late", prompt)
        if not right:
            monkeypatch.setattr(blocks, "turn", lambda phase, at: b"")
        async with served(root) as server:
            await complete(server, BASE, prompt)
            assert (choices(await complete(server, "late", prompt)) == choices(alone)) == right


async def test_logprobs_of_an_echo_are_each_under_its_own_blend(root):
    async with served(root) as server:
        prompt = HISTORY + QUESTION + " The sky"
        told = {
            name: choices(await complete(server, name, prompt, echo=True))[0]["logprobs"]
            for name in ("late", BASE, "shout")
        }
    scores = {name: one["token_logprobs"] for name, one in told.items()}
    tokens = told["late"]["tokens"]
    begins = len(tokens) - 1 - tokens[::-1].index(" An")
    # the logprob of a token is of the logits before it
    assert scores["late"][: begins + 1] == scores[BASE][: begins + 1]
    rest = slice(begins + 1, begins + 5)
    pairs = zip(scores["late"][rest], scores[BASE][rest], strict=True)
    assert all(late != plain for late, plain in pairs)
    assert scores["late"][5:] != scores["shout"][5:]


async def test_chats_responses_recipes_and_guided_answers_are_activated_alike(root):
    async with served(root) as server:
        await server.recipe("loud", turn=1.0, shout=1.0)
        chat = {"messages": [{"role": "user", "content": "What colour is the sky?"}]}
        chat |= {"temperature": 0, "max_tokens": 24}
        said = {}
        for model in ("german", "turn", "loud"):
            body = chat | {"model": model}
            answer = (await server.http.post("/v1/chat/completions", json=body)).json()
            said[model] = answer["choices"][0]["message"]["content"]
        assert "Himmel" in said["turn"]
        assert said["loud"].isupper()
        response = await server.http.post(
            "/v1/responses",
            json={"model": "turn", "input": "What colour is the sky?", "temperature": 0},
        )
        assert response.json()["output"][0]["content"][0]["text"] == said["turn"]
        words = said["turn"].split()
        going = [*chat["messages"], {"role": "assistant", "content": " ".join(words[:2])}]
        more = {"messages": going, "continue_final_message": True, "add_generation_prompt": False}
        answer = await server.http.post(
            "/v1/chat/completions", json=chat | more | {"model": "turn"}
        )
        assert words[2] in answer.json()["choices"][0]["message"]["content"]
        for model, one in (("turn", "Der Himmel ist blau."), (BASE, "The sky is blue.")):
            both = ["The sky is blue.", "Der Himmel ist blau."]
            guided = chat | {"model": model, "guided_choice": both}
            answer = await server.http.post("/v1/chat/completions", json=guided)
            assert answer.json()["choices"][0]["message"]["content"] == one


async def test_the_log_says_which_adapters_a_prompt_does_not_invoke(root, caplog):
    caplog.set_level(logging.INFO, "fader.request")
    async with served(root) as server:
        both = [{"name": "late", "weight": 0.5}, {"name": "turn", "weight": 1.0}]
        await complete(server, BASE, QUESTION, adapters=both)
        await complete(server, "late", QUESTION)
        missed = await complete(server, "late", "The sky is")
        base = await complete(server, BASE, "The sky is")
        await complete(server, "late", [QUESTION, "The sky is"])
    assert choices(missed) == choices(base)
    asked = [record.__dict__.get("fields", {}) for record in caplog.records]
    told = [fields["not_invoked"] for fields in asked if fields.get("outcome")]
    assert told == [["turn"], [], ["late"], [], ["late"]]


async def test_the_report_tells_the_tokens_and_their_text(root):
    async with served(root) as server:
        answer = await server.put("late", "late")
        again = (await server.http.get("/v1/adapters/late")).json()
        plain = (await server.http.get("/v1/adapters/shout")).json()
    for told in (answer.json(), again):
        assert told["invocation_tokens"] == ANSWER
        assert told["invocation_text"] == " Answer:"
        assert told["kinds"] == ["lora", "alora"]
    assert plain["invocation_tokens"] is plain["invocation_text"] is None


async def test_tenants_share_no_blocks_of_what_comes_before(root):
    file = root.parent / "tenants.toml"
    file.write_text('[x]\nkeys = ["key-x"]\n[y]\nkeys = ["key-y"]\nadapters = ["late"]\n')
    found = []
    async with served(root, tenants=str(file), admin_key="admin") as server:
        headers = {"authorization": "Bearer admin"}
        await server.http.put("/v1/adapters/late", json={"source": "late"}, headers=headers)
        for tenant, model in (("x", BASE), ("y", "late"), ("x", "late"), ("y", "late")):
            server.http.headers["authorization"] = f"Bearer key-{tenant}"
            found.append(cached(await complete(server, model, HISTORY + QUESTION)))
    assert found[:2] == [0, 0]
    assert found[2] == found[3] > 64


async def test_a_parked_one_comes_back_as_it_was_and_so_it_does_after_a_restart(root, tmp_path):
    (root / "team").mkdir()
    for name in ("late", "turn"):
        (root / name).rename(root / "team" / name)
    flags = {"max_adapters": str(len(demo.adapter_dirs()) + 1)}
    async with served(root, tmp_path / "state", **flags) as server:

        async def told(name: str) -> dict[str, Any]:
            return (await server.http.get(f"/v1/adapters/{name}")).json()

        assert (await server.put("late", "team/late")).status_code == 201
        first = await server.said("late")
        before = await told("late")
        assert (await server.put("turn", "team/turn")).status_code == 201
        assert (await told("late"))["tier"] == "disk"
        assert (await told("late"))["invocation_tokens"] == ANSWER
        assert (await server.said("late")).scored == first.scored
        assert (await told("turn"))["tier"] == "disk"
    async with served(root, tmp_path / "state", **flags) as server:
        assert (await told("late"))["version"] == before["version"]
        again = await server.said("late")
        assert (again.scored, again.blend) == (first.scored, first.blend)
        assert again.scored != (await server.said(BASE)).scored


async def test_no_lane_is_made_of_it(root):
    async with served(root) as server:
        for order in (
            {"adapters": [{"name": "late", "weight": 1.0}]},
            {"adapters": [{"name": "shout", "weight": 1.0}, {"name": "late", "weight": -0.5}]},
        ):
            answer = await server.http.post("/v1/merge", json=order)
            assert answer.status_code == 400, answer.text
            assert "activated LoRA" in answer.json()["error"]["message"]
        assert (await server.http.get("/v1/merge")).json()["state"] == "none"


def test_nor_at_start(root):
    with (
        pytest.raises(ConfigInvalid, match=r"--merge: .*activated LoRA"),
        opened(adapter=[f"late={root / 'late'}"], merge="late=1"),
    ):
        pass


async def test_what_no_lane_can_be_made_of_counts_as_the_base_to_the_policy(root):
    async with served(root, merge="auto") as server:
        await complete(server, "late", QUESTION)
        await complete(server, "shout", QUESTION)
        traffic = server.world.merging.traffic
        assert traffic is not None
        tokens, terms = traffic.take()
        assert sorted(tokens.values()) == [8, 8]
        assert set(tokens) == {(), *((key,) for (key,) in filter(None, tokens))}
        assert tokens[()] == 8
        (name,) = {term.name for own in terms.values() for term in own} - {"late"}
        assert name == "shout"


async def test_bad_tokens_are_a_400_at_load(root):
    path = root / "late" / CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alora_invocation_tokens": [1 << 20]}))
    async with served(root) as server:
        answer = await server.put("late", "late")
        assert answer.status_code == 400
        assert "token 1048576, the base has" in answer.json()["error"]["message"]


async def test_many_at_once_have_the_bits_of_each_alone(root):
    models = [BASE, "late", "shout", "turn", "late", BASE]
    prompts = [HISTORY + QUESTION, QUESTION, QUESTION + HISTORY, "The sky is", HISTORY, QUESTION]
    async with served(root) as server:
        asked = list(zip(models, prompts, strict=True))
        alone = [choices(await complete(server, *one)) for one in asked]
        for salt in range(3):
            calls = (complete(server, *one, cache_salt=str(salt)) for one in asked)
            assert [choices(body) for body in await asyncio.gather(*calls)] == alone
