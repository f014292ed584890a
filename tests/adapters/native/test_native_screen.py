"""Screened output layers: what is left out is smaller, what is kept has its bits, and draws from
the largest come out alike; on every instruction set."""

import math

import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native.screen import ROWS, Wanted
from tests.adapters.native.native_sites import make, plan_of

FLOATS = [torch.float32, torch.bfloat16]


def weights(n, k, dtype):
    """Rows of very different sizes, and rows that differ from each other by next to nothing."""
    w = torch.randn(n, k) * torch.rand(n, 1).mul(3).exp()
    w[n // 2 : n // 2 + n // 4] = w[:1].mul(4) * (1 + 1e-3 * torch.randn(n // 4, k))
    return w.to(dtype)


def inputs(rows, k, dtype):
    """With outliers, as the last norm of trained models leaves them."""
    x = torch.randn(rows, k)
    x[:, torch.randint(k, (3,))] *= 40
    return x.to(dtype)


class Layer:
    """An output layer, screened and not."""

    def __init__(self, w, bias=None, tables=None):
        panels = native.PlainPanels.pack(w)
        screen = native.Screen.of(panels)
        assert screen is not None
        self.screen, self.n = screen, len(w)
        self.site = native.Site(panels, tables, bias=bias)
        self.site.leave_out(screen)

    def __call__(self, x, plan=None):
        return self.site(x, plan, out=torch.full((len(x), self.n), math.nan))

    def keeping(self, x, *wanted, plan=None):
        """wanted: of each row, or one for all."""
        rows = wanted if len(wanted) > 1 else wanted * len(x)
        with self.screen.keeping(rows):
            return self(x, plan)


def left_out(full, kept, count):
    """Checks what `kept` has of `full` and returns the share that it has not."""
    out = kept == -math.inf
    assert torch.equal(kept[~out], full[~out])
    least = full.topk(count).values[:, -1:]
    assert (full.masked_fill(~out, -math.inf) < least).all()
    return out.float().mean().item()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [64, 896])
@pytest.mark.parametrize("count", [1, 20])
def test_what_is_left_out_is_smaller_and_the_rest_has_its_bits(level, dtype, k, count):
    layer = Layer(weights(3001, k, dtype), bias=torch.randn(3001))
    shares = []
    for rows in range(1, ROWS + 1):
        x = inputs(rows, k, dtype)
        shares.append(left_out(layer(x), layer.keeping(x, Wanted(count)), count))
    assert shares[0] > 0.3  # it does leave out, and more with fewer rows
    assert layer.keeping(inputs(ROWS + 1, k, dtype), Wanted(count)).isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_alone_would_choose_another(level, dtype):
    """The bounds matter: among nearly equal rows the largest by its codes is often not the
    largest."""
    w = (torch.randn(1, 256) * (1 + 2e-2 * torch.randn(2048, 256))).to(dtype)
    layer = Layer(w)
    codes, scales = layer.screen._keep
    code = codes.view(64, 128, 32, 2).permute(0, 2, 1, 3).reshape(2048, 256).float()
    rough = code * scales.view(64, 4, 32).permute(0, 2, 1).reshape(2048, 4).repeat_interleave(64, 1)
    wrong = 0
    for _ in range(40):
        x = torch.randn(1, 256).to(dtype)
        full, kept = layer(x), layer.keeping(x, Wanted())
        left_out(full, kept, 1)
        wrong += (x.float() @ rough.T).argmax().item() != full.argmax().item()
    assert wrong > 3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("heat", [0.05, 0.6, 2.0])
