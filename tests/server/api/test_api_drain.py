import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fader_server.errors import EngineFault
from fader_server.serving import bind, serve
from tests.server.api.api_fakes import TEXT, FakeStats, endless

BODY = {"model": "tone", "prompt": "x", "max_tokens": 99, "stream": True}


def own_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_drain_keeps_accepting_then_finishes_what_runs(worlds):
    world = worlds(drain_grace=30.0, drain_timeout=30.0, ping_interval=0.01)
    config = world.app.state.context.config
    world.engine.gate.clear()
    with bind(config) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server = asyncio.create_task(serve(world.app, sock))
        async with httpx.AsyncClient() as client:
            await asyncio.sleep(0.05)
            assert (await client.get(f"{url}/ready")).status_code == 200
            first = asyncio.create_task(client.post(f"{url}/v1/completions", json=BODY))
            await world.until(lambda: world.engine.open == 1)
            own_signal()
            await world.until(lambda: world.app.state.context.readiness.reason == "draining")
            assert (await client.get(f"{url}/ready")).status_code == 503
            assert (await client.get(f"{url}/health")).status_code == 200
            late = asyncio.create_task(client.post(f"{url}/v1/completions", json=BODY))
            await world.until(lambda: world.engine.open == 2)
            own_signal()  # the second one skips the grace: the listener closes
            await asyncio.sleep(0.3)
            world.engine.gate.set()
            for answer in (await first, await late):
                assert "data: [DONE]" in answer.text
                assert '"error"' not in answer.text
        own_signal()
        await asyncio.wait_for(server, 5)
    assert world.idle


async def test_what_outlives_the_drain_ends_with_an_error_event(worlds):
    world = worlds(drain_grace=0.0, drain_timeout=0.05, script=endless)
    with bind(world.app.state.context.config) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server = asyncio.create_task(serve(world.app, sock))
        async with httpx.AsyncClient() as client:
            stream = asyncio.create_task(client.post(f"{url}/v1/completions", json=BODY))
            await world.until(lambda: world.engine.open == 1)
            await world.until(world.told)
            own_signal()
            answer = await asyncio.wait_for(stream, 5)
        await asyncio.wait_for(server, 5)
    last = [line for line in answer.text.split("\n\n") if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["error"]["code"] == "overloaded"
    assert last[1] == "data: [DONE]"
    assert world.idle


SCRIPT = """
import asyncio, sys
from tests.server.api.api_fakes import build_world
from fader_server.serving import bind, serve
world = build_world(drain_grace=0.0)
with bind(world.app.state.context.config) as sock:
    print(sock.getsockname()[1], flush=True)
    asyncio.run(serve(world.app, sock))
"""


def test_a_drained_process_exits_with_0():
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with httpx.Client(transport=httpx.HTTPTransport(retries=5)) as client:
            answer = client.post(f"{url}/v1/completions", json={**BODY, "stream": False})
            assert answer.json()["choices"][0]["text"] == TEXT
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


START = """
import os, signal, sys, time
from fader_server import cli

class Slow:
    def find_spec(self, name, *_):
        if name == "fader_server.launch":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

sys.meta_path.insert(0, Slow())
sys.exit(cli.main(["serve"]))
"""


def test_a_signal_ends_a_start_through_a_handler():
    """The first process of a container gets only signals that it handles."""
    ended = subprocess.run(
        [sys.executable, "-c", START],
        timeout=25,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ended.returncode == 128 + signal.SIGTERM  # without a handler −15, and as pid 1 none


async def test_a_dead_engine_ends_the_server_with_an_error(worlds):
    world = worlds(drain_grace=0.0)
    with bind(world.app.state.context.config) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        server = asyncio.create_task(serve(world.app, sock))
        async with httpx.AsyncClient() as client:
            await world.until(lambda: not world.app.state.context.readiness.reason)
            assert (await client.get(f"{url}/ready")).status_code == 200
            world.engine.told = FakeStats(healthy=False, reason="the device is lost")
            assert (await client.get(f"{url}/ready")).status_code == 503
        with pytest.raises(EngineFault, match="the device is lost"):
            await asyncio.wait_for(server, 10)
