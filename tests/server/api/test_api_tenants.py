"""Keys of tenants: what a key may not use is, byte for byte, what does not exist."""

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from fader_adapters.spec import Blend, Term
from fader_server.ondemand import OnDemand
from fader_server.parking import Parking
from fader_server.tenants import Tenant, digest_of
from tests.server.api.api_fakes import FakeAdapters, World, digest
from tests.server.api.conftest import asgi
from tests.server.api.test_api_auth import ADMIN, NOTHING_KEPT, OPEN, path_of, routes
from tests.server.test_ondemand import FakeLoader

Ask = tuple[str, str, dict[str, Any] | None]
ACME, ALL = "sk-acme", "sk-all"
TENANTS = (
    Tenant("acme", (digest_of(ACME), digest_of("sk-acme-2")), ("acme-*", "tone")),
    Tenant("all", (digest_of(ALL),)),
)
OTHERS = {"api_key": ("user-key",), "admin_key": "admin-key"}
HIDDEN = ("secret", "org/secret", "ACME-x", "mix")
"""Adapters, and a recipe, that exist and that acme may not use."""


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def spellings(name: str) -> list[str]:
    version = digest(name)
    return [name, f"base:{name}", f"{name}@{version[:12]}", f"base:{name}@{version}"]


def generations(model: str, **others: Any) -> list[Ask]:
    body = {"model": model, "max_tokens": 2, **others}
    chat = {**body, "messages": [{"role": "user", "content": "x"}]}
    response = {"model": model, "max_output_tokens": 2, **others, "input": "x"}
    return [
        ("POST", "/v1/completions", {**body, "prompt": "x"}),
        ("POST", "/v1/completions", {**body, "prompt": "x", "stream": True}),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/chat/completions", {**chat, "stream": True}),
        ("POST", "/v1/responses", response),
        ("POST", "/v1/responses", {**response, "stream": True}),
    ]


def uses(name: str) -> list[Ask]:
    """Every way to use or look at one name."""
    asks: list[Ask] = []
    for spelled in spellings(name):
        asks += generations(spelled)
        asks += [
            ("POST", "/tokenize", {"model": spelled, "prompt": "x"}),
            ("POST", "/detokenize", {"model": spelled, "tokens": [97]}),
            ("GET", f"/v1/models/{spelled}", None),
        ]
    asks += [("GET", f"/v1/adapters/{ref}", None) for ref in (name, f"{name}@{digest(name)[:12]}")]
    return asks


def blends(name: str) -> list[Ask]:
    """Every way to use a name in a blend, at weight 0 too."""
    asks: list[Ask] = []
    ref = f"{name}@{digest(name)[:12]}"
    for field, scale in (("adapters", "weight"), ("lora", "scale")):
        one = {"name": "tone", scale: 0.5}
        for terms in (
            [{"name": name, scale: 0}],
            [{"name": ref, scale: 1}],
            [one, {"name": name, scale: 0.0}],
            [{"name": name}, one],
        ):
            asks += generations("base", **{field: terms})
    for spelled in (name, ref):
        asks += generations("base", lora_path=spelled)
    return asks


async def send(client: httpx.AsyncClient, ask: Ask, key: str) -> httpx.Response:
    method, path, body = ask
    return await client.request(method, path, json=body, headers=bearer(key))


def seen(answer: httpx.Response) -> tuple[int, dict[str, str], bytes]:
    """All that a client sees but the request's own id and time."""
    own = ("x-request-id", "openai-processing-ms")
    headers = {k: v for k, v in answer.headers.items() if k not in own}
    return answer.status_code, headers, answer.content


async def build(worlds: Callable[..., World], *, full: bool, **changes: Any) -> World:
    """A world in which what is hidden exists, or one in which it does not."""
    names = ["tone", "acme-a", *(name for name in HIDDEN if name != "mix" and full)]
    world = worlds(adapters=FakeAdapters(names), tenants=TENANTS, **OTHERS, **changes)
    if full:
        await recipe(world, "mix", tone=1.0)
    return world


