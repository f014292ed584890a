"""A small client of a running server's adapter and recipe routes. Knows no terminal."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from fader_server.config import ClientConfig
from fader_server.errors import FaderError, ServerFailed, ServerRefused

Json = dict[str, Any]
_LONGEST = 2000
_INSUFFICIENT_STORAGE = 507


class Client:
    """One connection to one server. Every method raises ServerRefused or ServerFailed."""

    def __init__(
        self, config: ClientConfig, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {} if config.key is None else {"authorization": f"Bearer {config.key}"}
        self._url = config.url
        self._timeout = config.timeout
        self._http = httpx.Client(
            base_url=config.url,
            headers=headers,
            timeout=httpx.Timeout(config.timeout, connect=min(10.0, config.timeout)),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def adapters(self) -> list[Json]:
        """Every adapter's health report."""
        return self._list("/v1/adapters")

    def adapter(self, name: str) -> Json:
        """One health report, by `name` or `name@version`."""
        return self._ask("GET", _path("adapters", name))

    def load(self, name: str, order: Mapping[str, object]) -> Json:
        """Load or swap; `order` is the body of a PUT, None left out."""
        return self._ask("PUT", _path("adapters", name), order)

    def pin(self, name: str, *, pinned: bool) -> Json:
        return self._ask("PATCH", _path("adapters", name), {"pin": pinned})

    def unload(self, name: str) -> Json:
        return self._ask("DELETE", _path("adapters", name))

    def recipes(self) -> list[Json]:
        return self._list("/v1/recipes")

    def recipe(self, name: str) -> Json:
        return self._ask("GET", _path("recipes", name))

    def set_recipe(
        self, name: str, terms: Mapping[str, float], *, if_digest: str | None = None
    ) -> Json:
        """Write a recipe; `terms` are weights by `name` or `name@version`."""
        adapters = [{"name": ref, "weight": weight} for ref, weight in terms.items()]
        body = {"adapters": adapters, "if_digest": if_digest}
        return self._ask("PUT", _path("recipes", name), body)

    def delete_recipe(self, name: str, *, if_digest: str | None = None) -> Json:
        query = "" if if_digest is None else f"?if_digest={quote(if_digest, safe='')}"
        return self._ask("DELETE", _path("recipes", name) + query)

    def _list(self, path: str) -> list[Json]:
        data = self._ask("GET", path).get("data")
        if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
            raise ServerFailed(f"{self._url}{path} did not answer with a list: is it Fader?")
        return data

    def _ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Json:
        given = None if body is None else {k: v for k, v in body.items() if v is not None}
        try:
            answer = self._http.request(method, path, json=given)
        except httpx.TimeoutException:
            raise ServerFailed(
                f"{self._url} did not answer within {self._timeout:g} s; what was asked may still "
                "happen: look again, or give a longer --timeout"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerRefused(
                f"{self._url} cannot be reached ({error or type(error).__name__}); is a server "
                "running there? --url names another"
            ) from None
        if not answer.is_success:
            raise self._refusal(answer)
        found = _object(answer)
        if found is None:
            raise ServerFailed(f"{self._url} did not answer in JSON: is it Fader?")
        return found

    def _refusal(self, answer: httpx.Response) -> FaderError:
        """The server's own message, as one line of printable characters."""
        error = (_object(answer) or {}).get("error")
        message = error.get("message") if isinstance(error, dict) else None
        if not isinstance(message, str):
            message = f"{self._url} answered {answer.status_code} without a reason: is it Fader?"
        told = "".join(c if c.isprintable() else " " for c in message[:_LONGEST])
        mendable = answer.is_client_error or answer.status_code == _INSUFFICIENT_STORAGE
        return (ServerRefused if mendable else ServerFailed)(told)


def _path(kind: str, name: str) -> str:
    if not name:  # the path would be that of the list
        raise ServerRefused("the name is malformed: it is empty")
    return f"/v1/{kind}/{quote(name, safe='@')}"


def _object(answer: httpx.Response) -> Json | None:
    try:
        found = answer.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
