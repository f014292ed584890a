"""Versions and exact weights are what everything is keyed by: names, paths and slots never are."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest

from fader_adapters.source import CONFIG_FILE
from fader_server import demo, pacing
from fader_server.engine import blocks
from tests.server.served_world import QUESTION, Served, served

BASE = demo.SERVED_NAME


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders one level deeper than a start looks."""
    root = tmp_path / "root"
    for name in ("shout", "german", "json"):
        shutil.copytree(demo.adapter_dirs()[name], root / "team" / name)
        path = root / "team" / name / CONFIG_FILE
        settings = json.loads(path.read_text())
        settings["lora_alpha"] += 1  # versions of their own
        path.write_text(json.dumps(settings))
    return root


def cut(version: str) -> str:
    return version[:12]


async def versions_of(server: Served, *names: str) -> list[str]:
    """Load each folder under its own name."""
    found = []
    for name in names:
        answer = await server.put(name + "-alone", f"team/{name}")
        found.append(answer.json()["version"])
    return found


async def test_a_name_that_goes_from_a_to_b_and_back_never_answers_from_the_others_cache(root):
    async with served(root) as server:
        await versions_of(server, "shout", "german")
        alone = {name: await server.said(f"{name}-alone") for name in ("shout", "german")}
        assert alone["shout"].scored != alone["german"].scored
        for source in ("shout", "german", "shout", "german"):
            await server.put("moving", f"team/{source}")
            for _ in range(2):
                said = await server.said("moving")
                assert said.scored == alone[source].scored
                assert said.fingerprint == alone[source].fingerprint
        assert said.cached > 0, "the cache was there to be mistaken"


async def test_a_cache_keyed_by_name_would_be_noticed(root, monkeypatch):
    """The control: one hash chain for all blends answers B from the keys and values of A."""
    seed = blocks.chain_seed
    monkeypatch.setattr(blocks, "chain_seed", lambda blend, salt, size: seed("00" * 32, salt, size))
    async with served(root) as server:
        await versions_of(server, "german")
        alone = await server.said("german-alone", cache_salt="alone")
        for source in ("shout", "german"):
            await server.put("moving", f"team/{source}")
            said = await server.said("moving")
        assert said.scored != alone.scored


async def test_weights_that_differ_in_their_last_bits_share_nothing(root):
    async with served(root) as server:
        await versions_of(server, "shout")
        half = {"adapters": [{"name": "shout-alone", "weight": 0.5}]}
        more = {"adapters": [{"name": "shout-alone", "weight": 0.5000001}]}
        first, again = await server.said(BASE, **half), await server.said(BASE, **half)
        other, fresh = (
            await server.said(BASE, **more),
            await server.said(BASE, **more, cache_salt="fresh"),
        )
        assert (first.cached, other.cached) == (0, 0)
        assert again.cached > 0, "the control: the same weight does share"
        assert other.scored == fresh.scored
        assert len({first.fingerprint, other.fingerprint}) == 2
        assert (first.blend[-4:], other.blend[-10:]) == ("=0.5", "=0.5000001")


async def test_one_content_under_two_names_is_one_identity(root):
    async with served(root) as server:
        for name in ("one", "two"):
            assert (await server.put(name, "team/shout")).status_code == 201
        one, two = await server.said("one"), await server.said("two")
        assert one.fingerprint == two.fingerprint
        assert two.cached > 0
        assert one.scored == two.scored


