import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from fader_server.errors import TenantBusy
from tests.server.api.api_fakes import EOS, TEXT, World, digest

PROMPT = "Hallo"


async def complete(client: httpx.AsyncClient, **body: object) -> dict:
    answer = await client.post(
        "/v1/completions", json={"model": "base", "prompt": PROMPT, "max_tokens": 99, **body}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_completion_has_the_whole_shape(client):
    answer = await client.post(
        "/v1/completions", json={"model": "base", "prompt": PROMPT, "max_tokens": 99}
    )
    body = answer.json()
    Completion.model_validate(body)
    assert set(body) == {
        "id", "object", "created", "model", "system_fingerprint", "choices", "usage"
    }  # fmt: skip
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    ]
    tokens = len(TEXT.encode()) + 1
    assert body["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": tokens,
        "total_tokens": 5 + tokens,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert answer.headers["x-fader-blend"] == "base"
    assert answer.headers["x-request-id"].startswith("req-")
    assert body["system_fingerprint"] == f"fader-9-{digest('base')[:12]}-base"


async def test_chat_has_the_whole_shape(client, world: World):
    answer = await client.post(
        "/v1/chat/completions",
        json={
            "model": "base",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
            ],
            "max_tokens": 1,
            "max_completion_tokens": 99,
            "logprobs": True,
            "top_logprobs": 2,
        },
    )  # fmt: skip
    body = answer.json()
    ChatCompletion.model_validate(body)
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["logprobs"]["refusal"] is None
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "G"
    assert first["bytes"] == [71]
    assert len(first["top_logprobs"]) == 2
    assert bytes(world.engine.seen[0].prompt) == b"system:be brief\nuser:ab\n"


async def test_chat_without_a_limit_may_fill_the_context(client, world: World):
    messages = [{"role": "user", "content": "x"}]
    await client.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    request = world.engine.seen[0]
    assert request.params.max_tokens == 4096 - len(request.prompt)


async def test_choices_are_ordered_prompts_outside_n_inside(client, world: World):
    body = await complete(client, prompt=["one", "two"], n=3)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    prompts = [bytes(request.prompt) for request in world.engine.seen]
    assert prompts == [b"one"] * 3 + [b"two"] * 3
    seeds = [request.params.seed for request in world.engine.seen]
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == 3
    assert body["usage"]["prompt_tokens"] == 6


async def test_token_prompts_pass_untouched(client, world: World):
    await complete(client, prompt=[[1, 2, 3], [4]])
    assert [request.prompt for request in world.engine.seen] == [(1, 2, 3), (4,)]


async def test_echo_with_logprobs_starts_with_null(client):
    body = await complete(client, echo=True, logprobs=1, max_tokens=1)
    (choice,) = body["choices"]
    assert choice["text"] == PROMPT + "G"
    scores = choice["logprobs"]
    assert scores["tokens"] == [*PROMPT, "G"]
    assert scores["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
    assert scores["top_logprobs"][0] is None
    assert scores["top_logprobs"][1] == {"a": -0.5}
    assert scores["text_offset"] == [0, 1, 2, 3, 4, 5]


async def test_scoring_a_prompt_generates_nothing(client):
    body = await complete(client, echo=True, logprobs=0, max_tokens=0)
    assert body["choices"][0]["text"] == PROMPT
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


async def test_echo_alone_repeats_the_prompt(client):
    body = await complete(client, echo=True, max_tokens=2)
    assert body["choices"][0]["text"] == PROMPT + "Gr"
    assert body["choices"][0]["logprobs"] is None


async def test_top_logprobs_of_equal_texts_keep_the_likelier_and_the_chosen(client):
    body = await complete(client, logprobs=5, max_tokens=3)
    scores = body["choices"][0]["logprobs"]
    for token, logprob, top in zip(
        scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True
    ):
        assert top[token] == max(top.values()) == logprob


async def test_stop_string_ends_the_choice_and_frees_the_engine(client, world: World):
    body = await complete(client, stop=["lazy", "never"])
    assert body["choices"][0]["text"] == TEXT.partition("lazy")[0]
    assert body["choices"][0]["finish_reason"] == "stop"
    assert world.engine.aborted == [world.engine.seen[0].id]
    assert world.idle


async def test_top_p_may_be_0_as_openai_has_it(client, world: World):
    await complete(client, prompt="x", top_p=0)
    assert world.engine.seen[0].params.top_p == 0.0


async def test_a_stop_string_stays_where_the_call_wants_it(client):
    said = TEXT[: TEXT.index("lazy")]
    for stops, end in ((["lazy", "never"], "lazy"), (["lazy dog", "lazy"], "lazy")):
        body = await complete(client, stop=stops, include_stop_str_in_output=True)
        assert body["choices"][0]["text"] == said + end
        assert body["choices"][0]["finish_reason"] == "stop"
    chat = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 99}
    told = await client.post(
        "/v1/chat/completions", json=chat | {"stop": "lazy", "include_stop_str_in_output": True}
    )
    assert told.json()["choices"][0]["message"]["content"] == said + "lazy"


