"""Tenants of a whole server: beside a flood the other waits for a row, not for the flood."""

import asyncio
from pathlib import Path

import pytest

from fader_server import demo
from fader_server.engine.line import Line
from fader_server.ondemand import OnDemand
from fader_server.tenants import Tenant
from tests.server.engine.engine_world import by_arrival
from tests.server.served_world import Served, served

FLOOD = 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "tenants.toml").write_text(
        '[x]\nkeys = ["key-x"]\nmax_waiting = 30\n[y]\nkeys = ["key-y"]\nmax_share = 0.5\n'
    )
    return tmp_path / "adapters"


def flags(root: Path) -> dict[str, str]:
    return {"tenants": str(root.parent / "tenants.toml"), "max_batch_rows": "2"}


async def ask(server: Served, tenant: str, number: int, done: list[str], **more: object) -> int:
    body = {
        "model": demo.SERVED_NAME,
        "prompt": f"{number} is a number",
        "max_tokens": 24,
        "ignore_eos": True,
    }
    headers = {"authorization": f"Bearer key-{tenant}"}
    answer = await server.http.post("/v1/completions", json=body | more, headers=headers)
    done.append(tenant)
    return answer.status_code


async def answers_before(server: Served) -> int:
    """How many of a flood are answered before somebody else who asks after it."""
    done: list[str] = []
    flood = [asyncio.create_task(ask(server, "x", i, done)) for i in range(FLOOD)]
    await server.until(lambda: server.engine.stats().waiting == FLOOD - 2)
    assert await ask(server, "y", 99, done, max_tokens=8) == 200
    before = len(done) - 1
    assert await asyncio.gather(*flood) == [200] * FLOOD
    return before


async def test_who_asks_beside_a_flood_waits_for_a_row_only(root):
    async with served(root, **flags(root)) as server:
        assert await answers_before(server) <= 6
        told = server.engine.stats().tenants
        assert {name: (s.running, s.waiting) for name, s in told.items()} == {
            "x": (0, 0),
            "y": (0, 0),
        }
        assert told["x"].tokens > FLOOD * 24
        text = (await server.http.get("/metrics")).text
        assert f'fader_tenant_tokens_total{{tenant="x"}} {float(told["x"].tokens)}' in text


async def test_weights_and_bounds_hold_where_tenants_wait_for_room_too(root):
    file = root.parent / "tenants.toml"
    file.write_text('[x]\nkeys = ["key-x"]\nweight = 3\nmax_waiting = 1\n[y]\nkeys = ["y"]\n')
    async with served(root, **flags(root)) as server:
        adapters = server.world.adapters
        assert isinstance(adapters, OnDemand)
        line = adapters._line
        assert line._weights == {"x": 3.0}
        with line.joined(frozenset({"a"}), None, tenant="x"):
            assert await ask(server, "x", 1, []) == 429
        assert await ask(server, "x", 1, []) == 200
        server.world.share((Tenant("y", (), weight=2.0),))
        assert line._weights == {"y": 2.0}


async def test_a_line_by_arrival_would_be_noticed(root, monkeypatch):
    monkeypatch.setattr(Line, "in_turn", by_arrival)
    async with served(root, **flags(root)) as server:
        assert await answers_before(server) > 15


async def test_more_than_a_tenant_may_have_in_the_queue_is_429_for_it_alone(root):
    async with served(root, **flags(root)) as server:
        done: list[str] = []
        tasks = [asyncio.create_task(ask(server, "x", i, done)) for i in range(40)]
        other = await ask(server, "y", 1, done)
        statuses = await asyncio.gather(*tasks)
        assert other == 200
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 30
        assert await ask(server, "x", 50, done) == 200
