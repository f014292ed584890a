"""`fader bench merge` against a pretend server under a fake clock."""

import asyncio
import json
from dataclasses import dataclass, field, replace

import pytest

from fader_server.bench.merge import run
from fader_server.bench.merge_cli import as_json
from fader_server.bench.merge_result import Options, Result
from fader_server.errors import ConfigInvalid
from tests.server.bench.bench_fake import FakeServer, FakeTransport

REPORT = {"overall": {"relative_error": 0.9}, "linears": [{"path": "x"}], "probe": {"kl": 0.01}}


@dataclass
class FakeMergeServer(FakeServer):
    """A lane is made while POLLS answers are read; `slow` stretches tokens meanwhile."""

    merged: str = ""
    making: str = ""
    polls: int = 0
    slow: float = 1.0
    lane_gap: float = 0.01
    refuse: int = 0
    traitor: str = ""
    """Answers otherwise while there is a lane."""
    log: list[str] = field(default_factory=list)

    def answer(self, path, body):
        if path == "/v1/merge":
            return self._merge(body)
        if path == "/v1/completions":
            model = body["model"]
            kept = self.gap
            self.gap = self.lane_gap if model == self.merged else kept
            self.gap *= self.slow if self.making else 1.0
            answered = super().answer(path, body)
            self.gap = kept
            if self.traitor == model and self.merged:
                return answered[0], [(d, p.replace(b" a1", b" zz")) for d, p in answered[1]]
            self.log.append(f"{model}{'+lane' if self.merged else ''}")
            return answered
        return super().answer(path, body)

    def _merge(self, body):
        if self.refuse:
            return self.refuse, [(0, b'{"error": {"code": "merge_no_memory"}}')]
        status = 200
        if body is not None:  # POST
            self.making, self.polls, status = body["adapters"][0]["name"], 60, 202
            assert body["force"] is True
        elif self.making:
            self.polls -= 1
            if not self.polls:
                self.merged, self.making = self.making, ""
        state = "merging" if self.making else "ready"
        lane = {"seconds": 1.5, "bytes": 4096, "report": REPORT} if self.merged else None
        told = {"state": state, "lane": None if self.making else lane}
        return status, [(0, json.dumps(told).encode())]


class Transport(FakeTransport):
    """DELETE drops the lane."""

    async def handle_async_request(self, request):
        server = self.server
        assert isinstance(server, FakeMergeServer)
        if request.method == "DELETE":
            server.merged = ""
            server.making = ""
        return await super().handle_async_request(request)


def options(**changes) -> Options:
    made = Options(
        url="http://fake",
        requests=3,
        prompt_tokens=8,
        output_tokens=6,
        repeats=2,
        steady_seconds=0.5,
    )
    return replace(made, **changes)


async def run_fake(server: FakeMergeServer, chosen: Options | None = None) -> Result:
    transport = Transport(server)

    async def sleep(seconds: float) -> None:
        """Others go on meanwhile; when nothing does, time passes all the same."""
        until = transport.clock.now + seconds
        for _ in range(400):
            await asyncio.sleep(0)
            if transport.clock.now >= until:
                return
        transport.clock.now = max(until, transport.clock.now)

    return await run(chosen or options(), transport=transport, clock=transport.clock, sleep=sleep)


async def test_ratios_are_those_of_the_known_delays():
    result = await run_fake(FakeMergeServer(gap=0.01, lane_gap=0.02, slow=3.0))
    assert result.faults == []
    ratios = result.ratios()
    assert ratios["merged_tpot"].median == pytest.approx(2.0)
    assert ratios["delta_tpot"].median == pytest.approx(1.0)
    assert ratios["merging_p99"].median > 2.0
    assert {merge.busy for merge in result.merges} == {True, False}
    assert result.merges[0].seconds == 1.5
    assert "linears" not in result.report


async def test_rounds_go_forwards_and_backwards_and_the_lane_is_gone_at_the_end():
    server = FakeMergeServer()
    result = await run_fake(server)
    assert [list(found) for found in result.rounds] == [
        ["base", "merged", "delta beside", "delta alone"],
        ["delta alone", "delta beside", "merged", "base"],
    ]
    assert server.merged == ""
    assert {"base+lane", "a0+lane", "a1+lane", "a1"} <= set(server.log)
    assert "a0" not in server.log, "the merged adapter is only asked in its lane"


async def test_a_neighbour_that_answers_otherwise_beside_the_lane_is_a_fault():
    result = await run_fake(FakeMergeServer(traitor="a1"))
    assert result.faults == ["a1 answers otherwise beside the lane"]
    document = as_json(options(), result)
    assert document["ok"] is False
    assert "ratios" not in document


@pytest.mark.parametrize("defect", ["http", "short", "no_done", "error"])
async def test_a_failed_request_leaves_no_figures(defect):
    result = await run_fake(FakeMergeServer(defect=defect, bad_model="a0"))
    assert not result.ok
    assert result.faults[0].startswith("a0: ")


async def test_a_server_that_refuses_to_merge_is_told():
    with pytest.raises(ConfigInvalid, match="DELETE /v1/merge answered 507"):
        await run_fake(FakeMergeServer(refuse=507))


@pytest.mark.parametrize(
    "changes", [{"requests": 0}, {"output_tokens": 1}, {"repeats": 0}, {"busy_merges": -1}]
)
def test_what_is_no_benchmark_is_refused(changes):
    with pytest.raises(ConfigInvalid):
        options(**changes)


async def test_the_document_has_the_bars_and_no_key():
    result = await run_fake(FakeMergeServer())
    chosen = options(api_key="secret-key")
    document = as_json(chosen, result)
    assert document["ok"] is True
    assert document["bars"]["merged_tpot"] == 1.01
    assert set(document["ratios"]) == {"merged_tpot", "delta_tpot", "merging_p99", "merging_p50"}
    assert "secret-key" not in json.dumps(document)


@pytest.mark.parametrize("wanted", [0, 1, 3])
async def test_as_many_rounds_as_asked_for_end_with_a_merge_under_streams(wanted):
    result = await run_fake(FakeMergeServer(), options(repeats=3, busy_merges=wanted))
    assert result.ok
    assert len(result.rounds) == 3
    assert sum(merge.busy for merge in result.merges) == len(result.gaps) == wanted
    assert ("merging_p99" in result.ratios()) == bool(wanted)
    assert "merged_tpot" in result.ratios()


async def test_an_idle_run_only_merges():
    server = FakeMergeServer()
    result = await run_fake(server, options(idle=True))
    assert result.ok
    assert [merge.busy for merge in result.merges] == [False]
    assert result.ratios() == {}
    assert "a0+lane" not in server.log
    document = as_json(options(idle=True), result)
    assert document["merges"][0]["seconds"] == 1.5
