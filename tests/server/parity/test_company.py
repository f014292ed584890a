"""Models whose code maps single elements: a row's logits are its own, for three threads too."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fader_adapters.kernels import native
from fader_server.engine.limits import Limits
from fader_server.model import cpu_attention, experts, loader
from fader_server.model.prefill import NativeReplays
from tests.support.many_families import MANY, write_many
from tests.support.world import Answer, Ask, TinyWorld, greedy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")

NARROW = {"intermediate_size": 128}
"""No multiple of three vectors: a thread's part ends amid one."""
MODELS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "exact gelu": ("gpt_neox", NARROW),
    "gelu by hand": ("phi", NARROW),
    "sigmoid in an activation": ("gpt_neox", NARROW | {"hidden_act": "quick_gelu"}),
    "no such kernel": ("gpt_neox", NARROW | {"hidden_act": "mish"}),
    "sigmoid of one column": MANY["qwen2-moe"],
    "sigmoid of experts": MANY["gpt-oss"],
    "sigmoid of a router": MANY["deepseek-v3"],
    "tanh of logits": ("gemma2", {"final_logit_softcapping": 10.0}),
}
QUICK = {
    *(("exact gelu", torch.float32), ("exact gelu", torch.bfloat16)),
    *(("sigmoid of one column", torch.float32), ("sigmoid of one column", torch.bfloat16)),
    *(("no such kernel", torch.float32), ("tanh of logits", torch.float32)),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def ask(place: int, count: int, **params: Any) -> Ask:
    """Of so many tokens."""
    prompt = [(7 * place + 3 * i) % 500 + 3 for i in range(count)]
    return Ask(prompt, {}, greedy(3, logprobs=5, **params))


def differs(world: TinyWorld, **params: Any) -> list[int]:
    """How many others share the steps where a request gets another answer than alone."""

    def told(answer: Answer) -> tuple[object, ...]:
        return answer.tokens, answer.logprobs, answer.prompt_logprobs

    needle = ask(0, 41, **params)
    (alone,) = world.run([needle])
    found = []
    for others in range(1, 10):
        asks = [ask(i, 30 + 11 * i, **params) for i in range(1, others + 1)]
        asks.insert(others // 2, needle)
        if told(world.run(asks)[others // 2]) != told(alone):
            found.append(others)
    return found


def opened(name: str, dtype: torch.dtype, folder: Path) -> TinyWorld:
    limits = Limits(max_rows=16, max_step_tokens=1024, chunk_size=256, max_model_len=512)
    return TinyWorld(write_many(*MODELS[name], folder), dtype=dtype, limits=limits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(
            *(name, DTYPES[dtype]),
            id=f"{name}-{dtype}",
            marks=[] if (name, DTYPES[dtype]) in QUICK else pytest.mark.slow,
        )
        for name in MODELS
        for dtype in DTYPES
    ],
)
def test_a_rows_logits_are_the_same_alone_and_beside_one_to_nine_others(name, dtype, tmp_path):
    world = opened(name, dtype, tmp_path)
    assert not differs(world, prompt_logprobs=0)
    assert not differs(world)
    replays = world.runner._replays
    assert isinstance(replays, NativeReplays)
    assert replays.decode.enabled
    assert replays.decode._trusted
    assert replays.prefill._trusted


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch has one code for these functions without vectors",
)
@pytest.mark.parametrize("name", ["no such kernel", "sigmoid of one column"])
def test_torchs_own_functions_would_show(name, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "keep_rows_apart", lambda *_: None)
    assert differs(opened(name, torch.float32, tmp_path), prompt_logprobs=0)


DBRX: dict[str, Any] = {
    "d_model": 128,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 512,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4},
    "ffn_config": {
        "hidden_size": 128,
        "ffn_hidden_size": 192,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_jitter_eps": 0.0,
    },
}


def test_experts_that_are_rows_of_one_matrix_know_no_company(tmp_path, monkeypatch):
    base = write_many("dbrx", DBRX, tmp_path)
    limits = Limits(max_rows=16, max_step_tokens=1024, chunk_size=256, max_model_len=512)
    world = TinyWorld(base, limits=limits)
    assert not differs(world, prompt_logprobs=0)
    assert not differs(world)
    monkeypatch.setattr(experts, "_slices", lambda _: False)
    assert differs(TinyWorld(base, limits=limits), prompt_logprobs=0)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_a_prompt_that_was_found_gives_the_bits_of_one_that_was_not(name, tmp_path, monkeypatch):
    """Heads whose values are narrower than their keys, and ones of one width."""

    def told(answer: Answer) -> tuple[object, ...]:
        return answer.tokens, answer.logprobs

    limits = Limits(max_rows=16, max_step_tokens=1024, chunk_size=256, max_model_len=512)
    base = write_many(*MANY[name], tmp_path)

    def twice() -> bool:
        world, same = TinyWorld(base, limits=limits), True
        for count in (35, 50, 66, 130):
            first, again = (world.run([ask(count, count)])[0] for _ in range(2))
            assert (first.cached, again.cached) == (0, (count - 1) // 16 * 16)
            same &= told(first) == told(again)
        return same

    assert twice()
    monkeypatch.setattr(cpu_attention, "attention_fits", lambda size: False)
    assert not twice(), "torch's own products would show"
