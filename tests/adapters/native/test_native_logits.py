"""Native draws, maxima and scores against integers that NumPy adds and sorts, on every instruction
set."""

import math

import numpy as np
import pytest
import torch

from fader_adapters.kernels import native

FLOATS = [torch.float32, torch.bfloat16]


def scratch():
    workspace = native.Workspace()
    workspace.poison()
    return workspace


def draws(rows, **given):
    """Draws of `rows` rows, the same in each but for what is given by row."""
    plain = {"heat": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5} | given
    kinds = {"heat": torch.float32, "top_k": torch.int64}
    return native.Draws(
        **{
            name: torch.as_tensor(value, dtype=kinds.get(name, torch.float64)).expand(rows).clone()
            for name, value in plain.items()
        }
    )


def weights(row, heat):
    """As the kernel states them, by exponentials of double precision."""
    shifted = (row.float() - row.float().max()) / torch.tensor(heat, dtype=torch.float32)
    return np.floor(np.exp(shifted.double().numpy()) * 2.0**44).astype(np.int64)


def kept(weight, *, top_k=0, top_p=1.0, min_p=0.0):
    """The weights that stay, others 0: each cut by a sort of its own."""
    order = np.sort(weight)[::-1]
    if 0 < top_k < len(weight):
        weight = np.where(weight >= order[top_k - 1], weight, 0)
    if top_p < 1:
        least = np.sort(weight)[::-1]
        reached = np.searchsorted(np.cumsum(least), math.ceil(top_p * float(weight.sum())))
        weight = np.where(weight >= least[min(reached, len(least) - 1)], weight, 0)
    return np.where(weight >= math.ceil(min_p * 2.0**44), weight, 0)


def logits(rows, width, dtype, spread=2.0):
    return (torch.randn(rows, width) * spread).to(dtype)


CUTS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 60, "top_p": 0.7, "min_p": 0.01},
    {"top_k": 10**9, "top_p": 0.9999},
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 133, 1024, 5003])
def test_every_kept_token_is_drawn_by_its_share(level, dtype, cut, width):
    """At both ends of a token's share of [0, 1) and a little beyond: that token, and its neighbours
    among those kept."""
    (row,) = logits(1, width, dtype)
    share = kept(weights(row, 0.8), **cut).astype(np.float64)
    ends = np.cumsum(share) / share.sum()
    found = {}
    for token in np.flatnonzero(share)[-12:]:
        low = ends[token - 1] if token else 0.0
        if share[token] / share.sum() < 1e-5:
            continue  # too thin beside what exponentials differ by
        width_of = ends[token] - low
        for part in (0.02, 0.5, 0.98):
            found[low + part * width_of] = token
    assert found
    x = row.expand(len(found), -1).contiguous()
    given = draws(len(found), heat=0.8, uniform=list(found), **cut)
    assert native.draw(x, given, scratch=scratch()).tolist() == list(found.values())


@pytest.mark.parametrize("dtype", FLOATS)
def test_edges_are_where_a_sort_puts_them(level, dtype):
    """The first and the last kept token are drawn at the ends of [0, 1): a cut that lay one token
    beside would show."""
    for seed in range(60):
        torch.manual_seed(seed)
        (row,) = logits(1, 900, dtype, spread=0.5 + seed % 5)
        cut = {"top_k": seed * 7 % 200, "top_p": [1.0, 0.5, 0.93][seed % 3]}
        stay = np.flatnonzero(kept(weights(row, 1.0), **cut))
        x = row.expand(2, -1).contiguous()
        ends = native.draw(x, draws(2, uniform=[0.0, 1 - 2**-53], **cut), scratch=scratch())
        assert ends.tolist() == [stay[0], stay[-1]]


def test_tokens_tied_at_an_edge_all_stay(level):
    row = torch.tensor([[0.0, -1.0, -1.0, -2.0]])
    for cut in ({"top_k": 2}, {"top_p": 0.6}):
        last = native.draw(row, draws(1, uniform=1 - 2**-53, **cut), scratch=scratch())
        assert last.item() == 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [1, 5, 1023, 1025, 40_000])
def test_the_largest_is_the_first_of_equals(level, dtype, width):
    x = logits(9, width, dtype).round()
    best, tokens = native.largest(x, scratch=scratch())
    assert torch.equal(best, x.float().amax(-1))
    assert tokens.tolist() == x.float().numpy().argmax(-1).tolist()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("top", [0, 1, 20, 700])