@pytest.fixture(autouse=True)
def no_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads do not give way to streams, which are short here."""
    monkeypatch.setattr(pacing, "REST", 0.0)


class Stream:
    """A running call, held before its first step until it is let go."""

    def __init__(self, server: Served, model: str, **body: object) -> None:
        self._server = server
        self._task = asyncio.create_task(
            server.said(model, max_tokens=120, cache_salt="stream", **body)
        )

    async def leased(self) -> "Stream":
        await self._server.until(lambda: self._server.world.adapters.totals().leases > 0)
        return self

    @property
    def running(self) -> bool:
        return not self._task.done()

    async def said(self):
        return await self._task


async def test_a_running_request_keeps_its_version_and_others_may_ask_for_it(root):
    async with served(root) as server:
        old = (await server.put("moving", "team/shout")).json()["version"]
        quiet = await server.said("moving", max_tokens=120, cache_salt="quiet")
        stream = await Stream(server, "moving").leased()
        new = (await server.put("moving", "team/german")).json()["version"]
        assert stream.running, "the stream was over before the swap"
        report = (await server.http.get(f"/v1/adapters/moving@{cut(old)}")).json()
        assert (report["version"], report["retired"]) == (old, [old])
        current = (await server.http.get("/v1/adapters/moving")).json()
        assert (current["version"], current["retired"]) == (new, [old])
        card = (await server.http.get(f"/v1/models/moving@{cut(old)}")).json()
        assert card["version"] == old
        beside = await server.said(f"moving@{old}")
        assert beside.blend == f"moving@{cut(old)}=1"
        assert (await server.said("moving")).blend == f"moving@{cut(new)}=1"
        assert (await stream.said()).scored == quiet.scored
        for path in ("adapters", "models"):
            gone = await server.http.get(f"/v1/{path}/moving@{cut(old)}")
            assert gone.status_code == 404
        assert (await server.ask(f"moving@{old}")).status_code == 404


async def test_a_recipes_request_is_pinned_to_the_versions_it_began_with(root):
    async with served(root) as server:
        for name in ("shout", "german"):
            await server.put(name + "-x", f"team/{name}")
        recipe = await server.recipe("warm", **{"shout-x": 0.5, "german-x": 0.25})
        quiet = await server.said("warm", max_tokens=120, cache_salt="quiet")
        stream = await Stream(server, "warm").leased()
        await server.put("shout-x", "team/json")
        await server.recipe("warm", **{"german-x": 1.0})
        await server.http.delete("/v1/adapters/german-x")
        await server.http.delete("/v1/recipes/warm")
        assert stream.running, "the stream was over before the changes"
        disturbed = await stream.said()
        assert disturbed == quiet
        told = ", ".join(
            f"{term['name']}@{cut(term['version'])}={term['weight']:g}"
            for term in recipe["adapters"]
        )
        assert quiet.blend == told
        assert (await server.ask("warm")).status_code == 404


async def test_a_recipe_is_the_blend_it_names(root):
    async with served(root) as server:
        await versions_of(server, "shout", "german")
        await server.recipe("warm", **{"shout-alone": 0.75, "german-alone": -0.5})
        terms = [{"name": "german-alone", "weight": -0.5}, {"name": "shout-alone", "weight": 0.75}]
        named, spelled = await server.said("warm"), await server.said(BASE, adapters=terms)
        assert named.scored == spelled.scored
        assert named.fingerprint == spelled.fingerprint
        assert spelled.cached > 0
        assert (await server.said(BASE)).scored != named.scored


async def test_compare_and_swap_loses_against_a_version_that_moved(root):
    async with served(root) as server:
        old = (await server.put("moving", "team/shout")).json()["version"]
        new = (await server.put("moving", "team/german", if_version=old)).json()["version"]
        stale = await server.put("moving", "team/json", if_version=old)
        assert (stale.status_code, stale.headers["x-should-retry"]) == (409, "false")
        both = await asyncio.gather(
            *(server.put("moving", f"team/{name}", if_version=new) for name in ("json", "shout"))
        )
        assert sorted(answer.status_code for answer in both) == [200, 409]


async def test_a_failed_swap_leaves_the_old_version_serving(root):
    async with served(root) as server:
        await server.put("moving", "team/shout")
        before = await server.said("moving")
        weights = root / "team" / "german" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        assert (await server.put("moving", "team/german")).status_code == 400
        after = await server.said("moving")
        assert (after.scored, after.fingerprint) == (before.scored, before.fingerprint)


async def test_a_version_in_a_recipe_outlives_swaps_and_restarts(root, tmp_path, caplog):
    state = tmp_path / "state"
    async with served(root, state) as server:
        old = (await server.put("moving", "team/shout")).json()["version"]
        await server.recipe("fixed", **{f"moving__{cut(old)}": 1.0})
        await server.recipe("follows", moving=1.0)
        first = await server.said("fixed")
        new = (await server.put("moving", "team/german")).json()["version"]
        assert (await server.said("fixed")).scored == first.scored
        followed = await server.said("follows")
        assert followed.blend == f"moving@{cut(new)}=1"
    async with served(root, state) as server:
        fixed, follows = await server.said("fixed"), await server.said("follows")
        assert (fixed.scored, fixed.fingerprint) == (first.scored, first.fingerprint)
        assert (follows.scored, follows.fingerprint) == (followed.scored, followed.fingerprint)
        assert (await server.http.get("/v1/adapters/moving")).json()["retired"] == [old]
        await server.http.delete("/v1/recipes/fixed")
        assert (await server.http.get("/v1/adapters/moving")).json()["retired"] == []
        await server.recipe("fixed", moving=1.0)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_a_version_that_cannot_be_had_again_is_reported_and_shown(root, tmp_path, caplog):
    state = tmp_path / "state"
    async with served(root, state) as server:
        old = (await server.put("moving", "team/shout")).json()["version"]
        await server.recipe("fixed", **{f"moving__{old}": 1.0})
        await server.put("moving", "team/german")
    shutil.rmtree(root / "team" / "shout")
    async with served(root, state) as server:
        (told,) = [r.fields for r in caplog.records if r.message == "recipe not complete"]
        assert (told["recipe"], told["adapter"]) == ("fixed", f"moving@{old}")
        shown = (await server.http.get("/v1/recipes/fixed")).json()
        assert shown["missing"] == [f"moving@{old}"]
        answer = await server.ask("fixed")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "recipe_incomplete")


async def test_deleting_an_adapter_frees_the_versions_that_recipes_name(root):
    async with served(root) as server:
        empty = server.world.adapters.totals().host_bytes
        old = (await server.put("moving", "team/shout")).json()["version"]
        await server.recipe("fixed", **{f"moving__{old}": 1.0})
        one = server.world.adapters.totals().host_bytes
        await server.put("moving", "team/german")
        assert server.world.adapters.totals().host_bytes > one, "both are there"
        await server.http.delete("/v1/adapters/moving")
        await server.until(lambda: server.world.adapters.totals().host_bytes == empty)
        assert (await server.ask("fixed")).status_code == 409


async def test_no_folder_and_no_request_takes_the_name_of_a_recipe(root):
    shutil.copytree(root / "team" / "shout", root / "warm")
    shutil.copytree(root / "team" / "shout", root / BASE)
    (root / "warm").rename(root / ".warm")
    async with served(root, resolve_adapters="true") as server:
        assert BASE not in {info.name for info in server.world.adapters.list()}
        await server.recipe("warm", german=1.0)
        (root / ".warm").rename(root / "warm")
        for name in ("warm", BASE):
            answer = await server.ask(BASE, adapters=[{"name": name}])
            assert answer.status_code in (400, 404), answer.text
        assert (await server.put("warm", "warm")).status_code == 409
        names = {info.name for info in server.world.adapters.list()}
        assert not names & {"warm", BASE}
        assert (await server.put("cold", "warm")).status_code == 201


async def test_adapters_of_a_recipe_load_on_demand_and_are_not_evicted_when_it_names_versions(
    root,
):
    most = str(len(demo.adapter_dirs()) + 2)
    async with served(root, resolve_adapters="true", max_adapters=most) as server:
        await server.recipe("warm", **{"team/shout": 1.0})
        version = (await server.http.get("/v1/adapters/team/shout")).json()["version"]
        await server.recipe("fixed", **{f"team/shout__{version}": 1.0})
        for name in ("german", "json", "german", "json"):
            assert (await server.ask(f"team/{name}")).status_code == 200
        assert (await server.said("fixed")).blend == f"team/shout@{cut(version)}=1"
        assert server.world.adapters.totals().host_evictions == 3
        await server.http.delete("/v1/recipes/fixed")
        for name in ("german", "json"):
            await server.ask(f"team/{name}")
        assert (await server.http.get("/v1/adapters/team/shout")).status_code == 404
        assert (await server.http.get("/v1/recipes/warm")).json()["missing"] == ["team/shout"]
        assert (await server.said("warm")).blend == f"team/shout@{cut(version)}=1"


async def test_a_folder_found_at_the_start_does_not_take_a_recipes_name(root, tmp_path, caplog):
    state = tmp_path / "state"
    async with served(root, state) as server:
        await server.recipe("warm", german=1.0)
    shutil.copytree(root / "team" / "shout", root / "warm")
    async with served(root, state) as server:
        assert (await server.said("warm")).blend.startswith("german@")
        told = [r.fields["adapter"] for r in caplog.records if r.message == "adapter skipped"]
        assert told == ["warm"]


async def test_recipes_over_adapters_that_have_no_room_at_the_same_time(root, tmp_path):
    flags = {"max_adapters": str(len(demo.adapter_dirs()) + 1)}
    async with served(root, tmp_path / "state", **flags) as server:

        async def tier(name: str) -> str:
            return (await server.http.get(f"/v1/adapters/{name}")).json()["tier"]

        versions = {}
        for name in ("shout", "german", "json"):
            versions[name] = (await server.put(f"{name}-x", f"team/{name}")).json()["version"]
        assert await tier("shout-x") == "disk"
        taken = await server.http.put("/v1/recipes/shout-x", json={"adapters": [{"name": "json"}]})
        assert taken.json()["error"]["code"] == "name_reserved"
        follows = await server.recipe("follows", **{"shout-x": 1.0})
        assert (follows["missing"], follows["adapters"][0]["version"]) == ([], versions["shout"])
        assert (await server.put("german-x", "team/german")).status_code == 200
        assert await tier("shout-x") == "disk", "a name alone keeps nothing in memory"
        assert (await server.said("follows")).blend == f"shout-x@{cut(versions['shout'])}=1"
        await server.recipe("fixed", **{f"shout-x__{versions['shout']}": 1.0})
        refused = await server.ask("json-x")
        assert refused.status_code == 507, "what a recipe keeps does not leave for another"
        fixed = await server.said("fixed")
    async with served(root, tmp_path / "state", **flags) as server:
        assert (await server.said("fixed")).scored == fixed.scored
        assert (await server.http.get("/v1/recipes/follows")).json()["missing"] == []


def test_the_question_fills_blocks_to_share():
    assert len(QUESTION) > 64


async def test_no_tenant_reads_what_another_has_computed(root):
    """Not even one whose bits would be the same: how fast an answer comes would tell of prompts."""
    file = root.parent / "tenants.toml"
    file.write_text('[a]\nkeys = ["key-a", "key-a2"]\n[b]\nkeys = ["key-b"]\n')
    async with served(root, tenants=str(file), api_key=["key-c"]) as server:
        cached = {}
        for key in ("key-a", "key-b", "key-c", "key-a2", "key-b", "key-c"):
            server.http.headers["authorization"] = f"Bearer {key}"
            for model in (BASE, "shout"):
                said = await server.said(model)
                cached.setdefault((key, model), []).append(said.cached > 0)
    for model in (BASE, "shout"):
        assert cached["key-a", model] == [False]
        assert cached["key-a2", model] == [True], "another key of the same tenant"
        assert cached["key-b", model] == cached["key-c", model] == [False, True]
