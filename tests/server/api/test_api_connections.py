"""How connections end: clients hear the answer that comes before they have sent all, and none
keeps a connection by sending for ever."""

import asyncio
import contextlib
import logging
import os
import resource
import socket
from dataclasses import replace

import pytest

from fader_server import connection
from fader_server.api.context import BaseModel, largest_body
from fader_server.config import ServeConfig
from tests.server.api.api_fakes import World
from tests.server.api.conftest import listening

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
MEBIBYTE = b"x" * (1 << 20)


async def send_all_then_read(port: int, head: bytes, mebibytes: int) -> bytes:
    """As clients do that look for an answer once everything is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head)
        for _ in range(mebibytes):
            writer.write(MEBIBYTE)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def refusal_of(port: int, mebibytes: int) -> bytes:
    length = f"content-length: {mebibytes << 20}\r\n\r\n".encode()
    return await send_all_then_read(port, HEAD + length, mebibytes)


def test_bodies_may_be_as_large_as_the_context_asks_for():
    base = BaseModel("base", "f" * 64, 4096, 0)
    long = replace(base, max_model_len=1 << 17)
    assert [largest_body(ServeConfig(), one) for one in (base, long)] == [1 << 20, 1 << 21]
    assert largest_body(ServeConfig(max_body=99), long) == 99


async def test_a_client_that_sends_too_much_reads_why(world: World):
    async with listening(world) as port:
        for _ in range(3):
            answer = await refusal_of(port, 30)
            assert answer.startswith(b"HTTP/1.1 413")
            assert b'"code":"request_too_large"' in answer


async def test_what_is_not_http_reads_why_however_long_it_is(world: World):
    async with listening(world) as port:
        answer = await send_all_then_read(port, b"GET / HTTP/1.1\r\nx-a: ", 8)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b'"code": "bad_request"' in answer


async def test_what_is_taken_after_the_answer_is_bounded(world: World, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_BYTES", 1 << 20)
    async with listening(world) as port:
        with pytest.raises(OSError):  # noqa: PT011 - a reset or a broken pipe, as it falls
            await refusal_of(port, 60)


async def trickle(port: int, head: bytes, seconds: float = 3.0) -> bytes:
    """Send a byte now and then until the server has enough of it; what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = asyncio.create_task(reader.read())
    writer.write(head)
    try:
        async with asyncio.timeout(seconds):
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)
    except ConnectionError:
        pass
    finally:
        writer.close()
    return await said


async def test_a_trickle_after_a_refusal_ends(world: World, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.1)
    async with listening(world) as port:
        with contextlib.suppress(ConnectionResetError):
            answer = await trickle(port, HEAD + b"content-length: 99999999\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 413")


async def test_a_body_that_nobody_waits_for_ends_its_connection(worlds):
    world = worlds(body_timeout=0.2, api_key=("sk-1",))
    async with listening(world) as port:
        with contextlib.suppress(ConnectionResetError):
            answer = await trickle(port, HEAD + b"content-length: 999\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 401")


async def test_a_connection_whose_body_came_after_the_answer_is_kept(worlds):
    world = worlds(api_key=("sk-1",))
    async with listening(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(HEAD + b"content-length: 2\r\n\r\n")
            assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 401")
            writer.write(b"{}")
        writer.close()


async def test_a_body_that_breaks_off_into_nonsense_is_told_once(world: World, caplog):
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"
    async with listening(world) as port:
        with caplog.at_level(logging.ERROR):
            answer = await send_all_then_read(port, chunked + b"no chunk\r\n", 1)
            assert answer.count(b"HTTP/1.1 400") == answer.count(b"HTTP/1.1") == 1
    assert not caplog.records


async def test_nonsense_after_the_answer_ends_in_silence(worlds, caplog):
    world = worlds(api_key=("sk-1",))
    async with listening(world) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with caplog.at_level(logging.ERROR):
            writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n")
            assert (await reader.readuntil(b"}}")).startswith(b"HTTP/1.1 401")
            writer.write(b"no chunk\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    assert not caplog.records


async def ask(port: int, *lines: str) -> tuple[bytes, bytes]:
    """Head and body of the answer to a request of these lines."""
    sent = "\r\n".join((*lines, "connection: close", "", "")).encode()
    answer = await send_all_then_read(port, sent, 0)
    return answer.partition(b"\r\n\r\n")[::2]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://other/v1/models", 200),
        ("HTTPS://other:8000/v1/models?x=http://y/z", 200),
        ("http://other/v1/nothing", 404),
        ("http://other", 404),
        ("http://user@other/v1/models", 404),
        ("ftp://other/v1/models", 404),
        ("/http://other/v1/models", 404),
    ],
)
async def test_a_target_may_be_a_whole_url(world: World, target, status):
    async with listening(world) as port:
        head, _ = await ask(port, f"GET {target} HTTP/1.1", "host: a")
        assert head.startswith(f"HTTP/1.1 {status}".encode())


async def test_a_whole_url_needs_the_key_as_its_path_does(worlds):
    async with listening(worlds(api_key=("sk-1",))) as port:
        for target in ("/v1/models", "http://a/v1/models", "http://a//health/../v1/models"):
            head, _ = await ask(port, f"GET {target} HTTP/1.1", "host: a")
            assert head.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize(
    ("lines", "id"),
    [
        (("nonsense",), b"req-"),
        (("GET /health HTTP/1.1",), b"req-"),
        (
            ("POST /v1/completions HTTP/1.1", "host: a", "content-type: application/json",
             "x-request-id: mine", "transfer-encoding: chunked", "", "no chunk"),
            b"mine",
        ),
    ],
)  # fmt: skip
async def test_what_is_not_http_has_a_request_id_too(world: World, lines, id):
    async with listening(world) as port:
        head, _ = await ask(port, *lines)
        assert head.startswith(b"HTTP/1.1 400")
        assert b"x-request-id: " + id in head


async def test_a_burst_of_clients_waits_in_the_kernel(world: World):
    """The event loop stands still meanwhile: none of them is taken."""
    async with listening(world) as port:
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                client = socket.create_connection(("127.0.0.1", port), timeout=0.5)
                stack.enter_context(client)


async def test_without_descriptors_clients_wait_and_the_log_has_one_line(
    world: World, caplog, monkeypatch
):
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", 0.02)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with listening(world) as port:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(4)]
            loop = asyncio.get_running_loop()
            used = max(int(number) for number in os.listdir("/dev/fd")) + 1
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            spare = [stack.enter_context(socket.socket()) for _ in range(used)]  # no gaps below
            resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1].fileno() + 1, limits[1]))
            for client in clients:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", port))
                await loop.sock_sendall(client, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
            await asyncio.sleep(0.1)
            told = [record for record in caplog.records if record.levelno >= logging.WARNING]
            assert [record.name for record in told] == ["fader_server.descriptors"]
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for client in clients:
                assert (await loop.sock_recv(client, 99)).startswith(b"HTTP/1.1 200")
