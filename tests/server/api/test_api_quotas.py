"""Requests and tokens a minute: counted when a call is admitted, given back when it had no use."""

import asyncio

import pytest

from fader_server.api.quotas import Bucket, Quotas
from fader_server.errors import Overloaded, TenantBusy
from fader_server.tenants import Tenant, digest_of
from tests.server.api.api_fakes import MAX_LEN
from tests.server.api.conftest import asgi


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_is_full_at_first_and_fills_evenly():
    clock = Clock()
    bucket = Bucket(60, clock)
    assert [bucket.take(20) for _ in range(4)] == [0, 0, 0, pytest.approx(20)]
    clock.now += 19.5
    assert bucket.take(20) == pytest.approx(0.5)
    clock.now += 0.5
    assert bucket.take(20) == 0
    clock.now += 1000
    assert bucket.take(61) == 0, "more than fits is taken from a full one"
    assert bucket.take(1) == pytest.approx(2), "and paid for before anybody is next"
    bucket.give_back(1000)
    assert [bucket.take(60), bucket.take(1)] == [0, pytest.approx(1)]


def quotas(clock: Clock, **limits: int) -> Quotas:
    return Quotas([Tenant("a", (), **limits), Tenant("b", ())], clock)


def test_a_call_that_is_refused_for_its_tokens_is_no_request():
    both = quotas(Clock(), requests_per_minute=2, tokens_per_minute=100)
    both.admit("a", 90)
    for _ in range(5):
        with pytest.raises(TenantBusy, match="tokens") as error:
            both.admit("a", 20)
        assert error.value.retry_after == 6
    both.admit("a", 10)
    with pytest.raises(TenantBusy, match="requests") as error:
        both.admit("a", 0)
    assert error.value.retry_after == 30
    for _ in range(9):
        both.admit("b", 1000)
        both.admit("key-id", 1000)


def test_what_a_call_did_not_need_is_given_back_once():
    tokens = quotas(Clock(), tokens_per_minute=100)
    one = tokens.admit("a", 100)
    one.end(30)
    one.end(0)
    one.refused()
    with pytest.raises(TenantBusy):
        tokens.admit("a", 71)
    two = tokens.admit("a", 70)
    two.end(80)
    with pytest.raises(TenantBusy):
        tokens.admit("a", 1)


def test_a_call_that_never_began_counts_for_nothing():
    both = quotas(Clock(), requests_per_minute=1, tokens_per_minute=100)
    for _ in range(5):
        both.admit("a", 100).refused()
    both.admit("a", 100).end(0)
    with pytest.raises(TenantBusy, match="requests"):
        both.admit("a", 1)


TENANTS = (
    Tenant("few", (digest_of("sk-few"),), requests_per_minute=2),
    Tenant("short", (digest_of("sk-short"),), tokens_per_minute=20),
    Tenant("free", (digest_of("sk-free"),)),
)


async def status(client, key: str, **more: object) -> tuple[int, str | None]:
    body = {"model": "tone", "prompt": "xxxx", "max_tokens": 3} | more
    headers = {"authorization": f"Bearer {key}"}
    answer = await client.post("/v1/completions", json=body, headers=headers)
    return answer.status_code, answer.headers.get("retry-after")


