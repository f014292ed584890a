import hashlib
import json
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from fader_server.cli import main
from fader_server.config import ServeConfig
from fader_server.engine.stats import TenantStats
from fader_server.errors import ConfigInvalid
from tests.server.api.api_fakes import FakeStats, World
from tests.server.api.conftest import asgi, listening

OPEN = {"/health", "/ready", "/metrics"}
ADMIN = {
    ("PUT", "/v1/adapters/{name:path}"),
    ("PATCH", "/v1/adapters/{name:path}"),
    ("DELETE", "/v1/adapters/{name:path}"),
    ("GET", "/v1/recipes"),
    ("GET", "/v1/recipes/{name:path}"),
    ("PUT", "/v1/recipes/{name:path}"),
    ("DELETE", "/v1/recipes/{name:path}"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
}
NOTHING_KEPT = "/v1/responses/{id:path}"
KEYS = {"api_key": ("user-key",), "admin_key": "admin-key"}


def routes(world: World) -> list[tuple[str, str]]:
    """Every method and path template, found where the application itself looks."""
    found: list[tuple[str, str]] = []
    pending = list(world.app.routes)
    while pending:
        route = pending.pop()
        pending.extend(getattr(getattr(route, "original_router", None), "routes", []))
        if isinstance(route, APIRoute):
            found.extend((method, route.path) for method in route.methods)
        elif not hasattr(route, "original_router"):
            raise AssertionError(f"a route nobody guards: {route}")
    return sorted(set(found))


def path_of(template: str) -> str:
    return template.replace("{name:path}", "tone").replace("{id:path}", "tone")


def test_the_list_of_routes_is_the_contract(world: World):
    listed = routes(world)
    changing = {route for route in listed if route[0] in ("PUT", "PATCH", "DELETE")}
    assert changing - {("DELETE", NOTHING_KEPT)} < ADMIN
    assert len([route for route in listed if route[0] != "HEAD"]) == 25
    heads, gets = ([path for method, path in listed if method == verb] for verb in ("HEAD", "GET"))
    assert heads == gets
    assert {path for _, path in listed} >= OPEN


async def test_every_route_needs_a_key_unless_it_is_open(worlds):
    world = worlds(**KEYS)
    async with asgi(world) as client:
        for method, template in routes(world):
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "user-key"}):
                answer = await client.request(method, path_of(template), headers=headers, json={})
                expected = 200 if template in OPEN else 401
                assert answer.status_code == expected, (method, template)
        for method, path in (("OPTIONS", "/v1/models"), ("GET", "/nope"), ("POST", "/v1/models")):
            assert (await client.request(method, path)).status_code == 401


async def test_user_key_opens_user_routes_only(worlds):
    world = worlds(**KEYS)
    async with asgi(world, authorization="Bearer user-key") as client:
        for method, template in routes(world):
            answer = await client.request(method, path_of(template), json={})
            if (method.replace("HEAD", "GET"), template) in ADMIN:
                assert answer.status_code == 403
                told = b"" if method == "HEAD" else b'"code":"permission_denied"'
                assert told in answer.content
            else:
                expected = (404,) if template == NOTHING_KEPT else (200, 400)
                assert answer.status_code in expected, (method, template)
    assert set(world.adapters.infos) == {"tone", "domain"}


async def test_admin_key_opens_everything(worlds):
    world = worlds(**KEYS)
    async with asgi(world, authorization="bearer admin-key") as client:
        for method, template in routes(world):
            answer = await client.request(method, path_of(template), json={})
            assert answer.status_code in (200, 400, 404), (method, template)


async def test_admin_routes_are_off_without_an_admin_key_once_there_is_a_key(worlds):
    world = worlds(api_key=("user-key",))
    async with asgi(world, authorization="Bearer user-key") as client:
        answer = await client.delete("/v1/adapters/tone")
    assert answer.status_code == 403
    assert "--admin-key" in answer.json()["error"]["message"]


async def test_insecure_bind_opens_user_routes_only(worlds):
    world = worlds(host="0.0.0.0", insecure=True)
    async with asgi(world) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.delete("/v1/adapters/tone")).status_code == 403


async def test_loopback_without_keys_is_open_but_not_to_foreign_host_names(world: World):
    """A web page may resolve its own name to 127.0.0.1; its Host header gives it away."""
    transport = httpx.ASGITransport(world.app)
    for host, status in (
        ("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("localhost@evil", 403),
    ):  # fmt: skip
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            answer = await client.patch(
                "/v1/adapters/tone", json={"pin": True}, headers={"host": host}
            )
            assert answer.status_code == status, host


async def test_open_user_routes_ignore_made_up_keys(client):
    answer = await client.get("/v1/models", headers={"authorization": "Bearer EMPTY"})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "value",
    [b"Bearer \xc3\xa9", b"Bearer ", b"Bearer " + b"x" * 10_000, b"Basic dXNlcg==", b"", b"Bearer"],
)
async def test_odd_keys_are_401(worlds, value):
    world = worlds(**KEYS)
    async with asgi(world) as client:
        answer = await client.get("/v1/models", headers=[(b"authorization", value)])
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


async def test_two_authorization_headers_are_401(worlds):
    world = worlds(**KEYS)
    pair = [(b"authorization", b"Bearer user-key"), (b"authorization", b"Bearer admin-key")]
    async with asgi(world) as client:
        assert (await client.get("/v1/models", headers=pair)).status_code == 401


