"""Recipes over HTTP: written by compare-and-swap, used like a model, clear on what is missing."""

import asyncio
import json

import pytest
from openai.types import Model

from fader_adapters.spec import Blend, Term
from tests.server.api.api_fakes import World, digest
from tests.server.api.conftest import asgi

TONE, DOMAIN = digest("tone"), digest("domain")
WARM = [{"name": "tone", "weight": 0.7}, {"name": f"domain@{DOMAIN[:12]}", "weight": -0.2}]
RECIPE = {"object", "name", "digest", "base", "adapters", "missing", "created"}


async def put(client, name="warm", adapters=WARM, **others):
    return await client.put(f"/v1/recipes/{name}", json={"adapters": adapters, **others})


async def ask(client, model, **others):
    body = {"model": model, "prompt": "x", "max_tokens": 2, **others}
    return await client.post("/v1/completions", json=body)


async def test_a_recipe_is_written_read_and_deleted(client):
    first = await put(client)
    assert first.status_code == 201
    body = first.json()
    assert set(body) == RECIPE
    assert body["missing"] == []
    assert body["adapters"] == [
        {"name": "tone", "weight": 0.7, "version": TONE},
        {"name": f"domain@{DOMAIN}", "weight": -0.2, "version": DOMAIN},
    ]
    assert (await client.get("/v1/recipes/warm")).json() == body
    assert (await client.get("/v1/recipes")).json() == {"object": "list", "data": [body]}
    assert (await put(client)).status_code == 200
    gone = await client.delete("/v1/recipes/warm")
    assert gone.json() == {"object": "recipe", "name": "warm", "deleted": True}
    for answer in (await client.get("/v1/recipes/warm"), await client.delete("/v1/recipes/warm")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "recipe_not_found")


async def test_what_a_get_shows_can_be_put_back(client):
    shown = (await put(client)).json()
    adapters = [{"name": term["name"], "weight": term["weight"]} for term in shown["adapters"]]
    again = (await put(client, adapters=adapters, if_digest=shown["digest"])).json()
    assert again["digest"] == shown["digest"]
    backwards = (await put(client, adapters=adapters[::-1])).json()
    assert backwards["digest"] == shown["digest"]


@pytest.mark.parametrize(
    "adapters",
    [
        [{"name": "tone", "weight": 0.7000001}, WARM[1]],
        [{"name": f"tone@{TONE}", "weight": 0.7}, WARM[1]],
        [{"name": "tone", "weight": 0.7}],
        [{"name": "tone", "weight": -0.2}, {"name": f"domain@{DOMAIN}", "weight": 0.7}],
    ],
)
async def test_any_other_recipe_has_another_digest(client, adapters):
    first, second = await put(client), await put(client, adapters=adapters)
    assert second.status_code == 200
    assert first.json()["digest"] != second.json()["digest"]


async def test_compare_and_swap(client, world: World):
    first = (await put(client, if_digest="")).json()["digest"]
    for stale in ("", "0" * 12, digest("other")):
        answer = await put(client, adapters=[{"name": "tone"}], if_digest=stale)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert answer.json()["error"]["code"] == "recipe_conflict"
        refused = await client.delete("/v1/recipes/warm", params={"if_digest": stale or "1" * 12})
        assert refused.status_code == 409
    assert (await client.get("/v1/recipes/warm")).json()["digest"] == first
    changed = await put(client, adapters=[{"name": "tone"}], if_digest=first[:12])
    assert changed.status_code == 200
    deleted = await client.delete(
        "/v1/recipes/warm", params={"if_digest": changed.json()["digest"]}
    )
    assert deleted.status_code == 200
    assert (await put(client, if_digest=first)).status_code == 409


async def test_no_change_of_twenty_writers_is_lost(client):
    await put(client, adapters=[{"name": "tone", "weight": 0.0}])
    refused = 0

    async def add() -> None:
        nonlocal refused
        while True:
            shown = (await client.get("/v1/recipes/warm")).json()
            await asyncio.sleep(0)  # the others' turn
            weight = shown["adapters"][0]["weight"] + 0.25
            adapters = [{"name": "tone", "weight": weight}]
            answer = await put(client, adapters=adapters, if_digest=shown["digest"])
            if answer.status_code == 200:
                return
            refused += 1

    await asyncio.gather(*(add() for _ in range(20)))
    shown = (await client.get("/v1/recipes/warm")).json()
    assert shown["adapters"][0]["weight"] == 5.0
    assert refused > 0, "they never met"


