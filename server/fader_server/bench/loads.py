"""Loads and unloads over HTTP, timed. What a server refuses ends the run."""

from dataclasses import dataclass

import httpx

from fader_server.bench.client import BenchClient
from fader_server.errors import ConfigInvalid


@dataclass(frozen=True, slots=True)
class Load:
    """One PUT that was answered."""

    seconds: float
    version: str
    bytes: int
    rank: int


async def load(client: BenchClient, name: str, source: str) -> Load:
    """PUT /v1/adapters/NAME. Raises ConfigInvalid with the server's own words."""
    began = client.clock()
    try:
        answer = await client.put(f"/v1/adapters/{name}", {"source": source})
    except httpx.HTTPError as error:
        raise ConfigInvalid(f"loading {source!r}: {type(error).__name__}: {error}") from None
    seconds = client.clock() - began
    if answer.status_code not in (200, 201):
        raise ConfigInvalid(
            f"loading {source!r} answered {answer.status_code}: {answer.text[:300]}; the server "
            "must allow loads: start it with --adapter-dir, and give --api-key its admin key"
        )
    told = answer.json()
    return Load(seconds, told["version"], told["bytes"], told["rank"])


async def find(client: BenchClient, name: str) -> float:
    """Seconds of a GET /v1/adapters/NAME. Raises ConfigInvalid unless it is there."""
    began = client.clock()
    await report(client, name)
    return client.clock() - began


async def report(client: BenchClient, name: str) -> dict[str, str]:
    """GET /v1/adapters/NAME. Raises ConfigInvalid unless it is there."""
    answer = await client.get(f"/v1/adapters/{name}")
    if answer.status_code != 200:
        raise ConfigInvalid(f"GET of {name!r} answered {answer.status_code}")
    return answer.json()


async def unload(client: BenchClient, name: str) -> None:
    """DELETE, whatever it answers: clearing up must not hide why a run ended."""
    try:
        await client.delete(f"/v1/adapters/{name}")
    except httpx.HTTPError:
        return
