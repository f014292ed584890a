"""`fader serve` from settings to exit: log, bind, load the world, serve, close it again."""

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from fastapi import FastAPI
from rich.console import Console

from fader_adapters.claims import Claims
from fader_server import app
from fader_server.api.adapter_ports import Adapters
from fader_server.api.context import BaseModel
from fader_server.api.edge import JsonFormatter
from fader_server.api.merge_ports import Merging
from fader_server.api.named_blends import Recipes
from fader_server.api.ports import Engine, Tokenizer
from fader_server.config import ServeConfig
from fader_server.daemon import call_in_daemon
from fader_server.errors import ConfigInvalid
from fader_server.metrics import Metrics
from fader_server.recipes import RecipeBook, claims_of
from fader_server.serving import bind, serve
from fader_server.state import RememberedAdapters, recipes_in
from fader_server.state_entries import State
from fader_server.state_file import StateFile
from fader_server.tenants import Tenant, tenants_of
from fader_server.tracing import open_spans

_log = logging.getLogger("fader")


Background = Callable[[], Coroutine[None, None, None]]
Prepare = Callable[[Adapters, Recipes], Coroutine[None, None, None]]
"""Raises ConfigInvalid for what the user can mend."""


@dataclass(frozen=True, slots=True)
class World:
    """The loaded base and all that runs it."""

    base: BaseModel
    engine: Engine
    adapters: Adapters
    tokenizer: Tokenizer
    background: tuple[Background, ...] = ()
    """What runs on the event loop as long as the server does."""
    merging: Merging | None = None
    prepare: Prepare | None = None
    """What must be done before the server serves, once adapters and recipes are restored."""
    share: Callable[[tuple[Tenant, ...]], None] = lambda tenants: None
    """Tells the queue of other tenants. Any thread."""


OpenWorld = Callable[
    [ServeConfig, Metrics, Claims, tuple[Tenant, ...]], AbstractContextManager[World]
]
"""Loads the base and the adapters of the settings and starts the engine; stops it at the end.

No adapter takes a name that is claimed, and versions that are claimed outlive swaps. The queue
knows the tenants.

Raises ConfigInvalid, ModelUnsupported or AdapterError for what the user can mend.
"""


def run(config: ServeConfig, open_world: OpenWorld, *, version: str) -> None:
    """Serve until a signal ends it. The port is taken first, so that a busy one fails at once."""
    log_to_stderr(config.log_level)
    tenants = tenants_of(config)
    file = StateFile(config.state_dir) if config.state_dir is not None else None
    metrics = Metrics()
    with ExitStack() as stack:
        if file is not None:
            stack.enter_context(file.locked())
        state = file.read() if file is not None else State()
        recipes = recipes_in(state)
        spans = stack.enter_context(open_spans(config.otlp_traces_endpoint, version=version))
        sock = stack.enter_context(bind(config))
        world = stack.enter_context(open_world(config, metrics, claims_of(recipes), tenants))
        book = partial(RecipeBook, base=world.base.name, most=config.max_recipes, recipes=recipes)
        if file is None:
            named = book(world.adapters)
        else:
            remembered = RememberedAdapters(
                world.adapters, file, state, base=world.base.fingerprint
            )
            stack.callback(remembered.close)
            metrics.add_gauges(remembered.gauges)
            world = replace(world, adapters=remembered)
            named = book(remembered, save=remembered.remember_recipes)
        application = app.build(
            config,
            world.base,
            engine=world.engine,
            adapters=world.adapters,
            recipes=named,
            tokenizer=world.tokenizer,
            metrics=metrics,
            version=version,
            merging=world.merging,
            tenants=tenants,
            spans=spans,
        )
        asyncio.run(_serve(application, world, named, sock))
    _log.info("ended")


async def _serve(application: FastAPI, world: World, recipes: Recipes, sock: socket.socket) -> None:
    if isinstance(world.adapters, RememberedAdapters):
        await world.adapters.restore()
    if world.prepare is not None:
        await world.prepare(world.adapters, recipes)
    with _lasting():
        host, port = sock.getsockname()[:2]
        fields = {"host": host, "port": port, "model": world.base.name}
        _log.info("serving", extra={"fields": fields})
        if sys.stdout.isatty():
            greet(world, f"http://{host}:{port}")
        config = application.state.context.config
        again = Rereading(partial(tenants_of, config), partial(_follow, application, world)).again
        tasks = [asyncio.create_task(_guarded(work)) for work in world.background]
        try:
            await serve(application, sock, on_hangup=None if config.tenants is None else again)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Rereading:
    """Reads tenants again, on a thread: a file may lie where nobody answers. Belongs to the event
    loop."""

    def __init__(
        self,
        read: Callable[[], tuple[Tenant, ...]],
        follow: Callable[[tuple[Tenant, ...]], None],
    ) -> None:
        """`read` may raise ConfigInvalid; `follow` is called on the event loop."""
        self._read = read
        self._follow = follow
        self._turns = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def again(self) -> None:
        """What is read for the last call is followed; a mistake in it changes nothing."""
        self._turns += 1
        task = asyncio.create_task(self._turn(self._turns))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _turn(self, turn: int) -> None:
        tenants, mistake = None, ""
        try:
            tenants = await call_in_daemon(self._read, name="fader-tenants")
        except ConfigInvalid as error:
            mistake = str(error)
        if turn != self._turns:
            return  # asked for again meanwhile
        if tenants is None:
            _log.error("tenants stay as they are", extra={"fields": {"reason": mistake}})
            return
        self._follow(tenants)
        _log.info("tenants read", extra={"fields": {"tenants": len(tenants)}})


def _follow(application: FastAPI, world: World, tenants: tuple[Tenant, ...]) -> None:
    app.follow(application, tenants)
    world.share(tenants)


@contextmanager
def _lasting() -> Iterator[None]:
    """What is there now stays: the garbage collector need not walk it, which takes some hundred
    milliseconds and stops every thread."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _guarded(work: Background) -> None:
    """The server goes on when something beside it fails."""
    try:
        await work()
    except Exception:  # noqa: BLE001 - the border of a task
        _log.exception("background work ended")


def greet(world: World, url: str) -> None:
    """For a person at a terminal: where it is, what it serves and how to ask."""
    adapters = [info.name for info in world.adapters.list()]
    told = ", ".join(adapters[:12]) + (", …" if len(adapters) > 12 else "") or "none yet"
    body = f'{{"model": "{world.base.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    console = Console(highlight=False)
    console.print(f"\n[bold]{world.base.name}[/bold] at [bold]{url}/v1[/bold]")
    console.print(f"adapters: {told}")
    console.print("ask it:", style="dim")
    console.print(
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n",
        soft_wrap=True,
        markup=False,
    )


def log_to_stderr(level: str) -> None:
    """One JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for library in ("huggingface_hub", "transformers"):  # each has a handler of its own, for text
        logging.getLogger(library).handlers.clear()
        logging.getLogger(library).propagate = True
