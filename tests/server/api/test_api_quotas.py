"""Requests and tokens a minute: counted when a call is admitted, given back when it had no use."""

import pytest

from fader_server.api.quotas import Bucket, Quotas
from fader_server.errors import Overloaded, TenantBusy
from fader_server.tenants import Tenant, digest_of
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
