import asyncio
from dataclasses import replace

import httpx
import pytest

from fader_server.bench.client import Ask, BenchClient, Sample
from tests.server.bench.bench_fake import FakeServer, FakeTransport

ASK = Ask("a0", (1, 2, 3), 5)


async def sample_of(server: FakeServer) -> Sample:
    transport = FakeTransport(server)
    async with BenchClient(
        "http://fake", timeout=5, transport=transport, clock=transport.clock
    ) as client:
        return await client.ask(ASK)


async def test_good_stream_is_timed_to_the_event():
    sample = await sample_of(FakeServer(first=0.25, gap=0.5))
    assert sample.fault is None
    assert [t - sample.due for t in sample.token_times] == [0.25, 0.75, 1.25, 1.75, 2.25]
    assert (sample.end - sample.due, sample.output_tokens) == (2.25, 5)
    assert (sample.text, sample.fingerprint) == (" a0" * 5, "fp-1")


async def test_request_asks_for_exact_lengths():
    server = FakeServer()
    await sample_of(server)
    (body,) = server.asked
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (5, 5, True)
    assert (body["prompt"], body["temperature"], body["stream"]) == ([1, 2, 3], 0, True)


async def test_drawn_answers_have_a_seed_of_their_prompt():
    server = FakeServer()
    transport = FakeTransport(server)
    async with BenchClient(
        "http://fake", timeout=5, temperature=0.7, transport=transport, clock=transport.clock
    ) as client:
        other = replace(ASK, prompt=(1, 2, 4))
        for ask in (ASK, ASK, other):
            await client.ask(ask)
    first, second, third = server.asked
    assert first["temperature"] == 0.7
    assert first["seed"] == second["seed"] != third["seed"]
    await sample_of(server)
    assert "seed" not in server.asked[-1]


@pytest.mark.parametrize(
    ("defect", "kind"),
    [
        ("http", "http_503"),
        ("short", "output_length"),
        ("prompt", "prompt_length"),
        ("cached", "cached_prompt"),
        ("finish", "finish_reason"),
        ("error", "stream_error"),
        ("garbage", "protocol"),
        ("no_usage", "no_usage"),
        ("no_done", "no_done"),
    ],
)
async def test_defect_is_a_fault_of_its_own_kind(defect, kind):
    sample = await sample_of(FakeServer(defect=defect))
    assert sample.fault is not None
    assert sample.fault.kind == kind
    assert sample.output_tokens == 0


async def test_refused_connection_and_silence_are_faults():
    async def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    async def hang(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    for handler, kind in ((refuse, "connection"), (hang, "timeout")):
        transport = httpx.MockTransport(handler)
        async with BenchClient("http://fake", timeout=0.05, transport=transport) as client:
            sample = await client.ask(ASK)
        assert sample.fault is not None
        assert sample.fault.kind == kind


async def test_key_is_sent_as_a_bearer_token():
    seen = []

    async def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(401)

    transport = httpx.MockTransport(handler)
    for key in ("secret", None):
        async with BenchClient(
            "http://fake", timeout=1, api_key=key, transport=transport
        ) as client:
            await client.ask(ASK)
    assert seen == ["Bearer secret", None]
