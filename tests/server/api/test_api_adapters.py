import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import quote

import pytest
from openai.types import Model

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_server.api.edge import JsonFormatter
from fader_server.core import Admission, Request, TokenEvent
from fader_server.engine.stats import TenantStats
from tests.server.api.api_fakes import FakeAdapters, World, build_world, digest
from tests.server.api.conftest import asgi, listening

REPORT = {
    "object", "name", "version", "base", "rank", "scales", "modules", "targets", "bytes",
    "delta_norm", "relative_norm", "tier", "leases", "pinned", "retired", "created", "source",
    "revision", "total_modules", "ranks", "dtype", "source_dtypes", "kinds", "sites", "base_match",
    "largest_relative_norm", "unmatched_targets", "copies_of_base", "invocation_tokens",
    "invocation_text",
}  # fmt: skip


async def test_models_lists_the_base_first_and_no_paths(client):
    body = (await client.get("/v1/models")).json()
    for card in body["data"]:
        Model.model_validate(card)
    base, *others = body["data"]
    assert (base["id"], base["parent"]) == ("base", None)
    assert [card["id"] for card in others] == ["tone", "domain"]
    assert {card["parent"] for card in others} == {"base"}
    assert "/roots" not in json.dumps(body)


@pytest.mark.parametrize("id", ["base", "tone", "base:tone", f"tone@{digest('tone')[:12]}"])
async def test_one_model_by_any_spelling(client, id):
    answer = await client.get(f"/v1/models/{id}")
    assert answer.json()["id"] == id


async def test_unknown_model_is_404(client):
    for id in ("nope", "a/b/c", "..%2f..%2fetc"):
        answer = await client.get(f"/v1/models/{id}")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_put_creates_then_swaps_by_version(client, world: World):
    first = await client.put("/v1/adapters/new", json={"source": "one", "pin": True})
    assert first.status_code == 201
    assert set(first.json()) == REPORT
    assert first.json()["pinned"] is True
    told = first.json()
    assert (told["modules"], told["total_modules"], told["relative_norm"]) == (4, 4, 0.1)
    site = {"modules": 1, "ranks": [8], "delta_norm": 3.0, "relative_norm": 0.1}
    assert told["sites"] == {"q_proj": site}
    assert told["base_match"]["verdict"] == "named"
    version = first.json()["version"]
    taken = await client.put("/v1/adapters/new", json={"source": "two", "if_version": ""})
    assert taken.status_code == 409
    assert taken.json()["error"]["code"] == "adapter_version_conflict"
    assert taken.headers["x-should-retry"] == "false"
    swapped = await client.put("/v1/adapters/new", json={"source": "two", "if_version": version})
    assert swapped.status_code == 200
    assert swapped.json()["pinned"] is True, "what a swap does not say stays"
    unpinned = {"source": "two", "pin": False}
    assert (await client.put("/v1/adapters/new", json=unpinned)).json()["pinned"] is False
    assert swapped.json()["version"] == digest("two")


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("missing", 404, "adapter_forbidden_source"),
        ("secret", 404, "adapter_forbidden_source"),
        ("broken", 400, "adapter_invalid"),
        ("away", 503, "adapter_load_failed"),
    ],
)
async def test_refused_loads_change_nothing(client, world: World, source, status, code):
    before = dict(world.adapters.infos)
    answer = await client.put("/v1/adapters/tone", json={"source": source})
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert world.adapters.infos == before


@pytest.mark.parametrize(
    "body",
    [
        {}, {"source": ""}, {"source": 1}, {"source": "x", "sha256": "abc"},
        {"source": "x", "pin": "yes"}, {"source": "x", "if_version": "12"},
        {"source": "x", "ifversion": "a" * 12}, {"source": "x", "trust": True},
    ],
)  # fmt: skip
async def test_bad_loads_are_refused(client, body):
    answer = await client.put("/v1/adapters/new", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"]


async def test_no_adapter_takes_the_name_of_the_base(client, world: World):
    answer = await client.put("/v1/adapters/base", json={"source": "x"})
    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "adapter_exists"
    assert "base" not in world.adapters.infos


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tone", "/v1/adapters"]
)
async def test_what_answers_get_answers_head(client, path):
    whole, answer = await client.get(path), await client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == whole.headers["content-type"]
    assert (await client.head("/v1/models/nobody")).status_code == 404