async def test_a_load_that_began_before_the_recipe_does_not_take_its_name(client, world: World):
    """The name is looked at again when the adapter is there, not only when it is asked for."""
    gate, fetched = asyncio.Event(), world.adapters.load

    async def late(order):
        await gate.wait()
        return await fetched(order)

    world.adapters.load = late
    loading = asyncio.create_task(client.put("/v1/adapters/warm", json={"source": "one"}))
    await asyncio.sleep(0)
    assert (await put(client)).status_code == 201
    gate.set()
    assert (await loading).status_code == 409
    assert "warm" not in world.adapters.infos


@pytest.mark.parametrize(
    "body",
    [
        {}, {"adapters": []}, {"adapters": None}, {"adapters": "tone"}, {"adapters": [{}]},
        {"adapters": [{"name": "tone", "weight": 17}]}, {"adapters": [{"name": "tone"}] * 2},
        {"adapters": [{"name": "tone", "weight": True}]}, {"adapters": [{"name": "a"}] * 9},
        {"adapters": [{"name": "tone@12"}]}, {"adapters": [{"name": "tone", "gamma": 1}]},
        {"adapters": WARM, "if_digest": "12"}, {"adapters": WARM, "if_version": "0" * 12},
        {"adapters": WARM, "weights": [1]}, {"adapters": [{"name": "tone", "weight": None}]},
    ],
)  # fmt: skip
async def test_malformed_recipes_are_refused(client, world: World, body):
    answer = await client.put("/v1/recipes/warm", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"]
    assert world.recipes.list() == []


@pytest.mark.parametrize("name", ["a%0Ab", ".hidden", "%3Cb%3E", "x" * 129, "a@b", "a%2Fb", "a:b"])
async def test_bad_names_are_refused(client, world: World, name):
    assert (await put(client, name)).status_code in (400, 404)
    assert world.recipes.list() == []


async def test_a_recipe_names_what_is_loaded(client, world: World):
    for name in ("absent", f"tone@{'0' * 12}"):
        answer = await put(client, adapters=[{"name": name}])
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert world.adapters.leases == 0


async def test_the_number_of_recipes_is_bounded(worlds):
    world = worlds(max_recipes=2)
    async with asgi(world) as client:
        for name in ("a", "b"):
            assert (await put(client, name)).status_code == 201
        answer = await put(client, "c")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "recipe_limit")
        assert (await put(client, "b", adapters=[{"name": "tone"}])).status_code == 200


async def test_names_are_taken_once_in_both_directions(client, world: World):
    for name in ("tone", "base"):
        answer = await put(client, name)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
        assert answer.json()["error"]["code"] == "name_reserved"
    await put(client)
    answer = await client.put("/v1/adapters/warm", json={"source": "one"})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    assert answer.json()["error"]["code"] == "name_reserved"
    body = {"lora_name": "warm", "lora_path": "one"}
    answer = await client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "The lora adapter 'warm' conflicts with a served recipe."
    )
    assert "warm" not in world.adapters.infos
    await client.delete("/v1/recipes/warm")
    assert (await client.put("/v1/adapters/warm", json={"source": "one"})).status_code == 201


async def test_a_recipe_is_no_adapter_of_a_blend_or_a_recipe(client):
    await put(client)
    for answer in (
        await ask(client, "base", adapters=[{"name": "warm"}]),
        await put(client, "warmer", adapters=[{"name": "warm"}]),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "blend_invalid")
    beside = await ask(client, "warm", adapters=[{"name": "tone"}])
    assert beside.json()["error"]["code"] == "blend_invalid"


@pytest.mark.parametrize("model", ["warm", "base:warm"])
async def test_a_recipe_is_a_model(client, world: World, model):
    await put(client)
    answer = await ask(client, model)
    assert answer.status_code == 200
    assert answer.json()["model"] == model
    assert answer.headers["x-fader-blend"] == f"tone@{TONE[:12]}=0.7, domain@{DOMAIN[:12]}=-0.2"
    blend = Blend.of([Term(TONE, 0.7), Term(DOMAIN, -0.2)])
    assert world.engine.seen[0].blend == blend
    assert answer.json()["system_fingerprint"].endswith(blend.digest[:12])
    chat = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answer = await client.post("/v1/chat/completions", json=chat)
    assert answer.headers["x-fader-blend"].startswith("tone@")
    assert (await ask(client, f"warm@{TONE[:12]}")).status_code == 404
    assert (await client.post("/tokenize", json={"model": model, "prompt": "x"})).status_code == 200


