"""Reads one JSON object from a request: size, time, type, encoding and syntax are checked here.

Knows no field by name. Never repeats what the client sent.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from starlette.requests import ClientDisconnect, Request

from fader_server.api.errors import BodyTooLarge, BodyTooSlow, ClientGone, UnsupportedMedia
from fader_server.errors import RequestInvalid

_Read = TypeVar("_Read")
MAX_DEPTH = 32
_LARGE = 1 << 15
"""Bytes from which a body is read off the event loop."""


async def read_json(
    request: Request, read: Callable[[dict[str, Any]], _Read], *, limit: int, seconds: float
) -> _Read:
    """What `read` makes of the request's body, an object without duplicate keys, NaN or Infinity.

    read: where the body is large, it runs off the event loop, too. Raises BodyTooLarge above
    `limit` bytes, BodyTooSlow after `seconds`, UnsupportedMedia unless it is JSON that nothing
    compresses, RequestInvalid for everything else that is wrong, and what `read` does.
    """
    media = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMedia("the content type must be application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UnsupportedMedia("the body is compressed; send it without content-encoding")
    try:
        async with asyncio.timeout(seconds):
            raw = await _read(request, limit)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not arrive within {seconds:g} seconds") from None
    except ClientDisconnect:
        raise ClientGone from None
    if len(raw) < _LARGE:
        return read(parse(raw))
    return await asyncio.to_thread(lambda: read(parse(raw)))


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and len(declared) <= 20 and int(declared) > limit:
        raise BodyTooLarge(f"the body is larger than {limit} bytes, see --max-body")
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > limit:
            raise BodyTooLarge(f"the body is larger than {limit} bytes, see --max-body")
    return bytes(raw)


def parse(raw: bytes) -> dict[str, Any]:
    """Decode one JSON object. Raises RequestInvalid without quoting the input."""
    try:
        body = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError:
        raise RequestInvalid("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RequestInvalid(
            f"the body is not JSON: line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise RequestInvalid(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # Python's own bound on the digits of an integer
        raise RequestInvalid("the body holds a number with too many digits") from None
    if not isinstance(body, dict):
        raise RequestInvalid("the body must be a JSON object")
    _check_depth(body)
    return body


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise RequestInvalid("an object of the body has the same key twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise RequestInvalid("NaN and Infinity are not JSON numbers")


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item
            below.extend(child for child in children if isinstance(child, dict | list))
        if not below:
            return
        level = below
    raise RequestInvalid(f"the body is nested deeper than {MAX_DEPTH} levels")
