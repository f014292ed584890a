import math
from collections import Counter

import pytest

from fader_server.bench.popularity import Draw, Popularity, parse_popularity, zipf_weights
from fader_server.bench.prompts import PromptSource
from fader_server.errors import ConfigInvalid

ADAPTERS = tuple(f"a{n}" for n in range(16))


def drawn(kind: str, *, requests: int = 400, seed: int = 0, adapters=ADAPTERS) -> list[str]:
    draw = Draw(
        parse_popularity(kind),
        base="base",
        adapters=adapters,
        requests=requests,
        concurrency=8,
        seed=seed,
    )
    return [draw.model(number, number % 8) for number in range(requests)]


def slope(weights: list[float]) -> float:
    """Least-squares slope of log weight over log rank."""
    x = [math.log(rank) for rank in range(1, len(weights) + 1)]
    y = [math.log(weight) for weight in weights]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / sum((a - mx) ** 2 for a in x)


def test_base_asks_only_the_base_and_identical_only_the_first_adapter():
    assert set(drawn("base")) == {"base"}
    assert set(drawn("identical")) == {"a0"}


def test_distinct_gives_every_lane_an_adapter_of_its_own():
    names = drawn("distinct")
    for start in range(0, 400, 8):
        assert len(set(names[start : start + 8])) == 8
    assert len(set(drawn("uniform")[:8])) < 8  # control: chance does not


def test_distinct_needs_an_adapter_per_request_in_flight():
    with pytest.raises(ConfigInvalid, match="concurrency 8, adapters 7"):
        drawn("distinct", adapters=ADAPTERS[:7])


@pytest.mark.parametrize("s", [0.5, 1.0, 1.5])
def test_zipf_weights_have_the_asked_slope(s):
    weights = zipf_weights(50, s)
    assert sum(weights) == pytest.approx(1)
    assert slope(weights) == pytest.approx(-s)


def test_zipf_draws_follow_the_slope_and_uniform_does_not():
    def seen(kind: str) -> list[float]:
        counts = Counter(drawn(kind, requests=20_000))
        return [counts[name] for name in ADAPTERS]

    assert slope(seen("zipf:1.0")) == pytest.approx(-1.0, abs=0.07)
    assert slope(seen("uniform")) == pytest.approx(0.0, abs=0.07)


def test_draws_repeat_for_a_seed_and_differ_for_another():
    assert drawn("zipf", seed=3) == drawn("zipf", seed=3)
    assert drawn("zipf", seed=3) != drawn("zipf", seed=4)


@pytest.mark.parametrize("text", ["", "sometimes", "uniform:2", "zipf:x", "zipf:-1", "zipf:nan"])
def test_unknown_popularity_is_refused(text):
    with pytest.raises(ConfigInvalid):
        parse_popularity(text)


def test_popularity_reads_what_it_writes():
    for popularity in (Popularity("zipf", 1.25), Popularity("distinct")):
        assert parse_popularity(str(popularity)) == popularity


def test_adapters_are_needed_for_anything_but_the_base():
    with pytest.raises(ConfigInvalid, match="needs --adapters"):
        drawn("uniform", adapters=())


def test_prompts_are_exact_new_and_inside_the_vocabulary():
    source = PromptSource(range(50), length=7, key="k")
    prompts = source.many(500)
    assert {len(prompt) for prompt in prompts} == {7}
    assert len(set(prompts)) == 500
    assert {token for prompt in prompts for token in prompt} == set(range(50))


def test_prompts_repeat_for_a_key_and_differ_for_another():
    def first(key: str) -> tuple[int, ...]:
        return PromptSource(range(1000), length=16, key=key).take()

    assert first("0:a") == first("0:a")
    assert first("0:a") != first("0:b")


def test_prompts_that_run_out_are_an_error_and_not_a_repeat():
    source = PromptSource(range(2), length=1, key="k")
    source.many(2)
    with pytest.raises(ConfigInvalid, match="no new prompt"):
        source.take()
