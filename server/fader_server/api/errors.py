"""The one table from exception to HTTP: status, type, code and headers of OpenAI's error object.

Texts of 5xx are fixed, so that nothing internal leaks; 4xx carry the exception's own message.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from fader_adapters import errors as adapters
from fader_server import errors as server

INVALID = "invalid_request_error"
FAULT = "server_error"
LIMIT = "rate_limit_error"


class HttpError(server.FaderError):
    """A refusal that only makes sense over HTTP."""


class BodyTooLarge(HttpError):
    """The body is over the limit."""


class BodyTooSlow(HttpError):
    """The body did not arrive in time."""


class AmbiguousLength(HttpError):
    """The head gives the body's length in two ways: a proxy may have read it differently."""


class UnsupportedMedia(HttpError):
    """The body is not JSON."""


class Unauthorized(HttpError):
    """No key, or one that is not known."""


class Forbidden(HttpError):
    """A known key that may not do this."""


class ResponseNotKept(HttpError):
    """A response is asked for by its id."""


class ClientGone(HttpError):
    """The client closed the connection; nobody reads the answer."""


class ClientStalled(HttpError):
    """The client stopped reading its stream."""


class FirstTokenTimeout(server.RequestTimeout):
    """The first token did not come in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How one kind of exception is answered. `text` replaces its message; retry: x-should-retry."""

    status: int
    type: str
    code: str | None
    text: str | None = None
    param: str | None = None
    retry: bool | None = None


_ENGINE_TEXT = "The engine failed this request; other requests go on."
_NO_SOURCE = Answer(
    404,
    INVALID,
    "adapter_forbidden_source",
    "There is no adapter at this source that the server may read; name a folder that holds "
    "adapter_config.json and adapter_model.safetensors, relative to an --adapter-dir, or what "
    "--adapter-hub or --adapter-url allows.",
    param="source",
)
"""One answer for what is not there and what is out of bounds: paths cannot be probed with it."""
_TABLE: tuple[tuple[type[Exception], Answer], ...] = (  # the first match wins: subclasses first
    (server.ContextTooLong, Answer(400, INVALID, "context_length_exceeded")),
    (server.RequestInvalid, Answer(400, INVALID, None)),
    (server.ModelNotFound, Answer(404, INVALID, "model_not_found", param="model")),
    (server.AdapterUnavailable, Answer(409, INVALID, "adapter_load_failed", retry=False)),
    (server.MergeBusy, Answer(409, INVALID, "merge_busy", retry=False)),
    (server.MergeNoMemory, Answer(507, FAULT, "merge_no_memory", retry=False)),
    (server.MergeNotFound, Answer(404, INVALID, "merge_not_found")),
    (server.MergeLossy, Answer(409, INVALID, "merge_too_lossy", retry=False)),
    (server.RecipeNotFound, Answer(404, INVALID, "recipe_not_found", param="name")),
    (server.RecipeConflict, Answer(409, INVALID, "recipe_conflict", retry=False)),
    (
        server.RecipeIncomplete,
        Answer(409, INVALID, "recipe_incomplete", param="model", retry=False),
    ),
    (server.Overloaded, Answer(503, FAULT, "overloaded", retry=True)),
    (server.TenantBusy, Answer(429, LIMIT, "rate_limit_exceeded", retry=True)),
    (FirstTokenTimeout, Answer(504, FAULT, "first_token_timeout", retry=False)),
    (server.RequestTimeout, Answer(504, FAULT, "request_timeout", retry=False)),
    (
        server.NumericFault,
        Answer(
            500,
            FAULT,
            "adapter_numeric_error",
            "The adapters of this request gave values that are not finite.",
            retry=False,
        ),
    ),
    (server.EngineFault, Answer(500, FAULT, "engine_error", _ENGINE_TEXT, retry=False)),
    (BodyTooLarge, Answer(413, INVALID, "request_too_large")),
    (BodyTooSlow, Answer(408, INVALID, "request_timeout", retry=False)),
    (AmbiguousLength, Answer(400, INVALID, "bad_request")),
    (UnsupportedMedia, Answer(415, INVALID, "unsupported_media_type")),
    (Unauthorized, Answer(401, INVALID, "invalid_api_key")),
    (Forbidden, Answer(403, INVALID, "permission_denied")),
    (ResponseNotKept, Answer(404, INVALID, "not_found")),
    (ClientGone, Answer(499, INVALID, "client_closed_request")),
    (ClientStalled, Answer(499, INVALID, "client_stalled")),
    (adapters.AdapterInvalid, Answer(400, INVALID, "adapter_invalid")),
    (adapters.AdapterMismatch, Answer(400, INVALID, "adapter_mismatch")),
    (adapters.AdapterTooLarge, Answer(400, INVALID, "adapter_too_large")),
    (adapters.ArenaFull, Answer(507, FAULT, "adapter_load_failed", retry=False)),
    (adapters.AdapterNotFound, Answer(404, INVALID, "adapter_not_found")),
    (adapters.NameReserved, Answer(409, INVALID, "name_reserved", retry=False)),
    (adapters.AdapterExists, Answer(409, INVALID, "adapter_exists", retry=False)),
    (adapters.VersionConflict, Answer(409, INVALID, "adapter_version_conflict", retry=False)),
    (adapters.BlendInvalid, Answer(400, INVALID, "blend_invalid", param="adapters")),
    (adapters.SourceForbidden, _NO_SOURCE),
    (adapters.SourceIncomplete, Answer(404, INVALID, "adapter_not_found", param="source")),
    (adapters.SourceNotFound, _NO_SOURCE),
    (
        adapters.SourceUnavailable,
        Answer(
            503,
            FAULT,
            "adapter_load_failed",
            "The adapter's source failed or did not answer in time; try again.",
            retry=True,
        ),
    ),
)
_UNKNOWN = Answer(
    500, FAULT, "internal_error", "The server failed to answer this request.", retry=False
)
_HTTP = {
    404: (
        "not_found",
        "There is no such route; models answer at /v1/chat/completions, /v1/responses and "
        "/v1/completions.",
    ),
    405: ("method_not_allowed", "This route does not answer this method."),
    400: ("bad_request", "The request is malformed."),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An exception as the client sees it."""

    status: int
    headers: Mapping[str, str]
    error: Mapping[str, Any]

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.error}, self.status, dict(self.headers))


def describe(error: Exception) -> Problem:
    """Status, headers and error object of any exception."""
    if isinstance(error, HTTPException):
        code, text = _HTTP.get(error.status_code, (None, "The request was refused."))
        headers = {k: v for k, v in (error.headers or {}).items() if k.lower() == "allow"}
        return Problem(error.status_code, headers, _object(text, INVALID, None, code))
    answer = next((found for kind, found in _TABLE if isinstance(error, kind)), _UNKNOWN)
    headers = {}
    if isinstance(error, server.TryLater):
        headers["retry-after"] = str(min(120, max(1, error.retry_after)))
    if answer.retry is not None:
        headers["x-should-retry"] = "true" if answer.retry else "false"
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, AmbiguousLength | BodyTooLarge | BodyTooSlow):
        headers["connection"] = "close"
    param, code = answer.param, answer.code
    if isinstance(error, server.RequestInvalid):
        param, code = error.param, error.code or code
    text = answer.text or str(error) or type(error).__name__
    return Problem(answer.status, headers, _object(text, answer.type, param, code))


def malformed() -> dict[str, Any]:
    """The body for what is not HTTP at all, and so never reaches the application."""
    code, text = _HTTP[400]
    return {"error": _object(text, INVALID, None, code)}


def _object(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"message": message, "type": kind, "param": param, "code": code}