async def test_stop_prefix_at_the_end_is_given_back(client):
    body = await complete(client, stop=[".never"])
    assert body["choices"][0]["text"] == TEXT


async def test_length_ends_the_choice(client):
    body = await complete(client, max_tokens=3)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3


async def test_ignore_eos_leaves_no_stop_ids(client, world: World):
    await complete(client, ignore_eos=True, stop_token_ids=[7])
    await complete(client, stop_token_ids=[7])
    first, second = world.engine.seen
    assert first.params.stop_token_ids == {7}
    assert second.params.stop_token_ids == {7, EOS}


async def test_null_means_unset(client, world: World):
    nulls = dict.fromkeys(
        [
            "temperature",
            "top_p",
            "seed",
            "logprobs",
            "stop",
            "n",
            "logit_bias",
            "stream",
            "stream_options",
            "echo",
            "best_of",
            "presence_penalty",
            "frequency_penalty",
            "suffix",
            "user",
            "max_tokens",
            "adapters",
            "lora",
            "lora_path",
        ]
    )
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x", **nulls})
    assert answer.status_code == 200
    assert world.engine.seen[0].params.max_tokens == 16


async def test_sampling_fields_reach_the_engine(client, world: World):
    given = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.1, "seed": -5, "min_tokens": 2,
    }  # fmt: skip
    await complete(client, **given, logit_bias={"5": -100, "6": 3.5})
    params = world.engine.seen[0].params
    for name, value in given.items():
        if name != "seed":
            assert getattr(params, name) == value
    assert params.seed == -5 % 2**63
    assert params.logit_bias == ((5, -100.0), (6, 3.5))


@pytest.mark.parametrize(
    ("model", "blend"),
    [
        ("tone", f"tone@{digest('tone')[:12]}=1"),
        ("base:tone", f"tone@{digest('tone')[:12]}=1"),
        (f"tone@{digest('tone')[:12]}", f"tone@{digest('tone')[:12]}=1"),
        (f"base:tone@{digest('tone')}", f"tone@{digest('tone')[:12]}=1"),
    ],
)
async def test_every_spelling_of_an_adapter_resolves(client, world: World, model, blend):
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "x"})
    assert answer.headers["x-fader-blend"] == blend
    assert answer.json()["model"] == model
    assert world.engine.seen[0].blend.terms[0].version == digest("tone")


async def test_blend_reaches_the_engine(client, world: World):
    adapters = [{"name": "tone", "weight": 0.7}, {"name": "domain", "weight": -0.2}]
    answer = await client.post(
        "/v1/completions", json={"model": "base", "prompt": "x", "adapters": adapters}
    )
    blend = world.engine.seen[0].blend
    assert {term.version: term.gamma for term in blend.terms} == {
        digest("tone"): 0.7,
        digest("domain"): -0.2,
    }
    assert "tone@" in answer.headers["x-fader-blend"]
    assert answer.json()["system_fingerprint"].endswith(blend.digest[:12])


async def test_llama_cpp_lora_field_is_a_blend(client, world: World):
    lora = [{"id": "tone", "scale": 0.5}, {"name": "domain", "scale": 2}]
    await complete(client, lora=lora)
    assert sorted(term.gamma for term in world.engine.seen[0].blend.terms) == [0.5, 2.0]


@pytest.mark.parametrize(
    ("model", "name"),
    [("tone", "tone"), ("base", "tone"), ("base:tone", "base:tone"), ("base", "tone@{}")],
)
async def test_sglangs_lora_path_names_an_adapter(client, world: World, model, name):
    """Its benchmark names the adapter as the model, too."""
    body = {"model": model, "prompt": "x", "lora_path": name.format(digest("tone")[:12])}
    answer = await client.post("/v1/completions", json=body)
    assert answer.headers["x-fader-blend"] == f"tone@{digest('tone')[:12]}=1"
    assert [term.version for term in world.engine.seen[0].blend.terms] == [digest("tone")]


@pytest.mark.parametrize(
    ("extra", "status", "param"),
    [
        ({"model": "tone", "lora_path": "domain"}, 400, "adapters"),
        ({"lora_path": "tone", "adapters": [{"name": "tone"}]}, 400, "lora_path"),
        ({"lora_path": "nope"}, 404, "model"),
        ({"model": "nope", "lora_path": "nope"}, 404, "model"),
    ],
)
async def test_a_lora_path_never_falls_back_to_the_base(client, world, extra, status, param):
    answer = await client.post("/v1/completions", json={"model": "base", "prompt": "x"} | extra)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert world.engine.seen == []


