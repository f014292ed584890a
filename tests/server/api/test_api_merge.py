"""/v1/merge and its metrics, over a fake lane."""

from dataclasses import replace
from typing import Any

import pytest

from fader_server.api.adapter_ports import Lease
from fader_server.api.merge_ports import LaneInfo, MergeJob, MergeOrder, MergeStatus
from fader_server.api.traffic import Traffic
from fader_server.errors import MergeBusy, MergeNoMemory, MergeNotFound
from tests.server.api.api_fakes import World, digest
from tests.server.api.conftest import asgi

KEYS = {"api_key": ("user-key",), "admin_key": "admin-key"}
BODY = {"adapters": [{"name": "tone", "weight": 0.7}, {"name": "domain", "weight": -0.2}]}
REPORT = {"overall": {"relative_error": 0.5}, "linears": [], "probe": {"kl": 0.01}}


class FakeMerging:
    """Holds the lease of the merge under way until the test ends it."""

    def __init__(self) -> None:
        self.now = MergeStatus()
        self.orders: list[MergeOrder] = []
        self.fault: Exception | None = None
        self.traffic = Traffic()
        self.held: Lease | None = None

    def status(self) -> MergeStatus:
        return self.now

    async def start(self, order: MergeOrder, lease: Lease) -> MergeStatus:
        if self.fault is not None:
            lease.release()
            raise self.fault
        self.orders.append(order)
        self.held = lease
        job = MergeJob(tuple(lease.terms), lease.blend.digest, order.form, "merging", 0.25, 4096)
        self.now = MergeStatus(job=job)
        return self.now

    async def drop(self) -> MergeStatus:
        if self.now == MergeStatus():
            raise MergeNotFound("nothing is merged: there is no lane to drop")
        self.now = MergeStatus()
        return self.now

    def finish(self) -> None:
        assert self.held is not None
        job = self.now.job
        assert job is not None
        key = digest("lane")
        lane = LaneInfo(job.terms, job.digest, key, job.form, 2048, 1.5, 1700000000, REPORT)
        self.now = MergeStatus(lane=lane, requests=3, leaving_bytes=100)
        self.held.release()


@pytest.fixture
def merging() -> FakeMerging:
    return FakeMerging()


@pytest.fixture
def world(worlds, merging) -> World:
    return worlds(merging=merging)


async def test_a_lane_is_ordered_watched_and_dropped(client, merging):
    before = (await client.get("/v1/merge")).json()
    assert before == {
        "object": "merge",
        "state": "none",
        "lane": None,
        "job": None,
        "requests": 0,
        "leaving_bytes": 0,
    }
    started = await client.post("/v1/merge", json=BODY | {"dtype": "bf16", "force": True})
    assert started.status_code == 202
    assert merging.orders == [MergeOrder("bf16", "keep", True)]
    job = started.json()["job"]
    assert (job["stage"], job["progress"], job["bytes"]) == ("merging", 0.25, 4096)
    assert [(t["name"], t["weight"]) for t in job["adapters"]] == [("tone", 0.7), ("domain", -0.2)]
    assert started.json()["state"] == "merging"
    merging.finish()
    ready = (await client.get("/v1/merge")).json()
    assert ready["state"] == "ready"
    assert ready["lane"]["report"] == REPORT
    assert ready["lane"]["bytes"] == 2048
    assert (ready["requests"], ready["leaving_bytes"]) == (3, 100)
    dropped = await client.delete("/v1/merge")
    assert dropped.json()["state"] == "none"
    again = await client.delete("/v1/merge")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "merge_not_found")


