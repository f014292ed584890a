"""Screened output layers whose rows are drawn with top_p: the tokens are those of all logits, on
every instruction set, whatever the distribution; where bounds do not tell, all are computed."""

import math
import random
from dataclasses import replace

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native.screen import NUCLEUS_ROWS, Patience, Wanted
from tests.adapters.native.test_native_screen import FLOATS, Layer, raced

SHARES = (0.0, 1e-12, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-12)


class Rows:
    """Draws from a layer in full and screened, with the tokens of both."""

    def __init__(self, layer):
        self.layer, self.scratch = layer, native.Workspace()
        self.found = self.lost = 0
        self.shares = []

    def draw(self, y, wanted):
        """Of each row what it wants: a draw, or the largest."""
        tokens = native.largest(y, scratch=self.scratch)[1]
        own = [i for i, row in enumerate(wanted) if row.heat]
        if own:
            given = raced([replace(wanted[i], key=wanted[i].key or 7) for i in own])
            given.top_k.copy_(torch.tensor([0 if wanted[i].key else wanted[i].count for i in own]))
            index = torch.tensor(own)
            tokens[index] = native.draw(y, given, scratch=self.scratch, rows=index)
        return tokens

    def compare(self, x, *wanted):
        """Tokens of both, and which rows' maxima are finite; counts what was decided early."""
        self.layer.screen._patience = Patience()
        full, kept = self.layer(x), self.layer.keeping(x, *wanted)
        self.shares.append(self.layer.screen._struct.computed / -(-self.layer.n // 32))
        sound = native.largest(full, scratch=self.scratch)[0].isfinite()
        assert torch.equal(native.largest(kept, scratch=self.scratch)[0].isfinite(), sound)
        assert torch.equal(kept[kept > -math.inf], full[kept > -math.inf])
        for row, asked in zip(kept, wanted, strict=True):
            if asked.key is not None and asked.top_p < 1:
                alone = (row > -math.inf).sum() == 1
                self.found += int(alone)
                self.lost += int(not alone)
        return [self.draw(y, wanted)[sound] for y in (full, kept)]

    def check(self, x, *wanted):
        both = self.compare(x, *wanted)
        assert torch.equal(*both), wanted


def nuclei(rows, pick, **given):
    """Rows drawn with top_p, of random keys."""
    plain = replace(Wanted(heat=1.0, top_p=0.9), **given)
    return [replace(plain, key=pick.getrandbits(60) + 1) for _ in range(rows)]


def distributions(n, pick):
    """Logits [n] of all kinds, and how much of them is product: the rest is bias."""
    spread = math.exp(pick.uniform(-4, 3))
    x = torch.randn(n) * spread
    kind = pick.randrange(7)
    if kind == 1:  # peaked
        x[torch.randint(n, (pick.choice((1, 5, 50)),))] += spread * pick.uniform(3, 20)
    elif kind == 2:  # many alike
        x = (x * 2).round() / 2
    elif kind == 3:  # all alike, but for some
        x = torch.zeros(n)
        x[torch.randint(n, (pick.choice((1, 64)),))] = pick.choice((-5.0, 0.5, 40.0))
    elif kind == 4:  # as ranks' logarithms
        x = (-spread * torch.arange(1, n + 1).log())[torch.randperm(n)]
    elif kind == 5:  # copies of one another
        x[-(n // 2) :] = x[: n // 2]
    elif kind == 6:  # forbidden in part
        x[torch.randint(n, (n // 3,))] = -math.inf
    return x, pick.choice((0.0, 0.05, 0.5))


def layer_of(pick, n, k, dtype):
    bias, noise = distributions(n, pick)
    level = bias[bias.isfinite()].std().item() + 0.1
    return Rows(Layer((torch.randn(n, k) * (noise * level / math.sqrt(k))).to(dtype), bias=bias))


def search(seeds, dtype):
    """Rows of all that is drawn with top_p, some beside others."""
    found = lost = 0
    for seed in seeds:
        pick = random.Random(seed)
        torch.manual_seed(seed)
        rows = layer_of(pick, pick.choice((1024, 2049, 3000)), 64, dtype)
        for _ in range(6):
            wanted = []
            for _ in range(pick.randint(1, NUCLEUS_ROWS)):
                heat = min(50.0, max(0.02, math.exp(pick.gauss(0, 1.5))))
                min_p = pick.choice((0.0, 0.0, 1e-13, 0.03, 0.8))
                (row,) = nuclei(1, pick, heat=heat, top_p=pick.choice(SHARES), min_p=min_p)
                others = (row, row, row, Wanted(), Wanted(5, heat), replace(row, top_p=1.0))
                wanted.append(pick.choice(others))
            x = torch.randn(len(wanted), 64)
            if pick.random() < 0.1:
                x[pick.randrange(len(x)), 5] = math.nan
            rows.check(x.to(dtype), *wanted)
        found, lost = found + rows.found, lost + rows.lost
    return found, lost


@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_are_those_of_all_logits(level, dtype):
    found, lost = search(range(20), dtype)
    assert found > 50
    assert lost > 50


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_are_those_of_all_logits_in_many_worlds(level, dtype):
    found, lost = search(range(100, 500), dtype)
    assert found > 1000
    assert lost > 1000


def peaked(n=6016, k=128):
    """A layer whose logits of a random x have a few that stand out, and such rows."""
    w = torch.randn(n, k) * 2 / math.sqrt(k)

    def some(rows):
        x = torch.randn(rows, k)
        for row in x:
            own = w[torch.randint(n, (20,))]
            goal = 14 - 2 * torch.arange(1, 21).log()
            row += torch.linalg.lstsq(own, (goal - own @ row)[:, None]).solution[:, 0]
        return x

    return Rows(Layer(w)), some


def test_a_peaked_row_takes_few_panels_and_is_left_with_its_token(level):
    rows, some = peaked()
    for seed in range(20):
        rows.check(some(2), *nuclei(2, random.Random(seed), heat=0.7))
    assert rows.found > 30
    assert sum(rows.shares) < 10


def test_another_share_gives_other_tokens(level):
    """Draws come near the edge: not to be found by looking at a wrong share."""
    rows, some = peaked()
    differ = 0
    for seed in range(60):
        x, wanted = some(2), nuclei(2, random.Random(seed), top_p=0.7)
        rows.check(x, *wanted)
        rows.layer.screen._patience = Patience()
        with_less = rows.layer.keeping(x, *(replace(row, top_p=0.4) for row in wanted))
        differ += not torch.equal(rows.draw(with_less, wanted), rows.draw(rows.layer(x), wanted))
    assert differ > 3


def test_the_bounds_matter(level):
    """Scales that are a little too small bound too little, and other tokens come of it."""
    wrong = 0
    for seed in range(40):
        torch.manual_seed(seed)
        rows = Rows(Layer(torch.randn(4096, 64)))
        x, wanted = torch.randn(1, 64) * 0.4, nuclei(1, random.Random(seed), top_p=0.5)
        rows.check(x, *wanted)
        rows.layer.screen._keep[1].mul_(0.5)
        wrong += not torch.equal(*rows.compare(x, *wanted))
    assert wrong > 3


@pytest.mark.parametrize("top_p", SHARES)
def test_all_that_are_tied_at_an_edge_stay(level, top_p):
    """One of few stands out, and 64 that are equal share what is left of the nucleus."""
    bias = torch.full((2048,), -20.0)
    bias[7], bias[1000:1064] = 4.0, 1.0
    rows = Rows(Layer(torch.zeros(2048, 64), bias=bias))
    tokens = set()
    for seed in range(200):
        wanted = nuclei(1, random.Random(seed), top_p=top_p)
        found, _ = both = rows.compare(torch.ones(1, 64), *wanted)
        assert torch.equal(*both)
        tokens |= set(found.tolist())
    assert (len(tokens) > 40) == (top_p > 0.46)
    assert rows.found


def test_how_many_threads_look_decides_nothing(level):
    before = native.threads()
    rows, some = peaked()
    try:
        for seed in range(10):
            x, wanted = some(4), nuclei(4, random.Random(seed), heat=1.2)
            found = []
            for count in (1, 3, 8):
                native.set_threads(count)
                rows.layer.screen._patience = Patience()
                found.append(rows.layer.keeping(x, *wanted))
            assert torch.equal(found[0], found[1])
            assert torch.equal(found[0], found[2])
    finally:
        native.set_threads(before)


def test_flat_rows_are_tried_less_and_less(level):
    layer, x = Layer(torch.randn(4096, 64) * 0.01), torch.randn(1, 64)
    tried = 0
    for seed in range(400):
        layer.screen._struct.computed = -2
        kept = layer.keeping(x, *nuclei(1, random.Random(seed)))
        tried += layer.screen._struct.computed != -2
        assert kept.isfinite().all() or (kept > -math.inf).sum() == 1
    assert 6 < tried < 16
    peak = torch.zeros(1, 64)
    assert layer.keeping(peak, Wanted()).isfinite().all()  # of no use, and counts for nothing


def test_patience_comes_back_with_what_pays():
    patience = Patience()
    for _ in range(8):
        patience.learn(-0.5)
    waits = [patience.tries() for _ in range(64)]
    assert waits == [False] * 63 + [True]
    patience.learn(0.3)
    assert not patience.tries()
    for _ in range(3):
        patience.learn(0.3)
    assert patience.tries()
    for saved in (0.3, 0.3, 0.3, -0.6) * 3:  # on the whole it pays
        patience.learn(saved)
        assert patience.tries()
