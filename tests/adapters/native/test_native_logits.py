"""Native draws, maxima and scores against what NumPy adds, sorts and races, on every instruction
set."""

import ctypes
import math
import subprocess

import numpy as np
import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native import build
from fader_adapters.kernels.native.library import library

FLOATS = [torch.float32, torch.bfloat16]


def scratch():
    workspace = native.Workspace()
    workspace.poison()
    return workspace


def draws(rows, **given):
    """Draws of `rows` rows, the same in each but for what is given by row."""
    plain = {"heat": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "key": 1} | given
    kinds = {"heat": torch.float32, "top_k": torch.int64, "key": torch.int64}
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


def splitmix(key, at):
    """By Python's own integers."""
    z = (key + (at + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def noise(key, width):
    """Gumbel numbers as fader.h states them."""
    u = [((splitmix(key % 2**64, at) >> 12) + 0.5) * 2.0**-52 for at in range(width)]
    return -np.log(-np.log(u))


def winner(row, heat, key, **cut):
    shifted = (row.float() - row.float().max()).double().numpy() / np.float32(heat)
    z = np.where(kept(weights(row, heat), **cut) > 0, shifted + noise(key, len(row)), -math.inf)
    return int(z.argmax())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("width", [1, 7, 133, 1024, 5003])
def test_the_winner_of_the_race_is_drawn(level, dtype, cut, width):
    keys = torch.randint(-(2**63), 2**63 - 1, (12,)).tolist()
    x = logits(len(keys), width, dtype, spread=3.0)
    given = draws(len(keys), heat=0.8, key=keys, **cut)
    want = [winner(row, 0.8, key, **cut) for row, key in zip(x, keys, strict=True)]
    assert native.draw(x, given, scratch=scratch()).tolist() == want
    others = draws(len(keys), heat=0.8, key=[key + 1 for key in keys], **cut)
    if cut in ({}, {"top_p": 0.9}) and width > 100:
        assert native.draw(x, others, scratch=scratch()).tolist() != want


STALE = """
#include <alloca.h>
#include <stdint.h>
__attribute__((noinline)) static void fill(uint32_t value) {
    volatile uint32_t *p = (volatile uint32_t *)alloca(4 * 8192);
    for (int i = 0; i < 8192; i++) p[i] = value;
}
typedef int (*Draw)(const void *, const void *, int64_t, void *, int64_t, int64_t *, int);
extern "C" int stale_draw(Draw draw, uint32_t value, const void *l, const void *d, int64_t rows,
                          void *scratch, int64_t bytes, int64_t *need, int nt) {
    fill(value);
    return draw(l, d, rows, scratch, bytes, need, nt);
}
"""


@pytest.fixture(scope="module")
def stale(tmp_path_factory):
    """fader_draw on a stack that holds one value everywhere."""
    folder = tmp_path_factory.mktemp("stale")
    (folder / "stale.cpp").write_text(STALE)
    command = [build.find_compiler(), "-O2", "-shared", "-fPIC", "stale.cpp", "-o", "stale.so"]
    subprocess.run(command, cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "stale.so")).stale_draw
    function.argtypes = [
        *[ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64],
        *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int],
    ]
    return function


@pytest.mark.parametrize("width", [5, 33, 133, 201, 250])
def test_what_a_stack_holds_decides_no_draw(level, stale, width, monkeypatch):
    """Of rows that are no whole vectors: what is beside them is no number here, then infinite."""
    x, keys = logits(200, width, torch.float32), torch.randint(-(2**63), 2**63 - 1, (200,))
    given = draws(200, key=keys)
    want = [winner(row, 1.0, key) for row, key in zip(x, keys.tolist(), strict=True)]
    address = ctypes.cast(library().fader_draw, ctypes.c_void_p)
    for value in (0xFFFFFFFF, 0x7F800000):

        def on_it(*args, value=value):
            *args, _ = args
            return stale(address, value, *args, 1)

        workspace = scratch()
        monkeypatch.setattr(library(), "fader_draw", on_it, raising=False)
        assert native.draw(x, given, scratch=workspace).tolist() == want
        monkeypatch.undo()


@pytest.mark.parametrize("heat", [1e-30, 1e-3, 1.0, 50.0, 1e30])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 1e3, 1e30])
def test_no_winner_is_passed_over(level, heat, spread):
    """The bounds by which others are passed over hold at every size of logits and heat."""
    keys = torch.randint(-(2**63), 2**63 - 1, (20,)).tolist()
    x = logits(len(keys), 2000, torch.float32, spread=spread)
    given = draws(len(keys), heat=heat, key=keys)
    with np.errstate(over="ignore"):
        want = [winner(row, heat, key) for row, key in zip(x, keys, strict=True)]
    assert native.draw(x, given, scratch=scratch()).tolist() == want


@pytest.mark.parametrize("dtype", FLOATS)
def test_edges_are_where_a_sort_puts_them(level, dtype):
    """Of flat logits every kept token is drawn some time, and none beside: a cut that lay one token
    aside would show."""
    rows = 400
    for seed in range(12):
        torch.manual_seed(seed)
        (row,) = logits(1, 300, dtype, spread=0.5)
        cut = [{"top_k": 1 + seed}, {"top_p": 0.05}, {"top_k": 15, "top_p": 0.6}][seed % 3]
        stay = np.flatnonzero(kept(weights(row, 1.0), **cut))
        assert len(stay) < 20
        x = row.expand(rows, -1).contiguous()
        given = draws(rows, key=torch.arange(rows) * 977, **cut)
        assert sorted(set(native.draw(x, given, scratch=scratch()).tolist())) == stay.tolist()


def test_tokens_tied_at_an_edge_all_stay(level):
    row = torch.tensor([[0.0, -1.0, -1.0, -2.0]]).expand(200, -1).contiguous()
    for cut in ({"top_k": 2}, {"top_p": 0.6}):
        found = native.draw(row, draws(200, key=torch.arange(200), **cut), scratch=scratch())
        assert set(found.tolist()) == {0, 1, 2}


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
    given = {"top_p": 0.8, "key": torch.arange(133) * 31}
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


FIELDS = ("heat", "top_k", "top_p", "min_p", "key")


def test_forbidden_tokens_weigh_nothing(level):
    x = torch.full((2, 3000), -math.inf)
    x[0, 1700] = -5.0
    best, tokens = native.largest(x, scratch=scratch())
    assert (best.tolist(), tokens[0].item()) == ([-5.0, -math.inf], 1700)
    for cut in ({}, {"top_p": 0.5}):
        assert native.draw(x, draws(2, **cut), scratch=scratch()).tolist() == [1700, 0]
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
    for change in ({"heat": 0.0}, {"top_p": 1.5}, {"min_p": math.nan}):
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
