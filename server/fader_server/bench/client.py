"""One streamed completion, timed and checked as a client sees it. Knows no load, no figures."""

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

Clock = Callable[[], float]
"""Seconds on a steady clock."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A completion of exactly `output_tokens` tokens."""

    model: str
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request does not count. `kind` is stable, `detail` is for people."""

    kind: str
    detail: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What one request did; times in seconds on the client's clock."""

    model: str
    due: float
    """When the load plan wanted it sent; latencies start here, so lateness is not flattered."""
    end: float
    token_times: tuple[float, ...] = ()
    """Arrival of each event that carried output."""
    output_tokens: int = 0
    """As the server counted them."""
    text: str = ""
    fingerprint: str = ""
    fault: Fault | None = None


@dataclass(slots=True)
class _Stream:
    """What has been read of one response."""

    token_times: list[float] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    fingerprint: str = ""
    finish: str | None = None
    usage: dict[str, Any] | None = None
    done: bool = False
    fault: Fault | None = None

    def take(self, data: bytes, at: float) -> None:
        """Account for one event. A body that is not JSON, or an error event, is a fault."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            chunk = json.loads(data)
            self._take_chunk(chunk, at)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self.fault = self.fault or Fault("protocol", f"not a completion chunk: {data[:200]!r}")

    def _take_chunk(self, chunk: dict[str, Any], at: float) -> None:
        if "error" in chunk:
            self.fault = self.fault or Fault("stream_error", json.dumps(chunk["error"])[:300])
            return
        self.usage = chunk.get("usage") or self.usage
        self.fingerprint = chunk.get("system_fingerprint") or self.fingerprint
        for choice in chunk["choices"]:
            text, finish = choice["text"], choice.get("finish_reason")
            self.finish = finish or self.finish
            if text or finish is None:
                self.token_times.append(at)
                self.text.append(text)

    def verdict(self, ask: Ask) -> Fault | None:
        """The first thing that is wrong with a stream that has ended."""
        if self.fault is not None:
            return self.fault
        if not self.done:
            return Fault("no_done", "the stream ended without [DONE]")
        if self.usage is None:
            return Fault("no_usage", "the server sent no usage, so tokens cannot be counted")
        came, prompt = self.usage.get("completion_tokens"), self.usage.get("prompt_tokens")
        if came != ask.output_tokens:
            return Fault(
                "output_length", f"expected {ask.output_tokens} output tokens, came {came}"
            )
        if prompt != len(ask.prompt):
            return Fault(
                "prompt_length", f"expected {len(ask.prompt)} prompt tokens, came {prompt}"
            )
        if self.finish != "length":
            return Fault("finish_reason", f"expected finish_reason 'length', came {self.finish!r}")
        if not self.token_times:
            return Fault("no_text", "no event of the stream carried output")
        return None

    @property
    def cached_tokens(self) -> int:
        details = (self.usage or {}).get("prompt_tokens_details") or {}
        return details.get("cached_tokens") or 0


class BenchClient:
    """A connection pool to one server. Use as an async context manager.

    `timeout`: seconds a whole request may take. `keep_alive`: use connections again. `transport`
    and `clock` are for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        api_key: str | None = None,
        keep_alive: bool = True,
        temperature: float = 0.0,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        """temperature: above 0 tokens are drawn, by seeds that follow from prompts."""
        headers = {"accept-encoding": "identity"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self.url = url.rstrip("/").removesuffix("/v1")  # clients of OpenAI's API name it with /v1
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            transport=transport,
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None if keep_alive else 0
            ),
            trust_env=False,  # a proxy between client and server would be measured too
        )
        self._timeout = timeout
        self._temperature = temperature
        self.clock = clock

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> httpx.Response:
        """GET with the request timeout. httpx.HTTPError when nothing comes back."""
        return await self._http.get(path, timeout=self._timeout)

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POST a JSON body with the request timeout. httpx.HTTPError when nothing comes back."""
        return await self._http.post(path, json=body, timeout=self._timeout)

    async def put(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """PUT a JSON body with the request timeout. httpx.HTTPError when nothing comes back."""
        return await self._http.put(path, json=body, timeout=self._timeout)

    async def delete(self, path: str) -> httpx.Response:
        """DELETE with the request timeout. httpx.HTTPError when nothing comes back."""
        return await self._http.delete(path, timeout=self._timeout)

    async def ask(self, ask: Ask, *, due: float | None = None, fresh: bool = True) -> Sample:
        """Send one request and read its stream to the end; faults are returned, never raised.

        `fresh`: the prompt must be new to the server, so tokens found in its cache are a fault.
        """
        due = self.clock() if due is None else due
        stream = _Stream()
        try:
            async with asyncio.timeout(self._timeout):
                fault = await self._read(ask, stream)
        except TimeoutError:
            fault = Fault("timeout", f"no end within {self._timeout:g} s")
        except httpx.HTTPError as error:
            fault = Fault("connection", f"{type(error).__name__}: {error}")
        fault = fault or stream.verdict(ask)
        if fault is None and fresh and stream.cached_tokens:
            fault = Fault(
                "cached_prompt", f"{stream.cached_tokens} tokens of a new prompt came from a cache"
            )
        return Sample(
            model=ask.model,
            due=due,
            end=self.clock(),
            token_times=tuple(stream.token_times),
            output_tokens=0 if fault else ask.output_tokens,
            text="".join(stream.text),
            fingerprint=stream.fingerprint,
            fault=fault,
        )

    def body(self, ask: Ask) -> dict[str, Any]:
        """What is posted to /v1/completions."""
        return {
            "model": ask.model,
            "prompt": list(ask.prompt),
            "max_tokens": ask.output_tokens,
            "min_tokens": ask.output_tokens,
            "ignore_eos": True,
            "temperature": self._temperature,
            **({"seed": _seed_of(ask.prompt)} if self._temperature else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def _read(self, ask: Ask, stream: _Stream) -> Fault | None:
        async with self._http.stream("POST", "/v1/completions", json=self.body(ask)) as response:
            if response.status_code != 200:
                text = (await response.aread())[:300].decode(errors="replace")
                return Fault(f"http_{response.status_code}", text)
            async for data, at in _events(response, self.clock):
                stream.take(data, at)
        return None


class Reachable(Protocol):
    """Options of a benchmark that runs against a server."""

    @property
    def url(self) -> str: ...
    @property
    def timeout(self) -> float: ...
    @property
    def api_key(self) -> str | None: ...


def client_of(
    options: Reachable,
    *,
    temperature: float = 0.0,
    transport: httpx.AsyncBaseTransport | None,
    clock: Clock,
) -> BenchClient:
    """The connections of one run."""
    return BenchClient(
        options.url,
        timeout=options.timeout,
        api_key=options.api_key,
        temperature=temperature,
        transport=transport,
        clock=clock,
    )


def _seed_of(prompt: Sequence[int]) -> int:
    """One prompt is answered alike whenever it is asked."""
    return zlib.crc32(repr(list(prompt)).encode())


async def _events(response: httpx.Response, clock: Clock) -> AsyncIterator[tuple[bytes, float]]:
    """The data of each server-sent event, with the time its last bytes arrived."""
    rest, data = b"", []
    async for chunk in response.aiter_bytes():
        at = clock()
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data), at
                data = []