@pytest.mark.parametrize("model", ["nope", "base:nope", "tone@000000000000", "../x", "Base", "a b"])
async def test_unknown_models_are_not_found(client, world: World, model):
    answer = await client.post("/v1/completions", json={"model": model, "prompt": "x"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert answer.json()["error"]["param"] == "model"
    assert world.engine.seen == []


async def test_a_blend_with_strangers_names_them_and_nobody_else(client, world: World):
    blend = [{"name": name, "weight": 1} for name in ("tone", "nope", "domain@000000000000")]
    body = {"model": "base", "prompt": "x", "adapters": blend}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 404
    message = answer.json()["error"]["message"]
    assert message.endswith("not loaded: nope, domain@000000000000.")
    assert world.engine.seen == []


async def test_blend_beside_an_adapter_is_refused(client):
    body = {"model": "tone", "prompt": "x", "adapters": [{"name": "domain", "weight": 1}]}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "blend_invalid"


async def test_too_long_says_the_words_that_gateways_look_for(client, world: World):
    body = {"model": "base", "prompt": "x" * 4000, "max_tokens": 97}
    answer = await client.post("/v1/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_tokens"
    assert "This model's maximum context length is 4096 tokens" in error["message"]
    assert "context_length_exceeded" in error["message"]  # LangChain looks for it there
    longer = await client.post("/v1/completions", json={**body, "prompt": "x" * 4097})
    assert longer.json()["error"]["param"] == "prompt"
    assert (await client.post("/v1/completions", json={**body, "max_tokens": 96})).is_success
    assert world.idle


async def test_submission_is_all_or_nothing(client, world: World):
    from fader_server.errors import Overloaded

    world.engine.gate.clear()
    world.engine.refuse, world.engine.refuse_from = Overloaded("full", retry_after=7), 2
    answer = await client.post("/v1/completions", json={"model": "tone", "prompt": "x", "n": 4})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "7"
    assert sorted(world.engine.aborted) == sorted(request.id for request in world.engine.seen)
    assert world.idle


async def test_a_tenant_with_too_many_in_the_queue_may_come_again(client, world: World):
    world.engine.refuse = TenantBusy("3 requests of yours are waiting: try again later")
    answer = await client.post("/v1/completions", json={"model": "tone", "prompt": "x"})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.json()["error"] == {
        "message": "3 requests of yours are waiting: try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert world.idle


async def test_prefix_cache_is_divided_by_tenant_and_salt(worlds):
    from tests.server.api.conftest import asgi

    world = worlds(api_key=("one", "two"))
    for key, salt in (("one", None), ("two", None), ("one", "s"), ("one", None)):
        async with asgi(world, authorization=f"Bearer {key}") as client:
            await complete(client, cache_salt=salt)
    tenants = [request.tenant for request in world.engine.seen]
    assert tenants == ["key:1", "key:2", "key:1", "key:1"]
    salts = [request.cache_salt for request in world.engine.seen]
    assert salts[0] == salts[3]
    assert len(set(salts)) == 3


LAST = {"role": "assistant", "content": "Once"}
GOES_ON = {
    "model": "base",
    "messages": [{"role": "user", "content": "tell"}, LAST],
    "continue_final_message": True,
    "add_generation_prompt": False,
    "max_tokens": 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"add_generation_prompt": None},
        {
            "continue_final_message": None,
            "messages": [*GOES_ON["messages"][:1], {**LAST, "prefix": True}],
        },
    ],
)
async def test_an_answer_goes_on_with_the_last_message(client, world: World, changes):
    answer = await client.post("/v1/chat/completions", json=GOES_ON | changes)
    assert answer.status_code == 200, answer.text
    assert bytes(world.engine.seen[0].prompt) == b"user:tell\nassistant:Once"
    assert answer.json()["choices"][0]["message"]["content"] == TEXT[:2] + "\ufffd"


async def test_a_chat_may_end_without_the_beginning_of_an_answer(client, world: World):
    body = GOES_ON | {"continue_final_message": False}
    assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    assert bytes(world.engine.seen[0].prompt).endswith(b"assistant:Once\nsilent\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"add_generation_prompt": True},
        {"messages": GOES_ON["messages"][:1]},
        {"messages": [*GOES_ON["messages"], {"role": "user", "content": "x"}]},
        {"messages": [*GOES_ON["messages"][:1], {"role": "assistant", "content": ""}]},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
async def test_what_cannot_go_on_is_refused(client, world: World, changes):
    answer = await client.post("/v1/chat/completions", json=GOES_ON | changes)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "continue_final_message"
    assert not world.engine.seen