async def test_the_dtype_is_the_settings_unless_the_body_says_other(worlds, merging):
    world = worlds(merging=merging, merge_dtype="bf16")
    async with asgi(world) as client:
        await client.post("/v1/merge", json=BODY)
        merging.finish()
        await client.post("/v1/merge", json=BODY | {"dtype": "nf4", "rounding": "plain"})
        merging.finish()
    assert [(o.form, o.rounding) for o in merging.orders] == [("bf16", "keep"), ("nf4", "plain")]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "blend_invalid", "adapters"),
        ({"adapters": []}, 400, "blend_invalid", "adapters"),
        ({"adapters": [{"name": "tone"}, {"name": "tone"}]}, 400, "blend_invalid", "adapters"),
        ({"adapters": [{"name": "nobody"}]}, 404, "model_not_found", "model"),
        ({"recipe": "nobody"}, 404, "model_not_found", "model"),
        (BODY | {"recipe": "warm"}, 400, None, "recipe"),
        (BODY | {"dtype": "int8"}, 400, None, "dtype"),
        (BODY | {"rounding": "up"}, 400, None, "rounding"),
        (BODY | {"force": "yes"}, 400, None, "force"),
        (BODY | {"adaptors": []}, 400, None, "adaptors"),
    ],
)
async def test_a_wrong_order_is_refused_by_name(client, merging, world, body, status, code, param):
    answer = await client.post("/v1/merge", json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert merging.orders == []
    assert world.adapters.leases == 0


async def test_a_recipe_is_merged_by_its_name(client, merging):
    assert (await client.put("/v1/recipes/warm", json=BODY)).status_code == 201
    started = await client.post("/v1/merge", json={"recipe": "warm"})
    assert started.status_code == 202
    terms = started.json()["job"]["adapters"]
    assert [(t["name"], t["weight"]) for t in terms] == [("tone", 0.7), ("domain", -0.2)]
    merging.finish()


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (MergeBusy("a merge is merging, 10% done"), 409, "merge_busy"),
        (MergeNoMemory("the lane needs 5 bytes"), 507, "merge_no_memory"),
    ],
)
async def test_a_lane_that_cannot_be_made_now_is_not_retried(
    client, merging, world, fault, status, code
):
    merging.fault = fault
    answer = await client.post("/v1/merge", json=BODY)
    assert answer.status_code == status
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["message"] == str(fault)
    assert world.adapters.leases == 0
    merging.fault = None
    assert (await client.post("/v1/merge", json=BODY)).status_code == 202
    merging.finish()


async def test_what_was_refused_says_why(client, merging):
    await client.post("/v1/merge", json=BODY)
    merging.finish()
    job = MergeJob((), digest("x"), "nf4", "refused", 0.9, 1, "too far from the blend", REPORT)
    merging.now = replace(merging.now, lane=None, job=job)
    told: dict[str, Any] = (await client.get("/v1/merge")).json()
    assert told["state"] == "refused"
    assert told["job"]["reason"] == "too far from the blend"
    assert told["job"]["report"] == REPORT


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
async def test_the_lane_is_the_administrators(worlds, merging, method):
    world = worlds(merging=merging, **KEYS)
    for key, allowed in (("user-key", False), ("admin-key", True)):
        async with asgi(world, authorization=f"Bearer {key}") as client:
            answer = await client.request(method, "/v1/merge", json=BODY)
        assert (answer.status_code != 403) is allowed
    if merging.held is not None:
        merging.held.release()


async def test_a_server_without_lanes_has_no_route(worlds):
    async with asgi(worlds()) as client:
        assert (await client.get("/v1/merge")).status_code == 404
        assert "fader_merge" not in (await client.get("/metrics")).text


async def test_the_lane_is_in_the_metrics(client, merging):
    async def line(start: str) -> float:
        text = (await client.get("/metrics")).text
        (found,) = [row for row in text.splitlines() if row.startswith(start + " ")]
        return float(found.split()[-1])

    assert await line('fader_merge_state{state="none"}') == 1
    await client.post("/v1/merge", json=BODY)
    assert await line('fader_merge_state{state="merging"}') == 1
    assert await line('fader_merge_state{state="none"}') == 0
    assert await line("fader_merge_progress") == 0.25
    merging.finish()
    assert await line('fader_merge_state{state="ready"}') == 1
    assert await line("fader_merge_progress") == 1
    assert await line("fader_merge_bytes") == 2148
    assert await line("fader_merge_requests") == 3
    assert await line('fader_merge_tokens_total{lane="merged"}') == 0
    merging.now = replace(merging.now, decisions={"merge": 2})
    assert await line('fader_merge_decisions_total{decision="merge"}') == 2


async def test_tokens_are_counted_by_blend_for_who_asks(client, merging):
    body = {"model": "base", "prompt": "x", "max_tokens": 4} | BODY
    assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert (await client.post("/v1/completions", json=body | {"adapters": None})).status_code == 200
    tokens, terms = merging.traffic.take()
    assert set(tokens) == set(terms)
    assert sorted(len(key) for key in tokens) == [0, 2]
    assert all(count > 0 for count in tokens.values())