def test_draws_from_the_largest_are_those_from_all(level, dtype, heat):
    layer, scratch = Layer(torch.randn(6016, 128).to(dtype)), native.Workspace()
    rows, left = 2, 0.0
    for top_k, top_p in ((5, 1.0), (20, 0.95), (128, 0.5)):
        draws = native.Draws(
            heat=torch.full((rows,), heat),
            top_k=torch.full((rows,), top_k),
            top_p=torch.full((rows,), top_p, dtype=torch.float64),
            min_p=torch.zeros(rows, dtype=torch.float64),
            key=torch.randint(2**62, (rows,)),
        )
        for seed in range(20):
            torch.manual_seed(seed)
            x = (torch.randn(rows, 128) * 0.2 * heat).to(dtype)
            full, kept = layer(x), layer.keeping(x, Wanted(top_k, heat))
            left += left_out(full, kept, top_k)
            found = [native.draw(y, draws, scratch=scratch) for y in (full, kept)]
            assert torch.equal(*found)
    assert left > 1


def raced(rows):
    """The draws of rows that want a race."""
    return native.Draws(
        heat=torch.tensor([row.heat for row in rows]),
        top_k=torch.zeros(len(rows), dtype=torch.int64),
        top_p=torch.tensor([row.top_p for row in rows], dtype=torch.float64),
        min_p=torch.tensor([row.min_p for row in rows], dtype=torch.float64),
        key=torch.tensor([row.key for row in rows]),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("min_p", [0.0, 1e-13, 0.05, 0.9])
@pytest.mark.parametrize("spread", [0.03, 1.0, 30.0])
def test_whoever_wins_a_race_among_all_is_kept(level, dtype, min_p, spread):
    layer, scratch, left, greedy = Layer(torch.randn(6017, 128).to(dtype)), native.Workspace(), 0, 0
    for seed in range(24):
        torch.manual_seed(seed)
        heats = (torch.randn(1 + seed % ROWS) * 1.5).exp().clamp(0.02, 50).tolist()
        keys = torch.randint(-(2**63), 2**63 - 1, (len(heats),)).tolist()
        rows = [Wanted(heat=h, key=key, min_p=min_p) for h, key in zip(heats, keys, strict=True)]
        x = (torch.randn(len(rows), 128) * 0.1 * spread).to(dtype)
        full, kept = layer(x), layer.keeping(x, *rows)
        found = native.draw(full, raced(rows), scratch=scratch)
        assert torch.equal(native.draw(kept, raced(rows), scratch=scratch), found)
        largest = full.amax(-1, keepdim=True)
        assert torch.equal(kept.amax(-1, keepdim=True), largest)
        left += (kept == -math.inf).float().mean().item()
        others = layer.keeping(x, Wanted())
        greedy += (native.draw(others, raced(rows), scratch=scratch) != found).sum().item()
    assert left > 4
    if min_p == 0 or (min_p < 0.9 and spread <= 1):
        assert greedy > 10  # the largest alone would not do


def test_rows_that_want_this_and_that_are_kept_apart(level):
    layer, scratch = Layer(torch.randn(6016, 128)), native.Workspace()
    wanted = (
        Wanted(),
        Wanted(heat=0.7, key=3),
        Wanted(9, 1.3),
        Wanted(heat=5.0, key=-4, min_p=0.1),
    )
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(4, 128) * 0.2
        full, kept = layer(x), layer.keeping(x, *wanted)
        left_out(full[:1], kept[:1], 1)
        left_out(full[2:3], kept[2:3], 9)
        races, own = [wanted[1], wanted[3]], torch.tensor([1, 3])
        found = [native.draw(y[own], raced(races), scratch=scratch) for y in (full, kept)]
        assert torch.equal(*found)
        assert kept.isinf().any()
        assert layer.keeping(x, *wanted[:3]).isfinite().all()  # which is whose, nobody knows
        assert layer.keeping(x, *wanted, Wanted()).isfinite().all()


def test_tokens_that_weigh_alike_are_kept_where_they_are_drawn_from(level):
    """Far below the largest different logits have one weight, and all tied at an edge stay."""
    w = torch.zeros(2048, 64)
    w[:, 0] = -28.0 - torch.linspace(0, 0.5, 2048)
    w[7, 0] = 0.0
    layer, x = Layer(w), torch.eye(64)[:1]
    assert layer.keeping(x, Wanted()).isinf().any()
    assert torch.equal(layer.keeping(x, Wanted(2, 1.0)), layer(x))
    hot = layer.keeping(x, Wanted(2, 100.0))
    assert hot.isinf().any()  # there they weigh enough to be told apart


def test_an_end_that_is_no_whole_panel_is_bounded_like_others(level):
    """The likeliest token stands there: what the others weigh depends on it."""
    w = torch.zeros(2049, 64)
    w[:, 0] = torch.linspace(-30.47, -29.83, 2049)
    w[2048, 0] = 0.0
    layer, x = Layer(w), torch.eye(64)[:1]
    assert torch.equal(layer.keeping(x, Wanted(2, 1.0)), layer(x))
    assert layer.keeping(x, Wanted()).isinf().sum() > 1000
    assert layer.keeping(x, Wanted())[0, 2048] == 0.0


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_bias_that_is_not_finite_hides_nobody(level, bad):
    for seed in range(20):
        torch.manual_seed(seed)
        w, x, bias = torch.randn(2048, 64), torch.randn(1, 64), torch.zeros(2048)
        best = (x @ w.T).argmax().item()
        bias[best ^ 16] = bad  # of the same panel
        layer = Layer(w, bias=bias)
        both = (layer(x), layer.keeping(x, Wanted()))
        found = [native.largest(y, scratch=native.Workspace()) for y in both]
        if bad == -math.inf:
            assert found[0][1].item() == best
        assert torch.equal(found[0][0].isfinite(), found[1][0].isfinite())
        assert torch.equal(found[0][1], found[1][1]) or not found[0][0].isfinite()


def test_an_overflow_is_not_left_out(level):
    w = torch.zeros(2048, 64)
    w[0, :4] = torch.tensor([3e38, 3e38, -3e38, -3e38])
    w[1280, :4] = 1e37
    x = torch.zeros(1, 64)
    x[0, :4] = 2
    layer = Layer(w)
    for y in (layer(x), layer.keeping(x, Wanted())):
        assert not native.largest(y, scratch=native.Workspace())[0].isfinite()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e4, 1e18, 1e37])
