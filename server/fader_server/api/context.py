"""What every route shares: built once by app.build, reached through request.app.state.context."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from fader_server.api.adapter_ports import Adapters, Lease
from fader_server.api.auth import Principal
from fader_server.api.body import read_json
from fader_server.api.choosing import Limits, Usual
from fader_server.api.edge import RequestLog
from fader_server.api.generate import Generator
from fader_server.api.merge_ports import Merging
from fader_server.api.named_blends import Recipes
from fader_server.api.observe import Board, CallRecord
from fader_server.api.ports import Engine, Tokenizer
from fader_server.api.sse import Pace
from fader_server.api.visible import Visible
from fader_server.config import ServeConfig
from fader_server.metrics import Metrics

_Read = TypeVar("_Read")


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base as the API shows it."""

    name: str
    fingerprint: str
    """sha256 of its shapes and weights, BaseSpec.identity."""
    max_model_len: int
    created: int
    """Unix seconds of the server's start."""
    usual: Usual = field(default_factory=Usual)
    """How its tokens are chosen where a call does not say."""


@dataclass(slots=True)
class Readiness:
    """Why the server is not ready; empty when it is. Adapters never change it."""

    reason: str = "starting"


@dataclass(frozen=True, slots=True)
class Context:
    """The services behind the routes."""

    config: ServeConfig
    base: BaseModel
    engine: Engine
    adapters: Adapters
    recipes: Recipes
    tokenizer: Tokenizer
    generator: Generator
    metrics: Metrics
    limits: Limits
    pace: Pace
    board: Board
    version: str
    merging: Merging | None = None
    readiness: Readiness = field(default_factory=Readiness)
    clock: Callable[[], float] = time.monotonic

    def fingerprint(self, lease: Lease) -> str:
        """system_fingerprint: this server, the base and the blend, in hexadecimal."""
        blend = lease.blend.digest[:12] if lease.blend else "base"
        return f"fader-{self.version}-{self.base.fingerprint[:12]}-{blend}"

    def record(self, request: Request) -> CallRecord:
        """A new record of a call, tied to the request's log line."""
        record = CallRecord(self.metrics, self.board, self.clock)
        log_of(request).call = record
        return record


def context_of(request: Request) -> Context:
    return request.app.state.context


def log_of(request: Request) -> RequestLog:
    return request.state.log


def principal_of(request: Request) -> Principal:
    return request.state.principal


def visible_to(request: Request) -> Visible:
    """What exists for the caller; routes for users know no other adapters and recipes."""
    context = context_of(request)
    caller = principal_of(request)
    return Visible(context.adapters, context.recipes, sees=caller.sees, tenant=caller.tenant)


async def body_of(request: Request) -> dict[str, Any]:
    """The request's JSON object, within the server's limits."""
    return await read_from(request, dict)


async def read_from(request: Request, read: Callable[[dict[str, Any]], _Read]) -> _Read:
    """What `read` makes of it, off the event loop where that is work."""
    context = context_of(request)
    limit = largest_body(context.config, context.base)
    return await read_json(request, read, limit=limit, seconds=context.config.body_timeout)


def largest_body(config: ServeConfig, base: BaseModel) -> int:
    """In bytes."""
    return config.max_body or max(1 << 20, _BYTES_PER_TOKEN * base.max_model_len)


_BYTES_PER_TOKEN = 16
"""Of a body whose text fills the context: two letters that JSON may write as six bytes each."""
