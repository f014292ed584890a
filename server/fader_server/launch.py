"""`fader serve` from settings to exit: log, bind, load the world, serve, close it again."""

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from fader_server import app
from fader_server.api.context import BaseModel
from fader_server.api.edge import JsonFormatter
from fader_server.api.ports import Adapters, Engine, Tokenizer
from fader_server.config import ServeConfig
from fader_server.metrics import Metrics
from fader_server.serving import bind, serve

_log = logging.getLogger("fader")


@dataclass(frozen=True, slots=True)
class World:
    """The loaded base and all that runs it."""

    base: BaseModel
    engine: Engine
    adapters: Adapters
    tokenizer: Tokenizer


OpenWorld = Callable[[ServeConfig, Metrics], AbstractContextManager[World]]
"""Loads the base and the adapters of the settings and starts the engine; stops it at the end.

Raises ConfigInvalid, ModelUnsupported or AdapterError for what the user can mend.
"""


def run(config: ServeConfig, open_world: OpenWorld, *, version: str) -> None:
    """Serve until a signal ends it. The port is taken first, so that a busy one fails at once."""
    log_to_stderr(config.log_level)
    metrics = Metrics()
    with bind(config) as sock, open_world(config, metrics) as world:
        application = app.build(
            config,
            world.base,
            engine=world.engine,
            adapters=world.adapters,
            tokenizer=world.tokenizer,
            metrics=metrics,
            version=version,
        )
        fields = {"host": config.host, "port": sock.getsockname()[1], "model": world.base.name}
        _log.info("serving", extra={"fields": fields})
        asyncio.run(serve(application, sock))
    _log.info("ended")


def log_to_stderr(level: str) -> None:
    """One JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
