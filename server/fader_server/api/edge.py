"""The outermost layer: request ids, a log line and a span a request, the last resort of exceptions.
One slash at the end of a path is as none, for routes and keys alike.

Pure ASGI, so that it sees streams as they are. Knows no route.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fader_server.api.errors import AmbiguousLength, ClientGone, describe
from fader_server.api.observe import CallRecord
from fader_server.api.trace import Answered, Spans, parent_of
from fader_server.metrics import Metrics

_log = logging.getLogger("fader.request")
NO_ROUTE = "none"
"""The route of a request that no route takes."""
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass(slots=True)
class RequestLog:
    """What one request leaves in the log. Routes add to it."""

    request_id: str
    tenant: str = ""
    call: CallRecord | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Edge:
    """Wraps the application; `scope["state"]["log"]` is the request's RequestLog."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, spans: Spans | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        log = RequestLog(request_id(scope["headers"]))
        scope["state"] = {**scope.get("state", {}), "log": log}
        _cut_slash(scope)
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = log.request_id
                headers["openai-processing-ms"] = str(round((time.monotonic() - began) * 1000))
            await send(message)

        try:
            if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
                problem = AmbiguousLength("send content-length or transfer-encoding, not both")
                await describe(problem).response()(scope, receive, send_marked)
                return
            await self._app(scope, receive, send_marked)
        except ClientGone:
            status = status or 499
        except Exception as error:
            _log.exception("a route failed", extra={"fields": {"request_id": log.request_id}})
            if status:
                raise
            await describe(error).response()(scope, receive, send_marked)
        finally:
            self._finish(scope, log, status, time.monotonic() - began)

    def _finish(self, scope: Scope, log: RequestLog, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        self._metrics.answered(route, status)
        fields = {
            "request_id": log.request_id,
            "tenant": log.tenant or None,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            **log.extra,
            **(log.call.log_fields() if log.call else {}),
        }
        _log.info("request", extra={"fields": fields | self._traced(scope, fields, seconds)})

    def _traced(self, scope: Scope, fields: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Where the trace of a request is found, if it has one."""
        parent = parent_of(scope["headers"])
        if self._spans is not None:
            ended = time.time_ns()
            answered = Answered(ended - int(seconds * 1e9), ended, fields)
            if (ids := self._spans.add(answered, parent)) is not None:
                return {"trace_id": ids[0], "span_id": ids[1]}
        return {"trace_id": parent.trace_id} if parent is not None else {}


def _cut_slash(scope: Scope) -> None:
    """Cut the one slash at the end: clients write addresses so. One that is encoded is a name's."""
    raw = scope.get("raw_path") or b""
    if raw.endswith(b"/") and not raw.endswith(b"//") and raw != b"/":
        scope["path"], scope["raw_path"] = scope["path"][:-1], raw[:-1]


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own, where it gave one that can be repeated."""
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _ID.fullmatch(given[0]):
        return given[0].decode()
    return f"req-{secrets.token_hex(12)}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; control characters cannot break out of it."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "ts": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
