"""`fader bench swap` and `scale` against a pretend server with known delays and planted faults."""

import json

import pytest
from typer.testing import CliRunner

from fader_server.bench.growth import Growth, GrowthOptions, run_growth
from fader_server.bench.scale import ScaleOptions, ScaleResult, run_scale
from fader_server.bench.swap import SwapOptions, SwapResult, run_swap
from fader_server.cli import app as cli
from fader_server.errors import ConfigInvalid
from tests.server.bench.bench_fake import FakeServer, FakeTransport, over_http


async def swap(server: FakeServer, sources: tuple[str, ...] = ("one", "two")) -> SwapResult:
    transport = FakeTransport(server)
    options = SwapOptions(url="http://fake", sources=sources, streams=2, rounds=2, output_tokens=12)
    return await run_swap(options, transport=transport, clock=transport.clock)


async def test_gaps_are_taken_while_all_streams_run_and_the_name_is_swapped_meanwhile():
    server = FakeServer(first=0.25, gap=0.125)
    result = await swap(server)
    assert result.ok
    assert result.pooled is not None
    assert len(result.rounds) == 2
    quiet, swapping = result.rounds[0]
    assert quiet.loads is None
    assert swapping.loads is not None
    assert swapping.loads.count > 1
    assert result.adapter is not None
    assert (result.adapter.rank, result.adapter.bytes) == (16, 8)
    assert result.p99_ratio >= 1
    assert result.worst_gap >= 1
    assert server.loads >= 5


@pytest.mark.parametrize(
    ("defect", "model"),
    [("stale", None), ("disturbed", "base"), ("http", None), ("short", None), ("error", "base")],
)
async def test_a_server_that_answers_wrongly_gets_no_figure(defect, model):
    result = await swap(FakeServer(defect=defect, bad_model=model))
    assert not result.ok
    assert result.pooled is None


async def test_sources_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigInvalid, match="alike"):
        await swap(FakeServer(defect="same_text"))


async def test_what_the_user_can_mend_is_told():
    with pytest.raises(ConfigInvalid, match="answered 403"):
        await swap(FakeServer(defect="no_loads"))
    with pytest.raises(ConfigInvalid, match="two sources"):
        await swap(FakeServer(), ("one", "one"))


async def scale(server: FakeServer) -> ScaleResult:
    transport = FakeTransport(server)
    options = ScaleOptions(
        url="http://fake",
        names=tuple(f"a{n}" for n in range(12)),
        sources=("one", "two"),
        concurrency=2,
        requests=6,
        repeats=1,
        prompt_tokens=8,
        output_tokens=4,
    )
    return await run_scale(options, transport=transport, clock=transport.clock)


async def test_many_adapters_are_compared_with_one_and_first_tokens_told_by_tier():
    result = await scale(FakeServer(first=0.25, gap=0.125, lists=True))
    assert result.known == 12
    assert set(result.first_token) == {"disk", "host"}
    assert result.first_token["disk"].p50 == pytest.approx(250)
    assert set(result.puts) == {"disk", "host"}
    assert result.puts["disk"].put.p50 == pytest.approx(20)
    assert result.puts["host"].to_first_token.p50 == pytest.approx(270)
    assert result.rank == 16
    assert result.lookup.p50 == result.lookup_few.p50 == pytest.approx(1)
    assert result.tiers == {"disk": 10, "host": 2}
    assert result.throughput is not None
    assert 0.5 < result.throughput < 2


async def test_a_load_with_a_fault_gives_no_throughput():
    result = await scale(FakeServer(defect="mixes", bad_model="a0", lists=True))
    assert result.throughput is None


async def grow(server: FakeServer, count: int = 120) -> Growth:
    transport = FakeTransport(server)
    options = GrowthOptions(url="http://fake", sources=tuple(f"many/a{n}" for n in range(count)))
    return await run_growth(options, transport=transport, clock=transport.clock)


async def test_the_cost_of_one_more_is_told_by_the_number_there_are():
    flat = await grow(server := FakeServer())
    assert [point.registered for point in flat.points] == [10, 100, 120]
    assert (flat.register, flat.lookup) == pytest.approx((1, 1))
    assert server.loads == 120
    assert not server.loaded, "what was registered is unloaded again"
    slow = await grow(FakeServer(defect="grows"))
    assert slow.register > 5
    assert slow.lookup > 5


async def test_growth_is_cleared_up_and_told_when_a_load_is_refused():
    server = FakeServer(defect="no_loads")
    with pytest.raises(ConfigInvalid, match="answered 403"):
        await grow(server)
    with pytest.raises(ConfigInvalid, match="ten adapters"):
        await grow(server, 9)


def test_the_command_line_of_growth(tmp_path):
    for n in range(12):
        (tmp_path / "many" / f"a{n}").mkdir(parents=True)
    target, many = tmp_path / "out.json", str(tmp_path / "many")
    with over_http(FakeServer()) as url:
        words = ["bench", "scale", "--url", url, "--register", many, "--json", str(target)]
        result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    growth = json.loads(target.read_text())["growth"]
    assert [point["registered"] for point in growth["points"]] == [10, 12]
    for words in ([], ["--names", many], ["--register", many + "x"]):
        assert CliRunner().invoke(cli, ["bench", "scale", *words]).exit_code == 2