async def test_zero_weights_are_checked_and_dropped(client, world: World):
    await put(client, adapters=[{"name": "tone", "weight": 0}, {"name": "domain", "weight": 0.5}])
    answer = await ask(client, "warm")
    assert answer.headers["x-fader-blend"] == f"domain@{DOMAIN[:12]}=0.5"
    await put(client, adapters=[{"name": "tone", "weight": 0}])
    assert (await ask(client, "warm")).headers["x-fader-blend"] == "base"
    await client.delete("/v1/adapters/tone")
    assert (await ask(client, "warm")).status_code == 409


async def test_models_list_recipes_with_lineage(client):
    await put(client)
    cards = (await client.get("/v1/models")).json()["data"]
    for card in cards:
        Model.model_validate(card)
    assert [card["id"] for card in cards] == ["base", "tone", "domain", "warm"]
    warm = cards[-1]
    assert (warm["parent"], warm["missing"]) == ("base", [])
    assert [term["version"] for term in warm["adapters"]] == [TONE, DOMAIN]
    assert warm["root"] == f"warm@{warm['digest'][:12]}"
    for id in ("warm", "base:warm"):
        one = (await client.get(f"/v1/models/{id}")).json()
        assert one == {**warm, "id": id}


async def test_a_name_is_followed_and_a_version_is_kept(client, world: World):
    await put(client)
    for name in ("tone", "domain"):
        await client.put(f"/v1/adapters/{name}", json={"source": f"new-{name}"})
    answer = await ask(client, "warm")
    new = digest("new-tone")
    assert answer.headers["x-fader-blend"] == f"tone@{new[:12]}=0.7, domain@{DOMAIN[:12]}=-0.2"
    shown = (await client.get("/v1/recipes/warm")).json()
    assert [term["version"] for term in shown["adapters"]] == [new, DOMAIN]
    old = (await client.get(f"/v1/adapters/domain@{DOMAIN[:12]}")).json()
    assert old["version"] == DOMAIN
    await client.delete("/v1/recipes/warm")
    assert (await client.get(f"/v1/adapters/domain@{DOMAIN[:12]}")).status_code == 404


async def test_an_unloaded_adapter_is_named_and_comes_back_with_its_version(client, world: World):
    await put(client)
    await put(client, "other", adapters=[{"name": "tone"}])
    gone = await client.delete("/v1/adapters/domain")
    assert gone.json()["recipes"] == ["warm"]
    answer = await ask(client, "warm")
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("recipe_incomplete", "model")
    assert f"domain@{DOMAIN}" in error["message"]
    shown = (await client.get("/v1/recipes/warm")).json()
    assert shown["missing"] == [f"domain@{DOMAIN}"]
    assert [term["version"] for term in shown["adapters"]] == [TONE, None]
    await client.put("/v1/adapters/domain", json={"source": "other"})
    assert (await ask(client, "warm")).status_code == 409
    await client.put("/v1/adapters/domain", json={"source": "domain"})
    assert (await ask(client, "warm")).status_code == 200


async def test_metrics_and_log_lines_carry_the_recipe_and_the_versions(client, world, caplog):
    caplog.set_level("INFO", "fader.request")
    shown = (await put(client)).json()
    caplog.clear()
    await ask(client, "warm")
    text = world.metrics.render().decode()
    assert 'fader_requests_total{adapter="warm",outcome="ok"} 1.0' in text
    assert "fader_recipes 1.0" in text
    (line,) = [record.fields for record in caplog.records]
    assert (line["adapter"], line["recipe"]) == ("warm", f"warm@{shown['digest'][:12]}")
    assert line["versions"] == [f"tone@{TONE[:12]}", f"domain@{DOMAIN[:12]}"]
    assert line["weights"] == ["0.7", "-0.2"]


async def test_weights_in_the_header_and_the_log_are_exact(client, caplog):
    caplog.set_level("INFO", "fader.request")
    told = []
    for weight in (0.5, 0.5000001):
        answer = await ask(client, "base", adapters=[{"name": "tone", "weight": weight}])
        told.append((answer.headers["x-fader-blend"], answer.json()["system_fingerprint"]))
    assert told[0][0].endswith("=0.5")
    assert told[1][0].endswith("=0.5000001")
    assert told[0][1] != told[1][1]
    assert [record.fields["weights"] for record in caplog.records] == [["0.5"], ["0.5000001"]]


async def test_recipes_need_the_admin_key_and_models_do_not_tell_sources(worlds):
    world = worlds(api_key=("k",), admin_key="a")
    async with asgi(world, authorization="Bearer a") as client:
        assert (await put(client)).status_code == 201
    async with asgi(world, authorization="Bearer k") as client:
        for answer in (await client.get("/v1/recipes"), await put(client)):
            assert answer.status_code == 403
        assert (await ask(client, "warm")).status_code == 200
        assert "/roots" not in json.dumps((await client.get("/v1/models")).json())
