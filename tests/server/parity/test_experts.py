"""Mixtures of experts: a request's bits are its own, whoever shares routers and experts with it."""

from pathlib import Path

import pytest
import torch

from fader_adapters.kernels.backend import BackendName
from fader_server.engine.limits import Limits
from fader_server.model.experts import routed
from tests.server.parity.test_many_families import adapters, asks
from tests.support.families import write_family
from tests.support.many_families import MANY, write_many
from tests.support.world import Ask, TinyWorld

FAMILIES = (
    "deepseek-v2",
    "deepseek-v3",
    "flint",
    "gpt-oss",
    "granite-moe",
    "granite-moe-swa",
    "mimo-v2-flash",
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "qwen3-moe",
)
QUICK = {("mixtral", "auto", torch.float32)}
SETTINGS = [
    pytest.param(
        *(family, backend, dtype),
        id=f"{family}-{backend}-{dtype}",
        marks=[] if (family, backend, dtype) in QUICK else pytest.mark.slow,
    )
    for family in FAMILIES
    for backend in ("auto", "reference")
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize(("family", "backend", "dtype"), SETTINGS)
def test_a_request_has_the_same_bits_alone_and_beside_others(
    family: str, backend: BackendName, dtype: torch.dtype, tmp_path: Path
):
    base = write_many(*MANY[family], tmp_path / "base")
    limits = Limits(max_rows=16, max_step_tokens=96, chunk_size=32, max_model_len=512)
    world = TinyWorld(base, dtype=dtype, backend=backend, limits=limits)
    for name, path in adapters(base, tmp_path, world).items():
        world.load(name, path)
    questions = asks(world.base.max_positions)
    together = world.run(questions)
    for ask, answer in zip(questions, together, strict=True):
        (alone,) = world.run([ask])
        assert alone.tokens == answer.tokens
        assert alone.logprobs == answer.logprobs
        assert alone.prompt_logprobs == answer.prompt_logprobs
    changed = Ask(questions[1].prompt, {"r8": 0.95}, questions[1].params)
    assert world.run([changed])[0].logprobs != together[1].logprobs, "the comparison sees nothing"


def test_only_what_routes_runs_under_these_rules(tmp_path: Path):
    """Not the whole of a base, whose packed head has a weight of three dimensions, too."""
    dense = TinyWorld(write_family("llama", tmp_path / "dense"), dtype=torch.bfloat16)
    assert any(p.dim() == 3 for p in dense.base.model.parameters())
    assert not list(routed(dense.base.model))
    mixture = TinyWorld(write_many(*MANY["mixtral"], tmp_path / "moe"), dtype=torch.bfloat16)
    assert {type(block).__name__ for block in routed(mixture.base.model)} == {
        "MixtralSparseMoeBlock"
    }