async def recipe(world: World, name: str, **weights: float) -> None:
    terms = [{"name": name, "weight": weight} for name, weight in weights.items()]
    async with asgi(world, **bearer("admin-key")) as client:
        answer = await client.put(f"/v1/recipes/{name}", json={"adapters": terms})
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("name", HIDDEN)
async def test_what_a_key_may_not_use_is_what_does_not_exist(worlds, name):
    full, bare = await build(worlds, full=True), await build(worlds, full=False)
    async with asgi(full) as there, asgi(bare) as gone:
        for ask in [*uses(name), *blends(name)]:
            hidden = await send(there, ask, ACME)
            assert hidden.status_code == 404, ask
            for absent in (await send(gone, ask, ACME), await send(gone, ask, ALL)):
                assert seen(hidden) == seen(absent), ask
    assert full.engine.seen == []


@pytest.mark.parametrize("name", HIDDEN)
async def test_the_matrix_would_notice_a_key_that_may_use_it(worlds, name):
    """The control: every request of the matrix succeeds where the name exists for the key."""
    world = await build(worlds, full=True)
    async with asgi(world) as client:
        for ask in [*uses(name), *blends(name)]:
            _, path, body = ask
            given = body or {}
            blend = given.get("adapters") or given.get("lora") or given.get("lora_path")
            if name == "mix" and ("@" in path or path.startswith("/v1/adapters/")):
                continue  # a recipe is no adapter and has no versions
            if name == "mix" and "@" in (body or {}).get("model", ""):
                continue
            for key in (ALL, "user-key", "admin-key"):
                answer = await send(client, ask, key)
                if name != "mix" or not blend:
                    assert answer.status_code == 200, (ask, key, answer.text)
                elif "mix@" not in str(blend):
                    assert "is a recipe" in answer.text, (ask, key)
            await world.until(lambda: world.adapters.leases == 0)


async def test_the_lists_are_those_of_a_server_without_what_is_hidden(worlds):
    full, bare = await build(worlds, full=True), await build(worlds, full=False)
    for world in (full, bare):
        await recipe(world, "acme-mix", tone=0.5)
    async with asgi(full) as there, asgi(bare) as gone:
        for path, key in (("/v1/models", "id"), ("/v1/adapters", "name")):
            ask: Ask = ("GET", path, None)
            mine, all_of_bare = await send(there, ask, ACME), await send(gone, ask, ALL)
            listed = [card[key] for card in mine.json()["data"]]
            expected = ["tone", "acme-a"]
            assert listed == (["base", *expected, "acme-mix"] if key == "id" else expected)
            assert _timeless(mine) == _timeless(all_of_bare)
            for other in (ALL, "user-key", "admin-key"):
                names = [card[key] for card in (await send(there, ask, other)).json()["data"]]
                assert {"secret", "org/secret", "ACME-x", "tone"} <= set(names)


def _timeless(answer: httpx.Response) -> list[dict[str, Any]]:
    return [{**card, "created": 0} for card in answer.json()["data"]]


async def test_allowed_names_answer(worlds):
    world = await build(worlds, full=True)
    async with asgi(world) as client:
        for key in (ACME, "sk-acme-2"):
            for name in ("tone", "acme-a"):
                for ask in uses(name):
                    assert (await send(client, ask, key)).status_code == 200, ask
            for ask in generations("base"):
                assert (await send(client, ask, key)).status_code == 200
        await world.until(lambda: world.adapters.leases == 0)


