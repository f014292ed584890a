"""/health, /ready and /metrics. Never wait: no lock, no thread, no turn of the engine."""

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fader_server.api.context import context_of
from fader_server.metrics import CONTENT_TYPE

router = APIRouter()
metrics_router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """200 while the engine moves or idles, 503 once it is stuck or dead."""
    reason = _engine_trouble(request)
    return _failing(reason, "engine_stuck") if reason else JSONResponse({"status": "ok"})


@router.api_route("/ready", methods=["GET", "HEAD"])
async def ready(request: Request) -> Response:
    """200 when new requests are welcome; else 503 with the reason."""
    reason = context_of(request).readiness.reason or _engine_trouble(request)
    return _failing(reason, "not_ready") if reason else JSONResponse({"status": "ready"})


@metrics_router.api_route("/metrics", methods=["GET", "HEAD"])
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    headers = {"content-type": CONTENT_TYPE, "cache-control": "no-store"}
    return Response(context_of(request).metrics.render(), 200, headers)


def _engine_trouble(request: Request) -> str:
    context = context_of(request)
    stats = context.engine.stats()
    if not stats.healthy:
        return stats.reason
    return stats.stuck(time.monotonic(), context.config.stuck_timeout)


def _failing(reason: str, code: str) -> Response:
    error = {"message": reason, "type": "server_error", "param": None, "code": code}
    headers = {"retry-after": "5", "cache-control": "no-store"}
    return JSONResponse({"status": "failing", "error": error}, 503, headers)
