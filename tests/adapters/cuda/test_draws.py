"""Draws from whole vocabularies by the CUDA kernels: edges and tokens are those of the tensors."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from bench.gpu.draws import draws_of
from fader_adapters.kernels.cuda import draws, draws_configs
from fader_server.model import gumbel, mass
from fader_server.model.cuda_distribution import CudaDistributions
from fader_server.model.distribution import Draws, TorchDistributions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted on the CPU")

SHARES = (0.0, 1e-9, 0.3, 0.9, 0.999, 1 - 1e-12)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted ones take their time: two a row, of blocks that end within a part."""
    monkeypatch.setattr(draws_configs, "PARTS", 2)
    for name, block in (("NARROW", 64), ("RACE", 128)):
        given = getattr(draws_configs, name) | {"PARTS": 2, "BLOCK": block}
        monkeypatch.setattr(draws_configs, name, given)


def masses(logits: torch.Tensor) -> torch.Tensor:
    return mass.masses(logits - logits.amax(-1, keepdim=True))


KINDS: dict[str, Callable[[int], torch.Tensor]] = {
    "spread": lambda vocab: torch.randn(len(SHARES), vocab) * 3,
    "tied": lambda vocab: torch.randn(len(SHARES), vocab).mul(2).round(),
    "all equal": lambda vocab: torch.zeros(len(SHARES), vocab),
    "one alone": lambda vocab: torch.eye(len(SHARES), vocab) * 90,
    "almost nothing": lambda vocab: torch.randn(len(SHARES), vocab) * 40,
}


QUICK = (("spread", 300), ("tied", 300), ("tied", 5))


@pytest.mark.parametrize(
    ("kind", "vocab"),
    [
        pytest.param(kind, vocab, marks=() if (kind, vocab) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for vocab in (1, 5, 300, 1000)
    ],
)
def test_a_nucleus_ends_where_it_ends_in_sorted_order(kind: str, vocab: int) -> None:
    torch.manual_seed(vocab)
    weight = masses(KINDS[kind](vocab))
    limits = mass.Limits(np.zeros(len(SHARES), np.int64), np.array(SHARES), np.zeros(len(SHARES)))
    found = mass.edges(weight, limits, draws.nucleus_edge)
    assert torch.equal(found, mass.edges(weight, limits))
    if (kind, vocab) == ("spread", 300):
        assert len(set(found[:, 0].tolist())) == len(SHARES) - 2, "the check cannot fail"


def test_beside_top_k_and_rows_without_a_nucleus() -> None:
    torch.manual_seed(1)
    weight = masses(torch.randn(6, 500) * 2)
    limits = mass.Limits(
        np.array([0, 7, 40, 0, 500, 9]),
        np.array([0.9, 0.8, 1.0, 1.0, 0.5, 0.01]),
        np.array([0.0, 0.0, 0.0, 0.3, 0.2, 0.9]),
    )
    searched: list[int] = []

    def search(kept: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
        searched.append(len(kept))
        return draws.nucleus_edge(kept, need)

    assert torch.equal(mass.edges(weight, limits, search), mass.edges(weight, limits))
    assert searched == [6]
    bounded = limits.of(np.array([1, 2, 5]))
    mass.edges(weight[:3], bounded, search)
    assert searched == [6], "under a top-k nothing is searched"


def test_an_edge_is_the_rows_own_and_a_row_of_no_numbers_ends() -> None:
    torch.manual_seed(2)
    weight = masses(torch.randn(4, 200))
    need = (weight.sum(-1).double() * 0.7).ceil().long()
    alone = torch.cat([draws.nucleus_edge(weight[i : i + 1], need[i : i + 1]) for i in range(4)])
    broken = weight.clone()
    broken[2] = torch.iinfo(torch.int64).min
    found = draws.nucleus_edge(broken, need)
    assert torch.equal(found[[0, 1, 3]], alone[[0, 1, 3]])
    assert not torch.equal(found[2], alone[2])


@pytest.mark.parametrize("vocab", [1, 127, 128, 1030])
def test_a_race_has_the_winner_that_tensors_give_it(vocab: int) -> None:
    torch.manual_seed(vocab)
    x = torch.randn(5, vocab)
    x[1, vocab // 2 + 1 :] = -torch.inf
    heat, firsts = torch.tensor([0.5, 1.0, 2.0, 0.01, 50.0]), set()
    for seed in range(8):
        keys = torch.tensor([gumbel.draw_key(seed, at) for at in range(5)])
        found = draws.winners(x, heat, keys)
        assert torch.equal(found, gumbel.winners(x, heat[:, None], keys))
        assert torch.equal(draws.winners(x[2:3], heat[2:3], keys[2:3]), found[2:3])
        firsts.add(int(found[4]))
    assert vocab == 1 or len(firsts) > 1, "keys decide"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_row_of_no_numbers_draws_some_token(value: float) -> None:
    x = torch.full((2, 300), value)
    found = draws.winners(x, torch.ones(2), torch.arange(2))
    assert ((found >= 0) & (found < 300)).all()


def test_mixed_rows_draw_the_tokens_that_tensors_draw() -> None:
    torch.manual_seed(3)
    logits, rows = torch.randn(8, 400) * 2, torch.tensor([0, 7, 3, 5])
    limits = mass.Limits(
        np.array([0, 0, 20, 0]), np.array([0.9, 1.0, 0.5, 1.0]), np.array([0.0, 0.0, 0.0, 0.1])
    )
    ours, plain = CudaDistributions(400, torch.device("cpu")), TorchDistributions()
    others = 0
    for seed in range(1, 4):
        keys = np.array([gumbel.draw_key(seed, at) for at in range(4)], np.int64)
        given = Draws(np.array([0.7, 1.0, 1.3, 2.0], np.float32), limits, keys)
        tokens = ours.draw(logits, rows, given)
        assert torch.equal(tokens, plain.draw(logits, rows, given))
        others += not torch.equal(tokens, plain.draw(logits, rows, draws_of(4, 1.0, seed=-seed)))
    assert others > 1


def test_a_start_compiles_what_draws_need(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    for name in ("_narrow", "_race"):
        kernel = getattr(draws, name)

        class Noted:
            def __init__(self, name: str, kernel: object) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> object:
                launched.append(self.name)
                return self.kernel[grid]  # pyright: ignore[reportIndexIssue]

        monkeypatch.setattr(draws, name, Noted(name, kernel))
    CudaDistributions(300, torch.device("cpu"))
    assert set(launched) == {"_narrow", "_race"}
