"""The demo served in this process: the real engine, registry and routes, HTTP without a socket."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fader_adapters.claims import Claims
from fader_server import app, config
from fader_server.engine.loop import Engine
from fader_server.launch import World
from fader_server.metrics import Metrics
from fader_server.recipes import RecipeBook, claims_of
from fader_server.state import RememberedAdapters, recipes_in
from fader_server.state_entries import State
from fader_server.state_file import StateFile
from fader_server.tenants import tenants_of
from fader_server.world import open_world

QUESTION = "Question: What colour is the sky over the sea on a clear day in summer? Answer:"


@dataclass
class Served:
    """One server and a client of it."""

    world: World
    http: httpx.AsyncClient
    metrics: Metrics
    recipes: RecipeBook

    @property
    def engine(self) -> Engine:
        assert isinstance(self.world.engine, Engine)
        return self.world.engine

    async def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "the condition never came"
            await asyncio.sleep(0.001)

    async def put(self, name: str, source: str, **others: Any) -> httpx.Response:
        return await self.http.put(f"/v1/adapters/{name}", json={"source": source, **others})

    async def recipe(self, name: str, **weights: float) -> dict[str, Any]:
        """Write a recipe; `__` in a keyword stands for `@`."""
        terms = [{"name": ref.replace("__", "@"), "weight": w} for ref, w in weights.items()]
        answer = await self.http.put(f"/v1/recipes/{name}", json={"adapters": terms})
        assert answer.is_success, answer.text
        return answer.json()

    async def ask(self, model: str, **others: Any) -> httpx.Response:
        body = {"model": model, "prompt": QUESTION, "max_tokens": 12, "temperature": 0}
        body |= {"logprobs": 0, "ignore_eos": True, **others}
        return await self.http.post("/v1/completions", json=body)

    async def said(self, model: str, **others: Any) -> "Said":
        """The tokens and their logprobs, bit for bit, and what tells where they come from."""
        answer = await self.ask(model, **others)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        scores = body["choices"][0]["logprobs"]
        return Said(
            tuple(zip(scores["tokens"], scores["token_logprobs"], strict=True)),
            body["usage"]["prompt_tokens_details"]["cached_tokens"],
            body["system_fingerprint"],
            answer.headers["x-fader-blend"],
        )


@dataclass(frozen=True)
class Said:
    """One answer."""

    scored: tuple[tuple[str, float], ...]
    cached: int
    fingerprint: str
    blend: str


@contextlib.asynccontextmanager
async def served(
    root: Path, state_dir: Path | None = None, **flags: str | list[str]
) -> AsyncIterator[Served]:
    """Open, restore and close as `fader serve` does, without its process and its socket."""
    flags = {"warm_up": "0"} | flags
    settings = config.load(
        flags | {"adapter_dir": [str(root)], "threads": "1", "kv_cache": "8MiB"}, {}
    )
    file = None if state_dir is None else StateFile(state_dir)
    state = State() if file is None else file.read()
    recipes, metrics = recipes_in(state), Metrics()
    claims: Claims = claims_of(recipes)
    tenants = tenants_of(settings)
    with (
        open_world(settings, metrics, claims, tenants) as world,
        contextlib.ExitStack() as stack,
    ):
        named: dict[str, Any] = {"base": world.base.name, "most": 100, "recipes": recipes}
        adapters = world.adapters
        if file is not None:
            adapters = remembered = RememberedAdapters(world.adapters, file, state)
            stack.callback(remembered.close)
            named["save"] = remembered.remember_recipes
            book = RecipeBook(adapters, **named)
            await remembered.restore()
        else:
            book = RecipeBook(adapters, **named)
        application = app.build(
            settings,
            world.base,
            engine=world.engine,
            adapters=adapters,
            recipes=book,
            tokenizer=world.tokenizer,
            metrics=metrics,
            version="9",
            tenants=tenants,
            merging=world.merging,
        )
        application.state.context.readiness.reason = ""
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=60
        ) as http:
            yield Served(world, http, metrics, book)
        assert adapters.totals().leases == 0
