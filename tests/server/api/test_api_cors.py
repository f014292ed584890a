"""Pages of other origins: who may call, what they may read, and that keys stay needed."""

import pytest

from fader_server.api.cors import EXPOSED
from fader_server.config import load
from fader_server.errors import ConfigInvalid, Overloaded
from fader_server.tenants import Tenant, digest_of
from tests.server.api.api_fakes import World
from tests.server.api.conftest import asgi
from tests.server.api.test_api_bodies import check_envelope

PAGE = "https://app.example.com"
OTHER = "https://evil.example.com"
CHAT = "/v1/chat/completions"
BODY = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
ASKS = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


def about_pages(answer) -> dict[str, str]:
    return {k: v for k, v in answer.headers.items() if k.startswith("access-control-")}


@pytest.fixture
def keyed(worlds) -> World:
    return worlds(allow_origin=(PAGE,), api_key=("sk",), admin_key="sk-admin", max_body=4096)


async def test_a_browser_asks_without_a_key(keyed: World):
    async with asgi(keyed, origin=PAGE) as client:
        for path in (CHAT, "/v1/models", "/v1/adapters/tone", "/health"):
            answer = await client.options(path, headers=ASKS)
            assert answer.status_code == 200
            told = about_pages(answer)
            assert told["access-control-allow-origin"] == PAGE
            assert "authorization" in told["access-control-allow-headers"]
            methods = told["access-control-allow-methods"].split(", ")
            assert {"POST", "PUT", "PATCH", "DELETE"} <= set(methods)
            assert "access-control-allow-credentials" not in told
    assert keyed.engine.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": PAGE},
        {"access-control-request-method": "POST"},
        {"origin": OTHER, **ASKS},
        {"origin": "null", **ASKS},
        {"origin": PAGE + ".evil.com", **ASKS},
        {"origin": "http://app.example.com", **ASKS},
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/health", "/nope"])
async def test_any_other_options_is_answered_as_without_the_setting(worlds, keyed, path, headers):
    async with asgi(worlds(api_key=("sk",), admin_key="sk-admin")) as client:
        before = await client.options(path, headers=headers)
    async with asgi(keyed) as client:
        answer = await client.options(path, headers=headers)
        asked = await client.options(path, headers={"origin": PAGE, **ASKS})
    assert (answer.status_code, answer.content) == (before.status_code, before.content)
    assert answer.status_code == 401
    assert asked.status_code == 200, "the check cannot fail"
    if headers.get("origin") != PAGE:
        assert about_pages(answer) == {}


async def test_answers_and_refusals_can_be_read(keyed: World):
    async with asgi(keyed, origin=PAGE, authorization="Bearer sk") as client:
        answers = [
            (200, await client.post(CHAT, json=BODY)),
            (200, await client.post(CHAT, json=BODY | {"stream": True})),
            (400, await client.post(CHAT, json=BODY | {"n": "x"})),
            (401, await client.get("/v1/models", headers={"authorization": "Bearer no"})),
            (403, await client.delete("/v1/adapters/tone")),
            (404, await client.post(CHAT, json=BODY | {"model": "nobody"})),
            (405, await client.put(CHAT, json={})),
            (413, await client.post(CHAT, json=BODY | {"user": "x" * 5000})),
            (415, await client.post(CHAT, content="x")),
        ]
        keyed.engine.refuse = Overloaded("full")
        answers.append((503, await client.post(CHAT, json=BODY)))
        keyed.engine.refuse = RuntimeError("unforeseen")
        answers.append((500, await client.post(CHAT, json=BODY)))
        answers.append((400, await client.post(
            CHAT, content=b"{}", headers={"content-length": "2", "transfer-encoding": "chunked"}
        )))  # fmt: skip
    for status, answer in answers:
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "Origin" in answer.headers["vary"]
        shown = answer.headers["access-control-expose-headers"].split(", ")
        assert shown == list(EXPOSED)
        assert "x-request-id" in answer.headers
    first = answers[0][1]
    ours = {name for name in first.headers if name.startswith(("x-", "retry", "openai"))}
    assert ours <= set(EXPOSED), "a header that no page can read"


async def test_the_headers_of_quotas_can_be_read(worlds):
    acme = Tenant("acme", (digest_of("sk"),), requests_per_minute=1, tokens_per_minute=9999)
    world = worlds(allow_origin=(PAGE,), tenants=(acme,))
    async with asgi(world, origin=PAGE, authorization="Bearer sk") as client:
        answers = [await client.post(CHAT, json=BODY | {"max_tokens": 5}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    for answer in answers:
        ours = {name for name in answer.headers if name.startswith(("x-", "retry"))}
        assert len(ours) > 6
        assert ours <= set(EXPOSED)
        assert answer.headers["access-control-allow-origin"] == PAGE


async def test_other_origins_may_read_nothing(keyed: World):
    async with asgi(keyed, origin=OTHER, authorization="Bearer sk") as client:
        answer = await client.post(CHAT, json=BODY)
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


async def test_a_star_is_everybody_without_cookies(worlds):
    async with asgi(worlds(allow_origin=("*",), api_key=("sk",)), origin=OTHER) as client:
        asked = await client.options(CHAT, headers=ASKS)
        refused = await client.post(CHAT, json=BODY)
        key = {"authorization": "Bearer sk", "cookie": "a=b"}
        given = await client.post(CHAT, json=BODY, headers=key)
    assert (asked.status_code, refused.status_code, given.status_code) == (200, 401, 200)
    check_envelope(refused)
    for answer in (asked, refused, given):
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


async def test_pages_never_reach_admin_routes_that_need_no_key(worlds):
    world = worlds(allow_origin=("*",))
    async with asgi(world) as client:
        page = await client.delete("/v1/adapters/tone", headers={"origin": OTHER})
        shell = await client.delete("/v1/adapters/tone")
    assert (page.status_code, shell.status_code) == (403, 200)
    async with asgi(worlds(allow_origin=("*",), admin_key="sk-admin")) as client:
        key = {"origin": OTHER, "authorization": "Bearer sk-admin"}
        assert (await client.delete("/v1/adapters/tone", headers=key)).status_code == 200


async def test_without_the_setting_no_answer_speaks_of_pages(client):
    asked = await client.options(CHAT, headers={"origin": PAGE, **ASKS})
    given = await client.post(CHAT, json=BODY, headers={"origin": PAGE})
    assert (asked.status_code, given.status_code) == (405, 200)
    assert about_pages(asked) == about_pages(given) == {}
    assert "vary" not in given.headers


@pytest.mark.parametrize(
    "value", ["", "app.example.com", PAGE + "/", PAGE + "/x", "null", "a b://c"]
)
def test_what_is_no_origin_is_refused_at_start(value: str):
    with pytest.raises(ConfigInvalid, match="--allow-origin"):
        load({"allow_origin": [value]}, {})


def test_origins_are_compared_as_browsers_send_them():
    assert load({"allow_origin": ["HTTPS://App.Example.com"]}, {}).allow_origin == (PAGE,)