@pytest.mark.parametrize("width", [1, 600, 5003])
def test_scores_are_log_softmax_and_equals_come_by_number(level, dtype, top, width):
    x = logits(6, width, dtype).mul(4).round().div(4)
    tokens = torch.randint(width, (6,))
    got = native.score(x, tokens, top, scratch=scratch())
    want = torch.log_softmax(x.double(), -1)
    count = min(top, width)
    assert got.shape == (6, 1 + 2 * count)
    torch.testing.assert_close(got[:, 0], want[torch.arange(6), tokens], atol=1e-5, rtol=0)
    order = x.float().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(got[:, 1 : 1 + count].long(), order)
    torch.testing.assert_close(got[:, 1 + count :], want.gather(-1, order), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_is_the_same_alone_and_among_any_and_a_fault_is_its_own(level, dtype):
    wide = logits(133, 3 * 2048, dtype)
    x = wide[:, 2048:4096]
    given = {"top_p": 0.8, "uniform": torch.rand(133, dtype=torch.float64)}
    tokens = torch.arange(133)
    drawn = native.draw(x, draws(133, **given), scratch=scratch())
    scored = native.score(x, tokens, 5, scratch=scratch())
    some = torch.tensor([132, 0, 7, 7])
    again = native.Draws(**{n: getattr(draws(133, **given), n)[some].clone() for n in FIELDS})
    assert torch.equal(native.draw(x, again, scratch=scratch(), rows=some), drawn[some])
    assert torch.equal(native.score(x, tokens[some], 5, scratch=scratch(), rows=some), scored[some])
    for bad in (math.nan, math.inf):
        wide[5, 3000] = bad
        best, _ = native.largest(x, scratch=scratch())
        assert not best[5].isfinite()
        assert best.isfinite().sum() == 132
        broken = native.score(x, tokens, 5, scratch=scratch())
        assert broken[5, [0, 6, 10]].isnan().all()
        assert torch.equal(broken[6:], scored[6:])
        others = native.draw(x, draws(133, **given), scratch=scratch())
        assert others[5] == 0
        assert torch.equal(others[6:], drawn[6:])


FIELDS = ("heat", "top_k", "top_p", "min_p", "uniform")


def test_forbidden_tokens_weigh_nothing(level):
    x = torch.full((2, 3000), -math.inf)
    x[0, 1700] = -5.0
    best, tokens = native.largest(x, scratch=scratch())
    assert (best.tolist(), tokens[0].item()) == ([-5.0, -math.inf], 1700)
    ends = draws(2, uniform=1 - 2**-53, top_p=0.5)
    assert native.draw(x, ends, scratch=scratch()).tolist() == [1700, 0]
    scored = native.score(x, torch.tensor([3, 3]), 1, scratch=scratch())
    assert scored[0].tolist() == [-math.inf, 1700, 0.0]


@pytest.mark.usefixtures("built")
def test_wrong_arguments_are_named():
    x = torch.zeros(3, 64)
    good = draws(3)
    with pytest.raises(TypeError, match="x must be"):
        native.largest(x.half(), scratch=scratch())
    with pytest.raises(TypeError, match="heat must be"):
        native.draw(x, native.Draws(**vars_of(good, heat=good.top_p)), scratch=scratch())
    with pytest.raises(ValueError, match="top_k must have shape"):
        native.draw(x, native.Draws(**vars_of(good, top_k=good.top_k[:2])), scratch=scratch())
    for change in ({"heat": 0.0}, {"uniform": 1.0}, {"top_p": 1.5}, {"min_p": math.nan}):
        with pytest.raises(ValueError, match="fader_draw"):
            native.draw(x, draws(3, **change), scratch=scratch())
    with pytest.raises(ValueError, match="fader_largest: a size"):
        native.largest(torch.zeros(1, 2**19), scratch=scratch())
    for rows in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="fader_draw: a slot, row"):
            native.draw(x, draws(2), scratch=scratch(), rows=torch.tensor(rows))
    with pytest.raises(ValueError, match="fader_score: a slot, row"):
        native.score(x, torch.tensor([0, 64, 0]), 1, scratch=scratch())
    assert native.draw(x[:0], draws(0), scratch=scratch()).tolist() == []


def vars_of(given, **change):
    return {name: getattr(given, name) for name in FIELDS} | change