async def test_who_may_use_a_recipe_may_use_its_adapters_in_it_and_only_there(worlds):
    world = await build(worlds, full=True)
    await recipe(world, "acme-mix", tone=0.5, secret=-0.25)
    blend = Blend.of((Term(digest("tone"), 0.5), Term(digest("secret"), -0.25)))
    async with asgi(world) as client:
        for model in ("acme-mix", "base:acme-mix"):
            for ask in generations(model):
                answer = await send(client, ask, ACME)
                assert answer.status_code == 200, ask
                assert f"secret@{digest('secret')[:12]}=-0.25" in answer.headers["x-fader-blend"]
                assert world.engine.seen[-1].blend == blend
            card = (await send(client, ("GET", f"/v1/models/{model}", None), ACME)).json()
            assert [term["version"] for term in card["adapters"]] == [
                digest("tone"), digest("secret"),
            ]  # fmt: skip
            for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [97]})):
                ask = ("POST", path, {"model": model, **body})
                assert (await send(client, ask, ACME)).status_code == 200
        for ask in [*uses("secret"), *blends("secret")]:
            assert (await send(client, ask, ACME)).status_code == 404
        await world.until(lambda: world.adapters.leases == 0)


async def test_a_recipe_that_misses_an_adapter_says_so_to_those_who_may_use_it(worlds):
    world = await build(worlds, full=True)
    await recipe(world, "acme-mix", tone=0.5, secret=1.0)
    await recipe(world, "other", secret=1.0)
    world.adapters.unload("secret")
    async with asgi(world) as client:
        told = await send(client, generations("acme-mix")[0], ACME)
        assert (told.status_code, told.json()["error"]["code"]) == (409, "recipe_incomplete")
        assert "secret is not loaded" in told.json()["error"]["message"]
        hidden = await send(client, generations("other")[0], ACME)
        assert hidden.status_code == 404
        assert "secret" not in hidden.text


def on_demand(worlds: Callable[..., World], loader: FakeLoader) -> World:
    def over(inner: Any) -> OnDemand:
        parking = Parking(inner, fixed=frozenset({"tone"}), limit=100)
        return OnDemand(parking, offers=lambda name: name in ("offered", "acme-new"))

    return worlds(adapters=loader, over=over, tenants=TENANTS, **OTHERS)


async def test_no_request_loads_what_its_key_may_not_use(worlds):
    loader = FakeLoader()
    world = on_demand(worlds, loader)
    async with asgi(world) as client:
        for ask in [*uses("offered"), *blends("offered")]:
            assert (await send(client, ask, ACME)).status_code == 404
        assert loader.loads == []
        answer = await send(client, generations("offered")[0], ALL)
        assert answer.status_code == 200, "the control: it would have loaded"
        assert loader.loads == ["offered"]
        assert (await send(client, generations("offered")[0], ACME)).status_code == 404


async def test_beside_a_hidden_name_others_load_as_beside_an_absent_one(worlds):
    """What is told as missing would else be another list."""
    answers = []
    for name, key in (("offered", ACME), ("nobody", ALL)):
        loader = FakeLoader()
        terms = [{"name": name}, {"name": "acme-new", "weight": 0.5}]
        async with asgi(on_demand(worlds, loader)) as client:
            answer = await send(client, generations("base", adapters=terms)[0], key)
        assert loader.loads == ["acme-new"]
        answers.append((answer.status_code, answer.text.replace(name, "NAME")))
    assert answers[0] == answers[1]
    assert "not loaded: NAME." in answers[0][1]


async def test_every_route_needs_a_key_when_tenants_have_some(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world) as client:
        for method, template in routes(world):
            for headers in ({}, bearer("wrong"), bearer("acme"), {"authorization": ACME}):
                answer = await client.request(method, path_of(template), headers=headers, json={})
                assert answer.status_code == (200 if template in OPEN else 401), (method, template)
        for method, path in (("OPTIONS", "/v1/models"), ("GET", "/nope"), ("POST", "/v1/models")):
            assert (await client.request(method, path)).status_code == 401


async def test_a_tenants_key_opens_user_routes_only(worlds):
    world = worlds(tenants=TENANTS)
    async with asgi(world, **bearer(ACME)) as client:
        for method, template in routes(world):
            answer = await client.request(method, path_of(template), json={})
            expected = (404,) if template == NOTHING_KEPT else (200, 400)
            if (method.replace("HEAD", "GET"), template) in ADMIN:
                expected = (403,)
            assert answer.status_code in expected, (method, template)
    assert set(world.adapters.infos) == {"tone", "domain"}