@pytest.mark.parametrize("error", [AdapterInvalid, AdapterMismatch, AdapterTooLarge])
@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_is_not_blamed_for_what_lies_at_its_adapters_source(
    client, world: World, monkeypatch, route, error
):
    async def lease(terms: object, *, tenant: str) -> None:
        raise error("lora_A is missing")

    body = (
        {"prompt": "a"}
        if route == "/v1/completions"
        else {"messages": [{"role": "user", "content": "a"}]}
    )
    assert (await client.post(route, json={"model": "tone", **body})).status_code == 200
    monkeypatch.setattr(world.adapters, "lease", lease)
    answer = await client.post(route, json={"model": "tone", **body})
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    told = answer.json()["error"]
    assert told["code"] == "adapter_load_failed"
    assert "lora_A is missing" in told["message"]
    put = await client.put("/v1/adapters/new", json={"source": "broken"})
    assert put.status_code == 400, "who loads by hand is told that the source is wrong"


@pytest.mark.parametrize("name", ["a%0Ab", "..", ".hidden", "%3Cb%3E", "x" * 129, "a@b", "a%00"])
async def test_bad_names_never_load(client, world: World, name):
    before = dict(world.adapters.infos)
    answer = await client.put(f"/v1/adapters/{name}", json={"source": "x"})
    assert answer.status_code in (400, 404, 405)
    assert world.adapters.infos == before


async def test_patch_pins_and_delete_forgets(client, world: World):
    assert (await client.patch("/v1/adapters/tone", json={"pin": True})).json()["pinned"]
    assert (await client.patch("/v1/adapters/tone", json={})).status_code == 400
    assert (await client.patch("/v1/adapters/nope", json={"pin": True})).status_code == 404
    assert (await client.delete("/v1/adapters/tone")).json()["deleted"] is True
    gone = await client.delete("/v1/adapters/tone")
    assert gone.status_code == 404
    assert gone.json()["error"]["code"] == "adapter_not_found"
    assert (await client.get("/v1/adapters/tone")).status_code == 404
    assert set(world.adapters.infos) == {"domain"}


async def test_users_see_reports_without_sources(worlds):
    world = worlds(api_key=("k",), admin_key="a")
    async with asgi(world, authorization="Bearer k") as client:
        listed = (await client.get("/v1/adapters")).json()["data"]
        assert set(listed[0]) == REPORT - {"source", "revision"}
        assert set((await client.get("/v1/adapters/tone")).json()) == REPORT - {
            "source",
            "revision",
        }
    async with asgi(world, authorization="Bearer a") as client:
        assert set((await client.get("/v1/adapters/tone")).json()) == REPORT


