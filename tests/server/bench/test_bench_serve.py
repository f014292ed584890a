from dataclasses import replace

import pytest

from fader_server.bench.client import BenchClient, Sample
from fader_server.bench.discover import discover
from fader_server.bench.figures import across, measure, ratios
from fader_server.bench.popularity import parse_popularity
from fader_server.bench.serve import Options, Result, run
from fader_server.errors import ConfigInvalid
from tests.server.bench.bench_fake import FakeServer, FakeTransport


def options(kinds: str = "distinct", **changes) -> Options:
    scenarios = tuple(parse_popularity(kind) for kind in kinds.split(","))
    made = Options(
        url="http://fake",
        scenarios=scenarios,
        adapters=("a0", "a1"),
        requests=6,
        prompt_tokens=8,
        output_tokens=5,
        warmup=2,
    )
    return replace(made, **changes)


async def run_fake(server: FakeServer, chosen: Options) -> Result:
    transport = FakeTransport(server)
    return await run(chosen, transport=transport, clock=transport.clock)


async def test_figures_are_exactly_those_of_the_known_delays():
    result = await run_fake(FakeServer(first=0.25, gap=0.125), options("base"))
    assert result.ok
    (repeat,) = result.repeats["base"]
    assert repeat.ttft_ms.p50 == repeat.ttft_ms.p99 == 250
    assert repeat.inter_token_ms is not None
    assert repeat.inter_token_ms.count == 6 * 4
    assert repeat.inter_token_ms.p50 == repeat.inter_token_ms.p99 == 125
    assert repeat.tpot_ms is not None
    assert repeat.tpot_ms.p50 == 125
    assert repeat.latency_ms.p50 == 750
    assert repeat.output_tokens_per_s == pytest.approx(30 / (6 * 0.75))
    assert repeat.tokens_per_event == 1


async def test_tokens_that_share_an_event_are_told():
    result = await run_fake(FakeServer(per_event=5), options("base"))
    (repeat,) = result.repeats["base"]
    assert repeat.tokens_per_event == 5
    assert repeat.inter_token_ms is None


async def test_every_repeat_measures_every_scenario():
    result = await run_fake(FakeServer(), options("base,distinct,zipf:1", repeats=3))
    assert {name: len(runs) for name, runs in result.repeats.items()} == {
        "base": 3,
        "distinct": 3,
        "zipf:1": 3,
    }


async def test_rounds_alternate_their_order():
    server = FakeServer()
    chosen = options("base,identical", repeats=2, requests=1, warmup=0, ignore_base=False)
    await run_fake(server, chosen)
    assert [body["model"] for body in server.asked[-4:]] == ["base", "a0", "a0", "base"]


async def test_prompts_of_the_load_are_all_different():
    server = FakeServer()
    await run_fake(server, options("base", repeats=2))
    prompts = [tuple(body["prompt"]) for body in server.asked]
    repeated = {prompt for prompt in prompts if prompts.count(prompt) > 1}
    assert len(repeated) == 1  # the parity prompt, and nothing else
    assert {len(prompt) for prompt in prompts} == {8}


@pytest.mark.parametrize("defect", ["http", "short", "no_done", "cached", "error"])
async def test_failed_run_has_faults_and_no_figures(defect):
    result = await run_fake(FakeServer(defect=defect, bad_model="a1"), options("uniform"))
    assert not result.ok
    assert {model for model, _ in result.faults} == {"a1"}
    assert result.repeats == {}


async def test_answer_that_changes_amid_the_load_fails_parity():
    result = await run_fake(FakeServer(defect="mixes"), options())
    assert {fault.kind for _, fault in result.faults} == {"parity"}
    assert result.repeats == {}


async def test_adapters_that_answer_as_the_base_are_named():
    result = await run_fake(FakeServer(defect="same_text"), options("uniform"))
    assert sorted(result.like_base) == ["a0", "a1"]
    assert (await run_fake(FakeServer(), options("uniform"))).like_base == ()


async def test_ignored_base_is_never_asked():
    for ignore in (True, False):
        server = FakeServer()
        result = await run_fake(server, options(ignore_base=ignore))
        assert result.ok
        assert ("base" in {body["model"] for body in server.asked}) is not ignore


async def test_open_loop_measures_from_the_arrival():
    result = await run_fake(FakeServer(), options(concurrency=None, rate=1e6))
    assert result.ok
    assert result.repeats["distinct"][0].requests == 6


async def test_all_adapters_are_found_without_an_adapter_route():
    transport = FakeTransport(FakeServer())
    async with BenchClient("http://fake", timeout=5, transport=transport) as client:
        served = await discover(client, model=None, adapters=None, vocab=None)
        assert served.base == "base"
        assert served.adapters == ("a0", "a1", "a2", "a3")
        assert (served.vocabulary, served.vocabulary_source) == (range(1000), "/v1/models")
        served = await discover(client, model="a1", adapters=(), vocab=77)
        assert (served.base, served.vocabulary) == ("a1", range(77))
        with pytest.raises(ConfigInvalid, match="--vocab"):
            await discover(client, model="a1", adapters=(), vocab=None)


async def test_server_that_lists_no_models_is_the_users_to_mend():
    with pytest.raises(ConfigInvalid, match="404"):
        await run_fake(FakeServer(defect="no_models"), options())


@pytest.mark.parametrize(
    "changes",
    [
        {"rate": 2.0},
        {"concurrency": None},
        {"concurrency": None, "rate": 0.0},
        {"requests": 0},
        {"repeats": 0},
        {"ignore_base": True, "scenarios": (parse_popularity("base"),)},
        {"scenarios": (parse_popularity("base"), parse_popularity("base"))},
    ],
)
def test_options_that_are_no_benchmark_are_refused(changes):
    with pytest.raises(ConfigInvalid):
        options(**changes)


def sample(due: float, times: tuple[float, ...]) -> Sample:
    return Sample("m", due, times[-1], times, len(times))


def test_ratio_is_of_medians_and_its_spread_of_rounds():
    def repeats(*tokens_per_s: float) -> list:
        return [
            measure([sample(0.0, (1 / rate, 2 / rate))], client_cpu_s=0.0) for rate in tokens_per_s
        ]

    base, other = repeats(10, 20, 40), repeats(5, 20, 10)
    ratio = ratios(other, base)["output_tokens_per_s"]
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((0.5, 0.25, 1.0))
    figures = across(base)["output_tokens_per_s"]
    assert (figures.median, figures.low, figures.high) == pytest.approx((20, 10, 40))
