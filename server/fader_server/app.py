"""Builds the application from its parts. No globals: two applications never share a thing."""

import math

from fastapi import Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from fader_adapters.errors import AdapterError
from fader_server.api import admin, merge, models, probes, routes, vllm
from fader_server.api import recipes as recipe_routes
from fader_server.api.adapter_ports import Adapters
from fader_server.api.auth import Guard, requires
from fader_server.api.choosing import Limits
from fader_server.api.context import BaseModel, Context
from fader_server.api.cors import Pages
from fader_server.api.edge import Edge
from fader_server.api.errors import describe
from fader_server.api.generate import Generator, Patience
from fader_server.api.merge_ports import Merging
from fader_server.api.named_blends import Recipes
from fader_server.api.observe import Board, gauges, merge_gauges
from fader_server.api.ports import Engine, Tokenizer
from fader_server.api.quotas import Quotas
from fader_server.api.sse import Pace
from fader_server.api.trace import Spans
from fader_server.config import ServeConfig
from fader_server.errors import FaderError
from fader_server.metrics import Metrics
from fader_server.tenants import Tenant


def build(
    config: ServeConfig,
    base: BaseModel,
    *,
    engine: Engine,
    adapters: Adapters,
    recipes: Recipes,
    tokenizer: Tokenizer,
    metrics: Metrics,
    version: str,
    merging: Merging | None = None,
    tenants: tuple[Tenant, ...] = (),
    spans: Spans | None = None,
) -> FastAPI:
    """The application; `app.state.context` is what its routes share. Starts nothing.

    `metrics` is given because the engine tells its steps to the same one; `tenants` are those of
    config.tenants; `spans` takes those of requests. Not ready until
    `context.readiness.reason` is set to "".
    """
    context = _context(
        config, base, engine, adapters, recipes, tokenizer, metrics, version, merging, tenants
    )
    metrics.add_gauges(gauges(engine, adapters, recipes, context.board))
    app = FastAPI(
        title="Fader",
        version=version,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.context = context
    app.state.guard = guard = Guard(config, tenants)
    user, administrator = requires(guard.user), requires(guard.admin)
    for router, check in (
        (routes.router, user),
        (models.router, user),
        (admin.user_router, user),
        (vllm.user_router, user),
        (admin.admin_router, administrator),
        (recipe_routes.admin_router, administrator),
        (vllm.admin_router, administrator),
    ):
        app.include_router(router, dependencies=[Depends(check)])
    if merging is not None:
        metrics.add_gauges(merge_gauges(merging, engine))
        app.include_router(merge.admin_router, dependencies=[Depends(administrator)])
    app.include_router(probes.router)
    protected = [Depends(requires(guard.observer))] if config.protect_metrics else []
    app.include_router(probes.metrics_router, dependencies=protected)
    _answer_errors(app, guard)
    app.add_middleware(Edge, metrics=metrics, spans=spans)
    if config.allow_origin:
        app.add_middleware(Pages, origins=config.allow_origin)
    return app


def follow(app: FastAPI, tenants: tuple[Tenant, ...]) -> None:
    """Other tenants for an application that was built. On its event loop."""
    app.state.guard.replace(tenants)
    app.state.context.generator.quotas.replace(tenants)


def _context(
    config: ServeConfig,
    base: BaseModel,
    engine: Engine,
    adapters: Adapters,
    recipes: Recipes,
    tokenizer: Tokenizer,
    metrics: Metrics,
    version: str,
    merging: Merging | None,
    tenants: tuple[Tenant, ...],
) -> Context:
    return Context(
        config=config,
        base=base,
        engine=engine,
        adapters=adapters,
        recipes=recipes,
        tokenizer=tokenizer,
        generator=Generator(
            engine,
            tokenizer,
            Quotas(tenants),
            base_name=base.name,
            max_model_len=base.max_model_len,
            patience=Patience(config.first_token_timeout, config.request_timeout),
        ),
        metrics=metrics,
        limits=Limits(
            max_n=config.max_n,
            max_choices=min(config.max_choices, config.max_waiting),
            max_call_tokens=config.max_call_tokens,
            max_terms=config.max_terms,
            vocab_size=tokenizer.vocab_size,
            usual=base.usual,
        ),
        pace=Pace(ping=config.ping_interval or math.inf, stall=config.stall_timeout),
        board=Board(traffic=merging.traffic if merging is not None else None),
        version=version,
        merging=merging,
    )


def _answer_errors(app: FastAPI, guard: Guard) -> None:
    async def known(request: Request, error: Exception) -> Response:
        return describe(error).response()

    async def routing(request: Request, error: Exception) -> Response:
        """404 and 405: a caller without a key does not learn which routes exist."""
        try:
            guard.user(request)
        except FaderError as refusal:
            return describe(refusal).response()
        return describe(error).response()

    app.add_exception_handler(FaderError, known)
    app.add_exception_handler(AdapterError, known)
    app.add_exception_handler(HTTPException, routing)