async def test_vllm_load_and_unload_answer_word_for_word(client, world: World):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    answer = await client.post(load, json={"lora_name": "x", "lora_path": "p"})
    assert answer.text == "Success: LoRA adapter 'x' added successfully."
    again = await client.post(load, json={"lora_name": "x", "lora_path": "q"})
    assert again.status_code == 400
    assert again.json()["error"]["message"] == (
        "The lora adapter 'x' has already been loaded. If you want to load the adapter in place, "
        "set 'load_inplace' to True."
    )
    body = {"lora_name": "x", "lora_path": "q", "load_inplace": True}
    assert (await client.post(load, json=body)).status_code == 200
    assert world.adapters.infos["x"].version == digest("q")
    gone = await client.post(unload, json={"lora_name": "x"})
    assert gone.text == "Success: LoRA adapter 'x' removed successfully."
    absent = await client.post(unload, json={"lora_name": "x"})
    assert absent.status_code == 404
    assert absent.json()["error"]["message"] == "The lora adapter 'x' cannot be found."


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"lora_name": "x"}, 400, "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "", "lora_path": "p"}, 400, "Both 'lora_name'"),
        ({"lora_name": "base", "lora_path": "p"}, 400, "conflicts with a served base model."),
        ({"lora_name": "x", "lora_path": "missing"}, 404, "No adapter found"),
        ({"lora_name": "x", "lora_path": "secret"}, 404, "No adapter found"),
        ({"lora_name": "x", "lora_path": "broken"}, 400, "lora_A is missing"),
        ({"lora_name": "../x", "lora_path": "p"}, 400, "'lora_name'"),
    ],
)
async def test_vllm_load_refusals(client, body, status, text):
    answer = await client.post("/v1/load_lora_adapter", json=body)
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] in ("InvalidUserInput", "NotFoundError")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("load_in_place", True), ("lora_nmae", "y"), ("adapter", "x"), ("lora_scale", 0.5),
        ("gamma", 1), ("load_inplace", "yes"), ("is_3d_lora_weight", True),
    ],
)  # fmt: skip
async def test_vllm_bodies_with_what_looks_like_ours_are_refused(client, world, field, value):
    before = dict(world.adapters.infos)
    body = {"lora_name": "tone", "lora_path": "p", "load_inplace": True, field: value}
    answers = [await client.post("/v1/load_lora_adapter", json=body)]
    if field not in ("load_inplace", "load_in_place", "is_3d_lora_weight"):
        gone = {"lora_name": "tone", field: value}
        answers.append(await client.post("/v1/unload_lora_adapter", json=gone))
    for answer in answers:
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "InvalidUserInput"
        assert field in answer.json()["error"]["message"]
    assert world.adapters.infos == before


async def test_vllm_bodies_may_have_what_vllm_knows_and_strangers(client):
    body = {"lora_name": "x", "lora_path": "p", "load_inplace": None, "is_3d_lora_weight": False}
    body["note"] = "from a controller"
    assert (await client.post("/v1/load_lora_adapter", json=body)).status_code == 200
    gone = {"lora_name": "x", "lora_int_id": 3}
    assert (await client.post("/v1/unload_lora_adapter", json=gone)).status_code == 200


async def test_tokenize_and_back(client):
    answer = await client.post(
        "/tokenize", json={"model": "tone", "prompt": "hé", "return_token_strs": True}
    )
    assert answer.json() == {
        "count": 3, "max_model_len": 4096, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]
    }  # fmt: skip
    assert (await client.post("/detokenize", json={"tokens": [104, 195, 169, 256]})).json() == {
        "prompt": "hé<eos>"
    }
    assert (await client.get("/tokenizer_info")).json()["eos_token"] == "<eos>"
    chat = await client.post("/tokenize", json={"messages": [{"role": "user", "content": "x"}]})
    assert chat.json()["count"] == 7
    for path, body in (
        ("/tokenize", {"model": "nope", "prompt": "x"}),
        ("/detokenize", {"model": "nope", "tokens": [1]}),
    ):
        assert (await client.post(path, json=body)).status_code == 404
    for bad in ({"tokens": [True]}, {"tokens": [257]}, {"tokens": "x"}, {}):
        assert (await client.post("/detokenize", json=bad)).status_code == 400


