"""Every family against transformers + PEFT on the same NF4 base, in mixed batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.support.families import CONFIGS, VOCAB, write_family
from tests.support.oracle import Oracle
from tests.support.peft_adapters import write_adapter
from tests.support.world import Answer, Ask, TinyWorld, greedy

RANKS = {"r1": 1, "r8": 8, "r16": 16, "r64": 64}
BLENDS: list[Mapping[str, float]] = [
    {},
    {"r1": 1.0},
    {"r8": 1.0},
    {"r16": 1.0},
    {"r64": 1.0},
    {"r8": 0.7, "r64": -0.4},
    {"r1": 0.5, "r8": 0.5, "r16": -1.0, "r64": 0.25},
    {},
]
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference of a logprob."""


class Setting:
    """One family: its checkpoint, its adapters and the oracle over them."""

    def __init__(self, family: str, folder: Path, dtype: torch.dtype) -> None:
        self.source = write_family(family, folder / "base", scale=SCALE[dtype])
        self.adapters = {
            name: write_adapter(self.source, folder / name, rank=rank, seed=rank)
            for name, rank in RANKS.items()
        }
        self.oracle = Oracle(self.source, dtype, self.adapters)
        self.dtype = dtype

    def world(self, **options) -> TinyWorld:
        world = TinyWorld(self.source, dtype=self.dtype, **options)
        for name, path in self.adapters.items():
            world.load(name, path)
        return world


SCALE = {torch.float32: 0.05, torch.bfloat16: 0.02}
"""Spread of the weights: bf16 logits must be small for 2e-2 to be more than their rounding."""


def prompts(count: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    lengths = [1, 3, 17, 33, 50, 64, 9, 2]
    return [
        torch.randint(3, VOCAB, (lengths[i % 8] + i // 8,), generator=g).tolist()
        for i in range(count)
    ]


def mixed(count: int = 16) -> list[Ask]:
    params = greedy(5, prompt_logprobs=0)
    return [Ask(prompt, BLENDS[i % len(BLENDS)], params) for i, prompt in enumerate(prompts(count))]


def difference(oracle: Oracle, ask: Ask, answer: Answer, bound: float) -> float:
    """Largest logprob difference; asserts that every token is the oracle's argmax or a near-tie."""
    tokens = [*ask.prompt, *answer.tokens]
    logprobs = torch.log_softmax(oracle.logits(tokens[:-1], ask.blend), dim=-1)
    unwritten = VOCAB - logprobs.shape[1]  # some models read tokens that they cannot write
    logprobs = torch.nn.functional.pad(logprobs, (0, unwritten), value=-torch.inf)
    told = [*answer.prompt_logprobs, *answer.logprobs]
    assert [t.token for t in told] == tokens[1:]
    for at, token in enumerate(answer.tokens, len(ask.prompt) - 1):
        assert logprobs[at].max() - logprobs[at, token] <= 2 * bound
    ours = torch.tensor([t.logprob for t in told])
    theirs = logprobs[torch.arange(len(told)), tokens[1:]]
    return float(torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max())


def check(oracle: Oracle, asks: Sequence[Ask], answers: Sequence[Answer], bound: float) -> None:
    for ask, answer in zip(asks, answers, strict=True):
        assert answer.error is None
        assert difference(oracle, ask, answer, bound) <= bound, ask.blend


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exact(family: str, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(family, tmp_path_factory.mktemp(f"{family}-fp32"), torch.float32)


ROUNDED = frozenset({"gemma2", "gpt2", "llama"})
"""Families that are compared in bf16 as well in every run."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(f, marks=[] if f in ROUNDED else pytest.mark.slow) for f in sorted(CONFIGS)
    ],
)
def rounded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(request.param, tmp_path_factory.mktemp(f"{request.param}-bf16"), torch.bfloat16)


AUTO_FIRST = ["auto", pytest.param("reference", marks=pytest.mark.slow)]
"""The fallback meets fp64, term by term, in every run, and every family in the slow one."""


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_mixed_batch_of_blends_equals_peft(exact: Setting, backend):
    asks = mixed()
    check(exact.oracle, asks, exact.world(backend=backend).run(asks), BOUND[torch.float32])


@pytest.mark.parametrize("backend", AUTO_FIRST)
def test_mixed_batch_of_blends_equals_peft_in_bf16(rounded: Setting, backend):
    asks = mixed()
    check(rounded.oracle, asks, rounded.world(backend=backend).run(asks), BOUND[torch.bfloat16])


def test_a_blend_off_by_two_percent_would_be_noticed(exact: Setting):
    ask = Ask(prompts(4)[3], {"r64": 1.0}, greedy(5, prompt_logprobs=0))
    (answer,) = exact.world().run([ask])
    other = Ask(ask.prompt, {"r64": 0.98}, ask.params)
    assert difference(exact.oracle, other, answer, 1.0) > 10 * BOUND[torch.float32]
