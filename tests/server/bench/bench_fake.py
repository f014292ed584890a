"""A pretend OpenAI server with chosen delays and defects, for a fake clock and for uvicorn."""

import asyncio
import json
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn

CARDS = [
    {"id": "base", "parent": None, "vocab_size": 1000},
    *({"id": f"a{n}", "parent": "base"} for n in range(4)),
]


@dataclass
class FakeServer:
    """`defect` names what goes wrong in completions for `bad_model` (every model by default)."""

    first: float = 0.05
    gap: float = 0.01
    defect: str = ""
    bad_model: str | None = None
    per_event: int = 1
    running: int = 0
    peak: int = 0
    asked: list[dict] = field(default_factory=list)
    in_flight: Counter = field(default_factory=Counter)
    peak_per_model: int = 0
    lists: bool = False
    """Has GET /v1/adapters."""
    loaded: dict[str, str] = field(default_factory=dict)
    """Source by name."""
    loads: int = 0

    def answer(self, path: str, body: dict | None) -> tuple[int, list[tuple[float, bytes]]]:
        """(status, [(seconds before, bytes)])."""
        if path == "/v1/models" and self.defect != "no_models":
            return 200, [(0, json.dumps({"data": CARDS}).encode())]
        if path == "/health":
            return 200, [(0, b'{"status": "ok"}')]
        if path.startswith("/v1/adapters/") or (path == "/v1/adapters" and self.lists):
            return self._adapters(path.removeprefix("/v1/adapters").strip("/"), body)
        if path != "/v1/completions":
            return 404, [(0, b'{"error": {}}')]
        assert body is not None
        self.asked.append(body)
        return self._complete(body)

    def _adapters(self, name: str, body: dict | None) -> tuple[int, list[tuple[float, bytes]]]:
        if not name:
            rows = [{"name": f"a{n}", "tier": "host" if n < 2 else "disk"} for n in range(12)]
            return 200, [(0, json.dumps({"data": rows}).encode())]
        if body is not None:
            self.loads += 1
            if self.defect == "no_loads":
                return 403, [(0, b"{}")]
            if self.defect != "stale" or self.loads <= 2:
                self.loaded[name] = body["source"]
            told = {"version": body["source"], "bytes": 8, "rank": 16}
            return 200, [(0.02 + self._slower, json.dumps(told).encode())]
        tier = "disk" if name.endswith("1") else "host"
        return 200, [(0.001 + self._slower, json.dumps({"name": name, "tier": tier}).encode())]

    def unload(self, path: str) -> None:
        self.loaded.pop(path.removeprefix("/v1/adapters/"), None)

    @property
    def _slower(self) -> float:
        """With the number of adapters."""
        return len(self.loaded) * 0.01 if self.defect == "grows" else 0.0

    def _complete(self, body: dict) -> tuple[int, list[tuple[float, bytes]]]:
        defect = self.defect if self.bad_model in (None, body["model"]) else ""
        if defect == "http":
            return 503, [(0, b'{"error": {"message": "full"}}')]
        count = body["max_tokens"] - (defect == "short")
        usage = {"prompt_tokens": len(body["prompt"]) + (defect == "prompt")}
        usage |= {"completion_tokens": count}
        usage |= {"prompt_tokens_details": {"cached_tokens": 16 if defect == "cached" else 0}}
        word = self.loaded.get(body["model"], body["model"])
        word = word if defect != "same_text" else "x"
        if defect == "disturbed" and self.loads > 3:
            word = f"other{self.loads % 2}"
        if defect == "mixes" and self.running > 1:
            word = "other"
        parts: list[tuple[float, bytes]] = []
        for start in range(0, count, self.per_event):
            text = f" {word}" * min(self.per_event, count - start)
            last = start + self.per_event >= count
            finish = ("stop" if defect == "finish" else "length") if last else None
            choice = {"index": 0, "text": text, "finish_reason": finish}
            event = {"choices": [choice], "system_fingerprint": "fp-1"}
            parts.append((self.gap if parts else self.first, _event(event)))
        if defect == "error":
            parts[-1] = (self.gap, _event({"error": {"message": "broke"}}))
        if defect == "garbage":
            parts[-1] = (self.gap, b"data: {]\n\n")
        if defect != "no_usage":
            parts.append((0, _event({"choices": [], "usage": usage})))
        if defect != "no_done":
            parts.append((0, b": ping\n\ndata: [DONE]\r\n\r\n"))
        return 200, parts

    def enter(self, model: str) -> None:
        self.running += 1
        self.in_flight[model] += 1
        self.peak = max(self.peak, self.running)
        self.peak_per_model = max(self.peak_per_model, self.in_flight[model])

    def leave(self, model: str) -> None:
        self.running -= 1
        self.in_flight[model] -= 1


def _event(body: dict) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class _Body(httpx.AsyncByteStream):
    def __init__(self, transport: "FakeTransport", parts: list[tuple[float, bytes]], model: str):
        self._transport, self._parts, self._model = transport, parts, model

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for delay, data in self._parts:
            await asyncio.sleep(0)
            self._transport.clock.now += delay
            # Cut in two: a reader must not depend on where the network cuts.
            yield data[:7]
            yield data[7:]

    async def aclose(self) -> None:
        self._transport.server.leave(self._model)


@dataclass
class FakeTransport(httpx.AsyncBaseTransport):
    """Serves a FakeServer under a clock that only its own delays move."""

    server: FakeServer
    clock: FakeClock = field(default_factory=FakeClock)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        model = (body or {}).get("model", "")
        self.server.enter(model)
        if request.method == "DELETE":
            self.server.unload(request.url.path)
        status, parts = self.server.answer(request.url.path, body)
        return httpx.Response(status, stream=_Body(self, parts, model))


@contextmanager
def over_http(server: FakeServer) -> Iterator[str]:
    """Serve on a free loopback port in a thread; gives the URL."""

    async def app(scope, receive, send) -> None:
        assert scope["type"] == "http"
        data, more = b"", True
        while more:
            message = await receive()
            data, more = data + message.get("body", b""), message.get("more_body", False)
        body = json.loads(data) if data else None
        model = (body or {}).get("model", "")
        server.enter(model)
        if scope["method"] == "DELETE":
            server.unload(scope["path"])
        status, parts = server.answer(scope["path"], body)
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for delay, part in parts:
            await asyncio.sleep(delay)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        server.leave(model)
        await send({"type": "http.response.body", "body": b""})

    # No settings for logs: they would be those of the whole process.
    config = uvicorn.Config(app, lifespan="off", ws="none", http="h11", log_config=None)
    # asyncio switches Nagle off only where the socket names its protocol; bind_socket() does not.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # who connects before the thread runs waits
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join()
        listener.close()