CHAT = {"messages": [{"role": "user", "content": "x"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
GOES_ON = {
    "messages": [{"role": "assistant", "content": "Once"}],
    "continue_final_message": True,
}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": ""}, ""),
        ({"prompt": "x", "max_tokens": 3, "stream": True, "unheard_of": 1}, "x"),
        (CHAT, "user:x\n"),
        (CHAT | {"add_generation_prompt": False}, "user:x\nsilent\n"),
        (CHAT | {"add_special_tokens": True, "max_tokens": 3}, "special\nuser:x\n"),
        (CHAT | {"reasoning_effort": "low"}, "effort:low\nuser:x\n"),
        (CHAT | {"continue_final_message": False, "chat_template_kwargs": {}}, "user:x\n"),
        (GOES_ON, "assistant:Once"),
    ],
)
async def test_tokenize_does_as_its_fields_say(client, body, text):
    answer = await client.post("/tokenize", json=body)
    assert bytes(answer.json()["tokens"]).decode() == text


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": None}, "prompt"),
        ("/tokenize", {"prompt": None, "messages": None}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_specal_tokens": False}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "return_token_str": True}, "return_token_strs"),
        ("/tokenize", CHAT | {"add_generation_promt": False}, "add_generation_prompt"),
        ("/tokenize", CHAT | {"add_generation_prompt": "no"}, "add_generation_prompt"),
        ("/tokenize", CHAT | {"continue_final_message": True}, "continue_final_message"),
        ("/tokenize", GOES_ON | {"add_generation_prompt": True}, "continue_final_message"),
        ("/tokenize", GOES_ON | {"tools": TOOLS}, "continue_final_message"),
        ("/tokenize", CHAT | {"chat_template": "{{ 1 }}"}, "chat_template"),
        ("/tokenize", CHAT | {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/detokenize", {"tokens": [97], "modell": "tone"}, "model"),
    ],
)
async def test_what_tokenize_cannot_do_is_refused(client, path, body, named):
    answer = await client.post(path, json=body)
    assert answer.status_code == 400
    assert named in answer.json()["error"]["message"]


async def test_unknown_routes_and_methods_have_the_envelope(client):
    for method, path, status in (
        ("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("TRACE", "/v1/models", 405),
        ("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/v1/models//", 404),
    ):  # fmt: skip
        answer = await client.request(method, path)
        assert answer.status_code == status, path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_health_tells_a_stuck_engine_from_a_busy_one(client, world: World):
    from tests.server.api.api_fakes import FakeStats

    assert (await client.get("/health")).status_code == 200
    world.engine.told = FakeStats(stuck_reason="no step was completed for 200 s")
    for path in ("/health", "/ready"):
        answer = await client.get(path)
        assert answer.status_code == 503
        assert "no step" in answer.json()["error"]["message"]
    world.engine.told = FakeStats(healthy=False, reason="the engine ended")
    assert (await client.get("/health")).status_code == 503
    world.engine.told = FakeStats()
    world.app.state.context.readiness.reason = "draining"
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503


async def test_metrics_of_calls_and_the_gateway_contract(client, world: World):
    world.engine.gate.clear()
    import asyncio

    body = {"model": "tone", "prompt": "x", "max_tokens": 3}
    call = asyncio.create_task(client.post("/v1/completions", json=body))
    await world.until(lambda: world.engine.open == 1)
    waiting = world.metrics.render().decode()
    assert 'running_lora_adapters="",waiting_lora_adapters="tone"' in waiting
    assert 'max_lora="4"' in waiting
    world.engine.gate.set()
    await call
    text = (await client.get("/metrics")).text
    for line in (
        'running_lora_adapters="",waiting_lora_adapters=""',
        'fader_requests_total{adapter="tone",outcome="ok"} 1.0',
        'fader_tokens_total{direction="completion"} 3.0',
        'fader_adapter_tokens_total{adapter="tone",direction="prompt"} 1.0',
        "vllm:num_requests_waiting 0.0",
        "vllm:kv_cache_usage_perc 0.25",
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0',
        "fader_adapter_leases 0.0",
        'fader_adapter_evictions_total{tier="device"} 3.0',
        'fader_http_responses_total{route="/v1/completions",status="200"} 1.0',
        "fader_time_to_first_token_seconds_count 1.0",
        "fader_inter_token_seconds_count 2.0",
    ):
        assert line in text, line


async def test_adapters_that_are_named_like_a_label_have_series_of_their_own(worlds):
    names = ("base", "blend", "other", "tone")
    world = worlds(adapters=FakeAdapters(names[1:]))
    world.app.state.context.generator._base_name = "llama"
    world.adapters.infos["base"] = world.adapters.infos["tone"]
    named = {"adapters": [{"name": "other"}, {"name": "tone"}]}
    async with asgi(world) as client:
        for body in (*({"model": name} for name in names), {"model": "llama"}):
            sent = body | {"prompt": "x", "max_tokens": 1}
            assert (await client.post("/v1/completions", json=sent)).status_code == 200
        sent = named | {"model": "llama", "prompt": "x", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=sent)).status_code == 200
    text = world.metrics.render().decode()
    labels = re.findall(r'fader_requests_total\{adapter="(.*)",outcome="ok"\} 1.0', text)
    told = ["adapter:base", "adapter:blend", "adapter:other", "base", "blend", "tone"]
    assert sorted(labels) == told


async def test_metrics_of_tenants_and_of_nobody_without_a_key(client, world: World):
    told = {"acme": TenantStats(2, 3, 40), "": TenantStats(1, 1, 9)}
    world.engine.told = replace(world.engine.told, tenants=told)
    text = (await client.get("/metrics")).text
    for line in (
        'fader_tenant_requests_running{tenant="acme"} 2.0',
        'fader_tenant_requests_waiting{tenant="acme"} 3.0',
        'fader_tenant_tokens_total{tenant="acme"} 40.0',
    ):
        assert line in text, line
    assert 'tenant=""' not in text


async def test_time_in_the_queue_is_measured_and_logged(worlds, caplog):
    def script(request: Request) -> Iterator[TokenEvent]:
        yield TokenEvent(request.id, 97, admitted=Admission(0.25, "delta"))
        yield TokenEvent(request.id, 97, finish="length")

    world = worlds(script=script)
    with caplog.at_level("INFO", "fader.request"):
        async with asgi(world) as client:
            await client.post("/v1/completions", json={"model": "base", "prompt": "x", "n": 2})
    metrics = world.metrics.render().decode()
    assert "fader_queue_seconds_count 2.0" in metrics
    assert "fader_queue_seconds_sum 0.5" in metrics
    (line,) = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert line["queue_ms"] == 250.0


async def test_unknown_models_do_not_grow_the_metrics(client, world: World):
    await client.post("/v1/completions", json={"model": "n0", "prompt": "x"})
    await client.get("/nope")
    size = len(world.metrics.render().splitlines())
    for n in range(200):
        await client.post("/v1/completions", json={"model": f"n{n}", "prompt": "x"})
        await client.get(f"/nope/{n}")
    assert len(world.metrics.render().splitlines()) == size


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("a b", False), ("x" * 129, False), ("", False)]
)
async def test_request_ids_are_echoed_when_clean(client, given, kept):
    answer = await client.get("/v1/models", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) is kept