async def test_beyond_its_quota_a_tenant_gets_429_and_others_do_not(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        assert [await status(client, "sk-few") for _ in range(3)] == [
            (200, None), (200, None), (429, "30"),
        ]  # fmt: skip
        assert (await status(client, "sk-few", model="nobody"))[0] == 404
        assert {(await status(client, "sk-free"))[0] for _ in range(9)} == {200}
    assert world.idle


async def test_tokens_that_were_not_drawn_are_given_back(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        # 4 of the prompt and 16 that it may draw are all 20; it stops at its second
        assert await status(client, "sk-short", max_tokens=16, stop="r") == (200, None)
        assert (await status(client, "sk-short", max_tokens=6, n=2))[0] == 429, "16 of 14"
        assert (await status(client, "sk-short", max_tokens=5, n=2))[0] == 200, "14 of 14"
        assert (await status(client, "sk-short", max_tokens=1))[0] == 429
    assert world.idle


async def test_what_the_engine_refuses_is_not_counted(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        world.engine.refuse = Overloaded("full")
        assert {(await status(client, "sk-few"))[0] for _ in range(5)} == {503}
        world.engine.refuse = None
        assert [(await status(client, "sk-few"))[0] for _ in range(3)] == [200, 200, 429]
    assert world.idle


def test_other_limits_start_full_and_the_same_ones_go_on():
    both = quotas(Clock(), requests_per_minute=1, tokens_per_minute=100)
    both.admit("a", 100)
    both.replace([Tenant("a", (), requests_per_minute=2, tokens_per_minute=100), Tenant("b", ())])
    with pytest.raises(TenantBusy, match="tokens"):
        both.admit("a", 1)
    both.replace([Tenant("a", (), requests_per_minute=2)])
    both.admit("a", 1000)
    both.admit("a", 1000)
    with pytest.raises(TenantBusy, match="requests"):
        both.admit("a", 1)
    both.replace([])
    both.admit("a", 1000)


def test_what_is_left_is_told_as_openai_tells_it():
    clock = Clock()
    both = quotas(clock, requests_per_minute=600, tokens_per_minute=100)

    def told() -> dict[str, str]:
        return {
            name.removeprefix("x-ratelimit-"): value for name, value in both.headers("a").items()
        }

    assert told() == {
        "limit-requests": "600", "remaining-requests": "600", "reset-requests": "0s",
        "limit-tokens": "100", "remaining-tokens": "100", "reset-tokens": "0s",
    }  # fmt: skip
    both.admit("a", 250)
    assert told() == {
        "limit-requests": "600", "remaining-requests": "599", "reset-requests": "100ms",
        "limit-tokens": "100", "remaining-tokens": "0", "reset-tokens": "2m30s",
    }  # fmt: skip
    clock.now += 92.4
    assert told() == {
        "limit-requests": "600", "remaining-requests": "600", "reset-requests": "0s",
        "limit-tokens": "100", "remaining-tokens": "4", "reset-tokens": "57.6s",
    }  # fmt: skip
    assert both.headers("b") == both.headers("") == {}


async def ask(client, key: str, **more: object):
    body = {"model": "tone", "prompt": "xxxx", "max_tokens": 3} | more
    headers = {"authorization": f"Bearer {key}"}
    return await client.post("/v1/completions", json=body, headers=headers)


async def test_answers_streams_and_refusals_say_what_is_left(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        answers = [await ask(client, "sk-few", stream=stream) for stream in (False, True, False)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        names = ("limit-requests", "remaining-requests", "remaining-tokens")
        told = [[a.headers.get(f"x-ratelimit-{name}") for name in names] for a in answers]
        assert told == [["2", "1", None], ["2", "0", None], ["2", "0", None]]
        reset = answers[2].headers["x-ratelimit-reset-requests"]
        assert 58 < float(reset.removesuffix("s").removeprefix("1m")) + 60 * ("m" in reset) <= 60
        assert "retry-after" in answers[2].headers
        free = await ask(client, "sk-free")
        assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert world.idle


async def test_a_whole_answer_tells_what_it_did_not_need(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        answer = await ask(client, "sk-short", max_tokens=16, stop="r")
        used = answer.json()["usage"]["total_tokens"]
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert 20 - used <= left <= 20 - used + 1, "some may have come back since"
    assert world.idle


CAPPED = (
    Tenant("capped", (digest_of("sk-capped"),), max_tokens=5, tokens_per_minute=1000),
    Tenant("wide", (digest_of("sk-wide"),), max_tokens=20),
    Tenant("free", (digest_of("sk-free"),)),
)
CHAT = {"model": "tone", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "tone", "prompt": "x"}
RESPONSE = {"model": "tone", "input": "x"}


@pytest.mark.parametrize(
    ("path", "body", "key", "most"),
    [
        ("/v1/chat/completions", CHAT, "sk-capped", 5),
        ("/v1/chat/completions", CHAT | {"max_tokens": None}, "sk-capped", 5),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 4}, "sk-capped", 4),
        ("/v1/responses", RESPONSE, "sk-capped", 5),
        ("/v1/responses", RESPONSE | {"max_output_tokens": 4}, "sk-capped", 4),
        ("/v1/completions", COMPLETION, "sk-capped", 5),
        ("/v1/completions", COMPLETION, "sk-wide", 16),
        ("/v1/completions", COMPLETION | {"max_tokens": 20}, "sk-wide", 20),
        ("/v1/completions", COMPLETION | {"max_tokens": 21}, "sk-free", 21),
    ],
)
async def test_a_tenants_answers_have_a_length_at_most(worlds, path, body, key, most):
    world = worlds(tenants=CAPPED)
    async with asgi(world, authorization=f"Bearer {key}") as client:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
    assert [request.params.max_tokens for request in world.engine.seen] == [most]
    await world.until(lambda: world.idle)


async def test_without_a_cap_a_chat_has_what_the_context_holds(worlds):
    world = worlds(tenants=CAPPED)
    async with asgi(world, authorization="Bearer sk-free") as client:
        await client.post("/v1/chat/completions", json=CHAT)
    (request,) = world.engine.seen
    assert request.params.max_tokens == MAX_LEN - len(request.prompt)


async def test_a_cap_is_no_promise_beyond_the_context(worlds):
    world = worlds(tenants=CAPPED)
    async with asgi(world, authorization="Bearer sk-wide") as client:
        long = {"role": "user", "content": "x" * (MAX_LEN - 10)}
        await client.post("/v1/chat/completions", json=CHAT | {"messages": [long]})
    (request,) = world.engine.seen
    assert 0 < request.params.max_tokens == MAX_LEN - len(request.prompt) < 20


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"max_tokens": 6}, "max_tokens"),
        ("/v1/chat/completions", CHAT | {"max_completion_tokens": 6}, "max_completion_tokens"),
        ("/v1/chat/completions", CHAT | {"min_tokens": 6}, "min_tokens"),
        ("/v1/responses", RESPONSE | {"max_output_tokens": 6}, "max_output_tokens"),
        ("/v1/completions", COMPLETION | {"max_tokens": 6}, "max_tokens"),
    ],
)
async def test_more_than_a_tenant_may_ask_for_is_named(worlds, path, body, param):
    world = worlds(tenants=CAPPED)
    async with asgi(world, authorization="Bearer sk-capped") as client:
        error = (await client.post(path, json=body)).json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert "to 5" in error["message"]
    assert world.engine.seen == []


async def test_a_call_without_a_length_counts_as_its_cap(worlds):
    world = worlds(tenants=CAPPED)
    world.engine.gate.clear()
    async with asgi(world, authorization="Bearer sk-capped") as client:
        call = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        await world.until(lambda: world.engine.open == 1)
        (request,) = world.engine.seen
        left = world.app.state.context.generator.quotas.headers("capped")
        world.engine.gate.set()
        await call
    taken = 1000 - int(left["x-ratelimit-remaining-tokens"])
    assert len(request.prompt) + 4 <= taken <= len(request.prompt) + 5
