"""What a call leaves open is chosen as the base's own files say; what it says stands."""

import dataclasses
import json

import pytest

from fader_server.api.choosing import Usual, usual_of
from fader_server.text.files import generation_config
from tests.server.api.conftest import asgi

QWEN = {
    "bos_token_id": 1, "do_sample": True, "eos_token_id": [2, 3], "repetition_penalty": 1.05,
    "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0",
}  # fmt: skip
USUAL = Usual(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1, repetition_penalty=1.05)


async def params(world, path="/v1/completions", **body):
    asked = {"prompt": "x"} if path == "/v1/completions" else {"messages": [ROLE]}
    async with asgi(world) as client:
        answer = await client.post(path, json={"model": "base", **asked, **body})
        assert answer.status_code == 200, answer.text
    return world.engine.seen[-1].params


ROLE = {"role": "user", "content": "x"}


def of(chosen) -> Usual:
    return Usual(**{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Usual)})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_what_a_call_leaves_open_is_as_the_base_says(worlds, path):
    assert of(await params(worlds(), path)) == Usual()
    assert of(await params(worlds(usual=USUAL), path)) == USUAL
    nulls = {"temperature": None, "top_k": None, "repetition_penalty": None}
    assert of(await params(worlds(usual=USUAL), path, **nulls)) == USUAL


async def test_what_a_call_says_stands_also_where_it_is_openais_default(worlds):
    said = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    assert of(await params(worlds(usual=USUAL), **said)) == Usual()
    assert of(await params(worlds(usual=USUAL), top_k=-1)) == dataclasses.replace(USUAL, top_k=0)
    greedy = await params(worlds(usual=USUAL), temperature=0)
    assert (greedy.temperature, greedy.repetition_penalty) == (0, 1.05)


@pytest.mark.parametrize(
    ("given", "meant"), [(1e-5, 1e-5), (9.9e-6, 0), (1e-50, 0), (5e-324, 0), (0, 0)]
)
async def test_temperatures_that_are_as_good_as_zero_are_zero(worlds, given, meant):
    assert (await params(worlds(), temperature=given)).temperature == meant
    assert (await params(worlds(usual=USUAL), temperature=given)).temperature == meant
    assert usual_of({"temperature": given}).temperature == meant


def test_a_file_counts_by_its_own_words_and_not_by_what_is_wrong(tmp_path):
    assert generation_config(str(tmp_path)) == {}
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(QWEN))
    assert usual_of(generation_config(str(tmp_path))) == dataclasses.replace(USUAL, min_p=0.0)
    for broken in ("{", "[]", ""):
        file.write_text(broken)
        assert generation_config(str(tmp_path)) == {}
    odd = {"temperature": "warm", "top_k": None, "top_p": 7, "repetition_penalty": 0, "min_p": 0.2}
    assert usual_of(odd) == Usual(min_p=0.2)


async def test_an_effort_reaches_the_template_and_any_other_word_does_not(world):
    async def tokens(**body):
        await params(world, "/v1/chat/completions", **body)
        return bytes(world.engine.seen[-1].prompt)

    plain = await tokens()
    assert await tokens(reasoning_effort="none") == b"effort:none\n" + plain
    assert await tokens(reasoning_effort="high") == b"effort:high\n" + plain
    for other in (None, "", "auto", 3, True, ["low"], {"effort": "low"}):
        assert await tokens(reasoning_effort=other) == plain