async def test_one_log_line_a_request_without_texts(client, world: World, caplog):
    caplog.set_level("INFO")
    await client.post(
        "/v1/completions",
        json={"model": "tone", "prompt": "SECRET", "max_tokens": 2},
        headers={"x-request-id": "me"},
    )
    (record,) = [record for record in caplog.records if record.name == "fader.request"]
    line = JsonFormatter().format(record)
    fields = json.loads(line)
    assert "\n" not in line
    assert "SECRET" not in line
    assert fields["request_id"] == "me"
    assert fields["status"] == 200
    assert fields["versions"] == [f"tone@{digest('tone')[:12]}"]
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (6, 2)
    assert fields["outcome"] == "ok"
    assert fields["first_ms"] is not None


def test_control_characters_cannot_break_a_log_line():
    import logging

    record = logging.LogRecord("x", 20, "", 0, "a\r\nb\x1b[31m", None, None)
    assert len(JsonFormatter().format(record).splitlines()) == 1


async def test_health_answers_beside_hundreds_of_idle_sockets():
    """Lives without the world fixture: its sockets outnumber what a test usually opens."""
    import asyncio
    import time

    async def health(port: int) -> float:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        finally:
            writer.close()
        return time.perf_counter() - began

    world = build_world()
    async with listening(world) as port:
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(400)]
        try:
            seconds = [await health(port) for _ in range(10)]
        finally:
            for _, other in kept:
                other.close()
        assert min(seconds) < 0.1, "the quickest of some: others use the machine, too"
    world.engine.stop()


