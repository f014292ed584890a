"""Messages in the shapes that clients of other servers send: what reaches the chat template, and
which message a refusal names."""

import json

import pytest

from tests.server.api.api_fakes import World
from tests.server.api.test_api_bodies import GOOD, check_envelope

ROUTE = "/v1/chat/completions"
USER = {"role": "user", "content": "x"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ROLES = ("system", "developer", "user", "assistant", "tool")


async def ask(client, *messages: object):
    body = json.dumps({**GOOD[ROUTE], "messages": messages})
    return await client.post(ROUTE, content=body, headers={"content-type": "application/json"})


def shown(world: World) -> list[str]:
    """The lines that the fake chat template made."""
    return bytes(world.engine.seen[-1].prompt).decode().splitlines()


def said(role: str, content: object = ...) -> list[dict]:
    """A chat whose last message has the role and content; `...`: it has none."""
    message = {"role": role} if content is ... else {"role": role, "content": content}
    if role != "tool":
        return [message]
    return [{"role": "assistant", "tool_calls": [CALL]}, {**message, "tool_call_id": "c1"}]


def text(value: object, kind: str = "text") -> dict:
    return {"type": kind, "text": value}


THOUGHT = {"type": "thinking", "thinking": "SECRET", "signature": "s"}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("content", "meant"),
    [
        ("ab", "ab"),
        ([text("a"), text("b")], "ab"),
        ([text("a", "input_text"), text("b", "output_text")], "ab"),
        (["a", "b"], "ab"),
        (["a", text("b") | {"cache_control": {"type": "ephemeral"}}], "ab"),
        ([THOUGHT, text("ab")], "ab"),
        ([{"type": "thinking", "thinking": [text("SECRET")]}, "ab"], "ab"),
        ([THOUGHT], ""),
    ],
)
async def test_text_has_many_shapes(client, world: World, role, content, meant):
    answer = await ask(client, *said(role, content))
    assert answer.status_code == 200, answer.text
    told = shown(world)[-1].partition("{")[0]
    assert told == f"{role}:{meant}"


@pytest.mark.parametrize("role", [role for role in ROLES if role != "user"])
@pytest.mark.parametrize("content", [None, ..., []])
async def test_nothing_said_is_empty_but_of_a_user(client, world: World, role, content):
    answer = await ask(client, *said(role, content))
    assert answer.status_code == 200, answer.text
    assert shown(world)[-1].partition("{")[0] == f"{role}:"
    assert (await ask(client, *said("user", content))).status_code == 400


@pytest.mark.parametrize(
    "part",
    [
        *(1, None, [], {}, "\ud800", text(None), text(1), text(["a"]), text("\ud800")),
        *({"text": "a"}, {"type": "text"}, {"type": 1, "text": "a"}, {"type": [], "text": "a"}),
        *({"type": "input_text", "input_text": "a"}, {"type": "refusal", "refusal": "a"}),
        *({"type": "summary", "text": "a"}, {"type": "tool_result", "content": "a"}),
    ],
)
async def test_what_is_no_text_is_refused(client, world: World, part):
    error = check_envelope(await ask(client, USER, {"role": "user", "content": ["a", part]}))
    assert error["param"] == "messages"
    assert error["message"].startswith("messages[1] must have content that is text")
    assert world.engine.seen == []


@pytest.mark.parametrize(
    "kind", ["image_url", "input_image", "image", "video_url", "input_audio", "audio_url"]
)
async def test_a_picture_or_a_sound_is_told_as_what_it_is(client, world: World, kind):
    part = {"type": kind, kind: {"url": "https://SECRET.example"}}
    answer = await ask(client, USER, {"role": "user", "content": [text("look"), part]})
    assert answer.status_code == 400
    error = check_envelope(answer)
    assert error["param"] == "messages"
    assert "messages[1]" in error["message"]
    assert "pictures and sound are not supported" in error["message"]
    assert "SECRET" not in error["message"]
    assert world.engine.seen == []


@pytest.mark.parametrize(
    "bad",
    [
        *(1, None, {}, {"role": 1, "content": "x"}, {"role": "root", "content": "x"}),
        *({"role": "user"}, {"role": "user", "content": 1}, {"role": "tool", "content": "x"}),
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
        {"role": "user", "content": "x", "refusal": "no"},
    ],
)
@pytest.mark.parametrize("before", [0, 3])
async def test_a_refusal_names_its_message(client, bad, before):
    error = check_envelope(await ask(client, *[USER] * before, bad, bad))
    assert error["param"] == "messages"
    assert error["message"].startswith(f"messages[{before}] ")
    assert f"messages[{before + 1}]" not in error["message"]


async def test_a_list_that_is_none_names_no_message(client):
    error = check_envelope(await ask(client))
    assert error["message"] == "messages must be a list of 1 to 4096 items"
