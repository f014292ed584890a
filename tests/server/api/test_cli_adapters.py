"""`fader adapters` against a real socket: what it prints, what it asks for, how it ends."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import httpx
import pytest

from fader_server.cli import main
from fader_server.cli.adapters import read_terms, size
from fader_server.cli.connected import Session
from fader_server.client import Client
from fader_server.config import ClientConfig
from fader_server.errors import ConfigInvalid, ServerFailed, ServerRefused
from tests.server.api.api_fakes import World, digest
from tests.server.api.conftest import listening

TONE, DOMAIN = digest("tone"), digest("domain")


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture
async def run(world: World, capsys) -> AsyncIterator[Run]:
    async with listening(world) as port:

        async def go(*arguments: str) -> Ran:
            url = f"http://127.0.0.1:{port}"
            code = await asyncio.to_thread(main, ["adapters", *arguments, "--url", url])
            told = capsys.readouterr()
            return Ran(code, told.out, told.err)

        yield go


async def test_a_list_is_a_table_with_a_row_an_adapter(run: Run):
    ran = await run("list")
    heads, *rows = ran.out.splitlines()
    assert (ran.code, ran.err) == (0, "")
    assert heads.split()[:3] == ["NAME", "VERSION", "RANK"]
    assert [row.split()[:2] for row in rows] == [["tone", TONE[:12]], ["domain", DOMAIN[:12]]]


async def test_load_swap_pin_unpin_unload(run: Run, world: World):
    loaded = await run("load", "new", "one", "--pin")
    assert loaded.code == 0
    assert loaded.out.startswith(f"new is loaded: version {digest('one')[:12]}, rank 8")
    swapped = await run("swap", "new", "two", "--if-version", digest("one"))
    assert f"was at {digest('one')[:12]}, now: version {digest('two')[:12]}" in swapped.out
    assert world.adapters.infos["new"].pinned, "a swap keeps the pin"
    assert (await run("unpin", "new")).out == "new is not pinned\n"
    assert not world.adapters.infos["new"].pinned
    assert (await run("pin", "new")).out == "new is pinned\n"
    shown = await run("show", "new")
    assert "1 KiB" in shown.out
    assert digest("two") in shown.out
    assert (await run("unload", "new")).out == "new is unloaded\n"
    assert "new" not in world.adapters.infos


async def test_load_wants_a_free_name_and_swap_a_taken_one(run: Run, world: World):
    taken = await run("load", "tone", "one")
    assert (taken.code, taken.out) == (2, "")
    free = await run("swap", "new", "one")
    assert (free.code, free.out) == (2, "")
    stale = await run("swap", "tone", "one", "--if-version", "0" * 12)
    assert stale.code == 2
    assert world.adapters.infos["tone"].version == TONE
    assert "new" not in world.adapters.infos


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("load", "x", "broken"), 2, "lora_A is missing"),
        (("load", "x", "away"), 1, "failed or did not answer in time"),
        (("load", "x", "missing"), 2, "There is no adapter at this source"),
        (("show", "nope"), 2, "no adapter 'nope' is loaded"),
        (("unload", "nope"), 2, "no adapter 'nope' is loaded"),
        *(((command, ""), 2, "malformed") for command in ("show", "unload", "pin")),
        (("recipe", "show", ""), 2, "malformed"),
        (("recipe", "show", "nope"), 2, "there is no recipe 'nope'"),
        (("recipe", "set", "warm", "tone:much"), 2, "'much' is no number"),
        (("recipe", "set", "warm", "tone:nan"), 2, "'nan' is no number"),
        (("recipe", "set", "warm", "tone", "tone:2"), 2, "tone stands twice"),
        (("recipe", "set", "warm", "tone:17"), 2, "from -16 to 16"),
        (("recipe", "set", "tone", "domain"), 2, "'tone' is the name of an adapter"),
        (("load", "x"), 2, "SOURCE"),
        (("nonsense",), 2, "nonsense"),
    ],
)
async def test_a_refusal_is_the_servers_own_line(run: Run, arguments, code, told):
    ran = await run(*arguments)
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("fader: ")
    assert ran.err.count("\n") == 1
    assert told in ran.err


async def test_recipes_are_written_shown_listed_and_deleted(run: Run, world: World):
    ref = f"domain@{DOMAIN[:12]}"
    made = await run("recipe", "set", "warm", "tone:0.7", f"{ref}:-0.5000001", "--new")
    first = world.recipes.get("warm").digest
    assert made.out == f"warm is at {first[:12]}: tone:0.7 {ref}:-0.5000001\n"
    assert (await run("recipe", "set", "warm", "tone", "--new")).code == 2
    assert (await run("recipe", "set", "warm", "tone", "--if-digest", "0" * 12)).code == 2
    both = await run("recipe", "set", "warm", "tone", "--new", "--if-digest", first)
    assert (both.code, world.recipes.get("warm").digest) == (2, first)
    shown = await run("recipe", "show", "warm")
    assert first in shown.out
    assert f"-0.5000001  at {DOMAIN[:12]}" in shown.out
    assert (await run("unload", "tone")).out == "tone is unloaded; recipes that miss it: warm\n"
    listed = await run("recipe", "list")
    assert listed.out.splitlines()[1].split()[-1] == "tone", "what is missing is told"
    assert "at nothing" in (await run("recipe", "show", "warm")).out
    assert (await run("recipe", "delete", "warm", "--if-digest", "0" * 12)).code == 2
    assert (await run("recipe", "delete", "warm", "--if-digest", first)).code == 0
    assert world.recipes.list() == []


async def test_json_is_the_servers_answer(run: Run):
    await run("recipe", "set", "warm", "tone")
    for arguments, key in (
        (("list",), None),
        (("show", "tone"), "version"),
        (("pin", "tone"), "pinned"),
        (("load", "new", "one"), "version"),
        (("recipe", "list"), None),
        (("recipe", "show", "warm"), "digest"),
        (("recipe", "delete", "warm"), "deleted"),
    ):
        ran = await run(*arguments, "--json")
        answer = json.loads(ran.out)
        assert (isinstance(answer, list) and answer) if key is None else answer[key]


async def test_the_key_is_sent_and_a_missing_one_is_told(worlds, capsys, monkeypatch):
    world = worlds(api_key=("user",), admin_key="boss")
    async with listening(world) as port:
        monkeypatch.setenv("FADER_URL", f"http://127.0.0.1:{port}/v1/")
        codes = {}
        for flags in ((), ("--api-key", "user"), ("--admin-key", "boss")):
            for command in (("list",), ("pin", "tone")):
                codes[flags, command] = await asyncio.to_thread(
                    main, ["adapters", *command, *flags]
                )
        monkeypatch.setenv("FADER_ADMIN_KEY", "boss")
        assert await asyncio.to_thread(main, ["adapters", "unpin", "tone"]) == 0
    assert list(codes.values()) == [2, 2, 0, 2, 0, 0]
    told = capsys.readouterr().err
    assert "A valid API key is required" in told
    assert "This route needs the admin key." in told
    assert "boss" not in told


def test_a_server_that_is_not_there_is_told(capsys):
    assert main(["adapters", "list", "--url", "http://127.0.0.1:9"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert main(["adapters", "list", "--url", "127.0.0.1:9"]) == 2
    assert "--url: expected an address" in capsys.readouterr().err


def answering(answer: httpx.Response | Exception) -> Client:
    def reply(request: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Client(ClientConfig(timeout=5.0), transport=httpx.MockTransport(reply))


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (httpx.Response(200, text="<html>"), ServerFailed, "is it Fader"),
        (httpx.Response(200, json=[1]), ServerFailed, "is it Fader"),
        (httpx.Response(200, json={"data": {}}), ServerFailed, "is it Fader"),
        (httpx.Response(404, json={"detail": "x"}), ServerRefused, "answered 404"),
        (httpx.Response(302, headers={"location": "/x"}), ServerFailed, "answered 302"),
        (httpx.Response(502, text="bad gateway"), ServerFailed, "answered 502"),
        (httpx.Response(503, json={"error": {"message": "later"}}), ServerFailed, "later"),
        (httpx.Response(507, json={"error": {"message": "full"}}), ServerRefused, "full"),
        (httpx.ReadTimeout("x"), ServerFailed, "within 5 s"),
        (httpx.ConnectError("refused"), ServerRefused, "cannot be reached"),
    ],
)
def test_what_a_client_may_hear(answer, error, told):
    with pytest.raises(error, match=told):
        answering(answer).adapters()


def test_a_servers_message_cannot_move_the_cursor():
    evil = httpx.Response(400, json={"error": {"message": "a\x1b[2Jb\r\nc\x07"}})
    with pytest.raises(ServerRefused) as refused:
        answering(evil).adapters()
    assert str(refused.value).isprintable()


async def test_a_server_of_another_version_is_no_traceback(run: Run, world: World, monkeypatch):
    monkeypatch.setattr(Client, "adapters", lambda self: [{"name": "x"}])
    ran = await run("list")
    assert (ran.code, ran.out) == (1, "")
    assert "is it a Fader of this version?" in ran.err


def test_a_long_load_shows_a_spinner_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    shown = []
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr("sys.stderr", stream)
        with Session(answering(httpx.Response(200)), False).patiently("loading x\x1b[2J"):
            pass
        shown.append(stream.getvalue())
    assert "loading x" in shown[0]
    assert "\x1b[2J" not in shown[0]
    assert shown[1] == ""


def test_terms():
    assert read_terms(["a", "org/b:-1e-1", f"c@{'0' * 12}:2"]) == {
        "a": 1.0, "org/b": -0.1, f"c@{'0' * 12}": 2.0
    }  # fmt: skip
    for bad in ("a:", "a:x", "a:inf"):
        with pytest.raises(ConfigInvalid, match="no number"):
            read_terms([bad])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (5 << 30, "5 GiB"), (None, "-")]
)
def test_sizes_for_a_person(count, text):
    assert size(count) == text