async def test_a_source_that_is_away_may_be_tried_again_and_is_not_named(client):
    for method, path, body in (
        ("PUT", "/v1/adapters/x", {"source": "away"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "away"}),
    ):
        answer = await client.request(method, path, json=body)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
        assert "secret" not in answer.text
    broken = {"lora_name": "x", "lora_path": "broken"}
    answer = await client.post("/v1/load_lora_adapter", json=broken)
    assert (answer.status_code, answer.headers["x-should-retry"]) == (400, "false")


async def test_names_of_two_parts_reach_every_route(client, world: World):
    assert (await client.put("/v1/adapters/org/x", json={"source": "one"})).status_code == 201
    assert (await client.get("/v1/adapters/org%2Fx")).json()["name"] == "org/x"
    version = world.adapters.infos["org/x"].version
    assert (await client.get(f"/v1/adapters/org/x@{version[:12]}")).status_code == 200
    assert (await client.get("/v1/models/org/x")).json()["id"] == "org/x"
    patched = await client.patch("/v1/adapters/org/x", json={"pin": True})
    assert patched.json()["pinned"] is True
    assert (await client.delete("/v1/adapters/org/x")).status_code == 200
    for name in ("a/b/c", "a/..", "../a", "a//b", "a/", ".a/b", "a/.b"):
        answer = await client.put(f"/v1/adapters/{quote(name, safe='')}", json={"source": "one"})
        assert answer.status_code == 400, name


async def test_a_load_on_first_use_has_the_time_of_a_first_token(worlds):
    world = worlds(first_token_timeout=0.02)

    async def hang(terms: object, *, tenant: str) -> None:
        await asyncio.Event().wait()

    world.adapters.lease = hang
    async with asgi(world) as client:
        answer = await client.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "first_token_timeout"


@pytest.mark.parametrize(
    ("lanes", "told"),
    [(["merged"], "merged"), (["delta"], "delta"), (["merged", "delta"], "delta, merged")],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_which_lane_made_it(worlds, caplog, lanes, told, stream):
    begun = iter(lanes)

    def script(request: Request) -> Iterator[TokenEvent]:
        yield TokenEvent(request.id, 97, admitted=Admission(0.0, next(begun)))
        yield TokenEvent(request.id, 97, finish="length")

    world = worlds(script=script)
    body = {"model": "tone", "prompt": ["x"] * len(lanes), "stream": stream}
    with caplog.at_level("INFO", "fader.request"):
        async with asgi(world) as client:
            answer = await client.post("/v1/completions", json=body)
    (line,) = [record.fields for record in caplog.records if record.name == "fader.request"]
    assert line["lane"] == told
    if stream:  # its head is sent with the first token of any choice
        assert answer.headers["x-fader-lane"] in {told, *lanes}
    else:
        assert answer.headers["x-fader-lane"] == told
        assert set(answer.json()) == SCHEMA


SCHEMA = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}


async def test_a_stream_that_has_not_begun_names_no_lane(worlds):
    world = worlds(ping_interval=0.01)
    world.engine.gate.clear()
    async with asgi(world) as client:
        task = asyncio.create_task(
            client.post("/v1/completions", json={"model": "tone", "prompt": "x", "stream": True})
        )
        await asyncio.sleep(0.1)
        world.engine.gate.set()
        assert "x-fader-lane" not in (await task).headers
