import pytest

from fader_server.bench.stats import percentile, spread, summarise


@pytest.mark.parametrize(
    ("q", "expected"), [(0, 10.0), (25, 17.5), (50, 25.0), (95, 38.5), (99, 39.7), (100, 40.0)]
)
def test_percentile_interpolates_between_ranks(q, expected):
    assert percentile([10.0, 20.0, 30.0, 40.0], q) == pytest.approx(expected, abs=1e-12)


def test_percentile_agrees_with_numpy_on_uneven_data():
    numpy = pytest.importorskip("numpy")
    values = sorted(((n * 7919) % 104729) ** 0.5 for n in range(1, 138))
    for q in (1, 50, 95, 99):
        assert percentile(values, q) == pytest.approx(float(numpy.percentile(values, q)))


def test_percentile_of_one_value_is_that_value():
    assert percentile([3.0], 99) == 3.0


def test_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 50)


def test_summary_of_a_hundred_and_one_steps_is_exact():
    summary = summarise(float(n) for n in reversed(range(101)))
    assert summary is not None
    assert (summary.count, summary.mean, summary.p50) == (101, 50.0, 50.0)
    assert (summary.p95, summary.p99, summary.low, summary.high) == (95.0, 99.0, 0.0, 100.0)


def test_summary_of_nothing_is_none():
    assert summarise([]) is None


def test_spread_is_the_median_with_both_ends():
    got = spread([5.0, 1.0, 9.0])
    assert (got.median, got.low, got.high) == (5.0, 1.0, 9.0)