def test_sizes_at_the_ends_of_floats_are_bounded_too(level, dtype, size):
    layer = Layer((torch.randn(1024, 128) * 10).to(dtype))
    x = (torch.randn(4, 128) * size).to(dtype)
    full, kept = layer(x), layer.keeping(x, Wanted())
    sound = full.isfinite().all(-1)
    left_out(full[sound], kept[sound], 1)
    best = [native.largest(y, scratch=native.Workspace())[0] for y in (full, kept)]
    assert torch.equal(best[0].isfinite(), best[1].isfinite())
    small = Layer((torch.randn(1024, 128) * size).to(dtype)) if size < 1 else layer
    x = torch.randn(4, 128).to(dtype)
    left_out(small(x), small.keeping(x, Wanted()), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_computed_in_full(level, bad):
    layer = Layer(torch.randn(1024, 64))
    x = torch.randn(3, 64)
    x[1, 5] = bad
    full, kept = layer(x), layer.keeping(x, Wanted())
    assert torch.equal(kept[[0, 2]], full[[0, 2]])
    assert torch.equal(kept[1].isfinite(), full[1].isfinite())
    assert not kept[1].isfinite().all()
    w = torch.randn(64, 64)
    w[3, 60] = bad
    assert native.Screen.of(native.PlainPanels.pack(w)) is None


def test_rows_with_deltas_are_computed_in_full(level):
    case = make([8, 8], [2048], 64, torch.float32, skip={(1, 0)})
    layer, x = Layer(torch.randn(2048, 64), tables=case.tables), torch.randn(2, 64)
    touching = plan_of([[(0, 1.0)], []], [1, 1], slots=2)
    beside = plan_of([[(1, 1.0)], []], [1, 1], slots=2)
    assert torch.equal(layer.keeping(x, Wanted(), plan=touching), layer(x, touching))
    assert layer.keeping(x, Wanted(), plan=beside).isinf().any()