@pytest.mark.parametrize("end", ["", "/", "%2F"])
async def test_a_slash_at_the_end_opens_nothing(worlds, end):
    """Without a key, and with a user's on admin routes: as without the slash."""
    world = worlds(**KEYS, protect_metrics=True)
    user = {"authorization": "Bearer user-key"}
    async with asgi(world) as client:
        for method, template in routes(world):
            path = path_of(template) + end
            answer = await client.request(method, path, json={})
            is_open = template in OPEN - {"/metrics"} and end != "%2F"
            assert answer.status_code == (200 if is_open else 401), path
            if (method.replace("HEAD", "GET"), template) in ADMIN:
                answer = await client.request(method, path, json={}, headers=user)
                assert answer.status_code in ((403, 404) if end == "%2F" else (403,)), path
    assert set(world.adapters.infos) == {"tone", "domain"}


async def test_one_slash_at_the_end_answers_as_without(worlds, caplog):
    caplog.set_level("INFO")
    world = worlds()
    gets = ["/v1/models", "/v1/models/tone", "/v1/adapters", "/v1/adapters/tone", "/v1/recipes"]
    async with asgi(world) as client:
        for path in (*gets, "/health", "/ready", "/metrics"):
            answer = await client.get(path)
            slashed = await client.get(path + "/")
            assert slashed.status_code == answer.status_code == 200, path
            if path in gets:
                assert slashed.json() == answer.json()
        chat = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
        assert (await client.post("/v1/chat/completions/", json=chat)).status_code == 200
        assert (await client.put("/v1/adapters/a/", json={"source": "one"})).status_code == 201
        assert "a" in world.adapters.infos
        for path in ("/", "//", "/v1/models//", "/v1/models%2F", "/nope/", "/health//"):
            assert (await client.get(path)).status_code in (400, 404), path
        assert (await client.get("/v1/chat/completions/")).status_code == 405
    told = {record.fields["route"] for record in caplog.records if record.name == "fader.request"}
    assert {"/v1/models", "/v1/chat/completions"} <= told


async def test_a_slash_before_a_query_is_at_the_end_too(worlds):
    async with listening(worlds()) as port, httpx.AsyncClient() as client:
        for path, status in (("/v1/models/?a=b/", 200), ("/v1/models/", 200), ("/nope/", 404)):
            answer = await client.get(f"http://127.0.0.1:{port}{path}")
            assert answer.status_code == status, path


@pytest.mark.parametrize("path", ["/%761/models", "//v1/models", "/v1/models//", "/V1/models"])
async def test_odd_paths_do_not_pass_the_guard(worlds, path):
    world = worlds(**KEYS)
    async with asgi(world) as client:
        for host in ("a/v1", "a?x", "a#health"):
            answer = await client.get(path, headers={"host": host})
            assert answer.status_code == 401


async def test_metrics_can_be_protected(worlds):
    world = worlds(**KEYS, protect_metrics=True)
    async with asgi(world) as client:
        assert (await client.get("/metrics")).status_code == 401
        key = {"authorization": "Bearer user-key"}
        assert (await client.get("/metrics", headers=key)).status_code == 200


async def test_metrics_can_be_protected_where_users_need_no_key(worlds):
    world = worlds(admin_key="admin-key", protect_metrics=True)
    async with asgi(world) as client:
        assert (await client.get("/v1/models")).status_code == 200
        for headers in ({}, {"authorization": "Bearer made-up"}):
            assert (await client.get("/metrics", headers=headers)).status_code == 401
        key = {"authorization": "Bearer admin-key"}
        assert (await client.get("/metrics", headers=key)).status_code == 200


def test_protected_metrics_need_a_key_that_opens_them(capsys):
    assert main(["serve", "--protect-metrics"]) == 2
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert "--protect-metrics needs a key" in told
    for keys in ({"admin_key": "a"}, {"api_key": ("k",)}, {"tenants": Path("tenants.toml")}):
        ServeConfig(protect_metrics=True, **keys)


async def test_neither_log_nor_settings_show_keys(worlds, caplog):
    caplog.set_level("INFO")
    world = worlds(**KEYS)
    async with asgi(world, authorization="Bearer user-key") as client:
        await client.get("/v1/models")
    fields = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert len(fields) == 1
    assert fields[0]["tenant"]
    assert "user-key" not in json.dumps(fields)
    assert "user-key" not in repr(world.app.state.context.config)
    assert "admin-key" not in repr(world.app.state.context.config)


async def test_labels_of_keys_tell_their_place_and_nothing_of_the_key(worlds, caplog):
    """Whoever reads them could try guesses of a key against its hash."""
    caplog.set_level("INFO")
    keys = ("first", "second", "admin-key")
    world = worlds(api_key=keys[:2], admin_key=keys[2])
    running = {key: TenantStats(1, 0, 1) for key in ("key:1", "key:2", "key:admin")}
    world.engine.told = FakeStats(tenants=running)
    async with asgi(world) as client:
        for key in (*keys, "first"):
            await client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
        told = (await client.get("/metrics")).text
    lines = [record.fields for record in caplog.records if record.name == "fader.request"]
    labels = [line["tenant"] for line in lines][:4]
    assert labels == ["key:1", "key:2", "key:admin", "key:1"]
    told += json.dumps(lines)
    for key in keys:
        assert hashlib.sha256(key.encode()).hexdigest()[:8] not in told


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_binds_need_a_key_or_insecure(host):
    with pytest.raises(ConfigInvalid, match="--api-key"):
        ServeConfig(host=host, admin_key="a")
    ServeConfig(host=host, api_key=("k",))
    ServeConfig(host=host, insecure=True)
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServeConfig(host=loopback)