async def test_a_server_that_was_not_handed_the_tenants_of_its_file_lets_nobody_in(worlds):
    world = worlds(tenants=(Tenant("none", ()),))
    async with asgi(world) as client:
        for headers in ({}, bearer(""), bearer("none")):
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
            assert (await client.delete("/v1/adapters/tone", headers=headers)).is_error


async def test_no_two_tenants_share_a_prefix_cache(worlds):
    world = await build(worlds, full=True)
    keys = (ACME, "sk-acme-2", ALL, "user-key", "admin-key")
    async with asgi(world) as client:
        for key in keys:
            assert (await send(client, generations("tone")[0], key)).status_code == 200
    salts = dict(zip(keys, [request.cache_salt for request in world.engine.seen], strict=True))
    assert salts[ACME] == salts["sk-acme-2"] == "acme/"
    assert salts[ALL] == "all/"
    assert salts["user-key"] == "key:1/"
    assert salts["admin-key"] == "key:admin/"
    assert len(set(salts.values())) == 4


async def test_a_lease_is_taken_in_the_name_of_its_tenant(worlds):
    world = await build(worlds, full=True)
    await recipe(world, "acme-mix", secret=1.0)
    world.adapters.lessees.clear()
    async with asgi(world) as client:
        for key in (ACME, "sk-acme-2", ALL, "user-key"):
            assert (await send(client, generations("tone")[0], key)).status_code == 200
        assert (await send(client, generations("acme-mix")[0], ACME)).status_code == 200
        await send(client, blends("secret")[2 * len(generations("base"))], ACME)
    assert world.adapters.lessees == ["acme", "acme", "all", "key:1", "acme", "acme"]


async def test_guides_are_made_in_the_name_of_their_tenant(worlds):
    world = await build(worlds, full=True)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}
    function = {"name": "f", "parameters": {}}
    tools = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    async with asgi(world) as client:
        ask = generations("base", response_format=form)[2]
        assert (await send(client, ask, ACME)).status_code == 200
        assert (await send(client, ask, "user-key")).status_code == 200
        assert (await send(client, generations("base", **tools)[2], ALL)).status_code == 200
    assert world.tokenizer.guided == ["acme", "key:1", "all"]


async def test_log_lines_name_the_tenant_and_no_key(worlds, caplog):
    caplog.set_level(logging.INFO)
    world = await build(worlds, full=True)
    async with asgi(world) as client:
        await send(client, generations("tone")[0], ACME)
        await send(client, generations("secret")[0], ACME)
        await send(client, generations("tone")[0], "wrong-key")
    fields = [record.fields for record in caplog.records if record.name == "fader.request"][1:]
    assert [line["tenant"] for line in fields] == ["acme", "acme", None]
    told = json.dumps(fields)
    for key in (ACME, "wrong-key", digest_of(ACME).hex()[:12]):
        assert key not in told


async def test_what_is_loaded_at_run_time_exists_for_whose_globs_match_it(worlds):
    world = await build(worlds, full=True)
    admin = bearer("admin-key")
    async with asgi(world) as client:
        for name, expected in (("acme-new", 200), ("new", 404)):
            assert (await send(client, generations(name)[0], ACME)).status_code == 404
            body = {"source": "/roots/new"}
            await client.put(f"/v1/adapters/{name}", json=body, headers=admin)
            answers = [await send(client, ask, ACME) for ask in generations(name)]
            assert {answer.status_code for answer in answers} == {expected}
        await world.until(lambda: world.adapters.leases == 0)


async def test_protected_metrics_tell_no_tenant_of_the_others(worlds):
    world = worlds(tenants=TENANTS, protect_metrics=True, **OTHERS)
    async with asgi(world) as client:
        for key, expected in ((ACME, 403), (ALL, 403), ("wrong", 401), ("user-key", 200)):
            answer = await client.get("/metrics", headers=bearer(key))
            assert answer.status_code == expected, key
            assert ("fader_adapters" in answer.text) == (expected == 200)
        assert (await client.get("/metrics", headers=bearer("admin-key"))).status_code == 200
