"""A Hugging Face Hub on a local port: two routes, and every way to answer them badly."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE, RawAdapter

COMMIT = "a" * 40
OTHER_COMMIT = "b" * 40


@dataclass
class FakeHub:
    """Repositories by id, each with files by commit and commits by branch."""

    url: str = ""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    """Old id → new id, as after a rename."""
    asked: list[str] = field(default_factory=list)
    """Every path of the two routes asked for."""
    status: int = 200
    cut: int | None = None
    """Bytes of a file after which the connection ends."""
    drip: threading.Event | None = None
    """A file's bytes come one at a time until this is set."""
    dripped: int = 0
    lie: dict[str, Any] = field(default_factory=dict)
    """Changes to what is told of the weights."""
    damage: bool = False
    elsewhere: bool = False
    """Files are redirected to another host, as the Hub does."""
    keys: list[tuple[str, str | None]] = field(default_factory=list)
    """Host and authorization of every request for a file."""

    def add(self, repo: str, raw: RawAdapter, commit: str = COMMIT, branch: str = "main") -> None:
        self.files[repo, commit] = {CONFIG_FILE: raw.config, WEIGHTS_FILE: raw.weights}
        self.branches[repo, branch] = commit

    @property
    def downloads(self) -> int:
        return sum("/resolve/" in path for path in self.asked)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[:2] != ["api", "models"] and parts[2:3] != ["resolve"]:
            return 404, {}, b""  # what the library asks on its own account
        self.asked.append(path)
        if self.status != 200:
            return self.status, {}, b"{}"
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), parts[5])
        repo, commit, name = "/".join(parts[:2]), parts[3], parts[4]
        data = self.files.get((self.moved.get(repo, repo), commit), {}).get(name)
        if data is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        if self.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        return 200, {}, data

    def _info(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.moved.get(repo, repo)
        commit = self.branches.get((repo, revision), revision)
        files = self.files.get((repo, commit))
        if files is None:
            known = any(name == repo for name, _ in self.files)
            return 404, {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, b"{}"
        siblings = [_sibling(name, data) for name, data in files.items()]
        for sibling in siblings:
            if sibling["rfilename"] == WEIGHTS_FILE:
                sibling.update(self.lie)
        return 200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode()


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
    if name.endswith(".safetensors"):
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
    return found


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path)
            host = self.headers["host"]
            if "/resolve/" in self.path:
                hub.keys.append((host.partition(":")[0], self.headers["authorization"]))
                if hub.elsewhere and host.startswith("127."):
                    port = server.server_address[1]
                    status, body = 302, b""
                    headers = {"location": f"http://localhost:{port}{self.path}"}
            is_file = "/resolve/" in self.path
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            if is_file and hub.drip is not None:
                for byte in body:
                    if hub.drip.wait(0.002):
                        return
                    self.wfile.write(bytes([byte]))
                    hub.dripped += 1
            elif is_file and hub.cut is not None:
                self.wfile.write(body[: hub.cut])
                self.close_connection = True
            else:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:
                return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        if hub.drip is not None:
            hub.drip.set()
        server.shutdown()
        server.server_close()
        thread.join()
