import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fader_server.bench.cli import bench_app
from fader_server.bench.client import BenchClient
from fader_server.bench.machine import safe_command
from tests.server.bench.bench_fake import FakeServer, over_http

SMALL = ["--requests", "8", "--prompt-tokens", "4", "--output-tokens", "3", "--warmup", "2"]


def invoke(url: str, *words: str):
    return CliRunner().invoke(bench_app, ["serve", "--url", url, *SMALL, *words])


def test_good_run_prints_figures_and_writes_json(tmp_path):
    target = tmp_path / "run.json"
    server = FakeServer(first=0.02, gap=0.005)
    words = ["--adapters", "all", "--compare", "base,distinct", "--concurrency", "4"]
    with over_http(server) as url:
        result = invoke(url, *words, "--repeat", "2", "--json", str(target))
    assert result.exit_code == 0, result.output
    assert "parity: 5 model(s)" in result.output
    assert "output tokens/s" in result.output
    assert "distinct / base" in result.output
    document = json.loads(target.read_text())
    assert document["ok"]
    assert set(document["scenarios"]) == {"base", "distinct"}
    assert document["scenarios"]["base"]["across_repeats"]["ttft_ms_p50"]["low"] >= 20
    assert document["scenarios"]["base"]["across_repeats"]["tpot_ms_p50"]["low"] >= 5
    assert "output_tokens_per_s" in document["ratios"]["distinct/base"]
    assert document["server"]["health"] == {"status": "ok"}
    assert document["client"]["cores"]
    assert document["options"]["seed"] == 0
    assert server.peak >= 4


def test_distinct_never_has_one_adapter_twice_in_flight():
    peaks = {}
    for kind in ("distinct", "identical"):
        server = FakeServer()
        with over_http(server) as url:
            words = ["--adapters", "all", "--popularity", kind, "--concurrency", "4"]
            # One parity question joins each adapter's load, so a lane has at most one beside it.
            assert invoke(url, *words, "--ignore-base").exit_code == 0
        peaks[kind] = server.peak_per_model
    assert peaks["distinct"] <= 2
    assert peaks["identical"] >= 4


@pytest.mark.parametrize("defect", ["http", "short", "no_done"])
def test_failing_server_ends_in_one_and_shows_no_figure(defect, tmp_path):
    target = tmp_path / "run.json"
    with over_http(FakeServer(defect=defect)) as url:
        result = invoke(url, "--json", str(target))
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "tokens/s" not in result.output
    document = json.loads(target.read_text())
    assert document["ok"] is False
    assert document["faults"]
    assert "scenarios" not in document


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rate", "1", "--concurrency", "2"], "either --concurrency"),
        (["--popularity", "weekly"], "popularity must be"),
        (["--popularity", "uniform"], "needs --adapters"),
    ],
)
def test_wrong_flags_end_in_two(words, reason):
    with over_http(FakeServer()) as url:
        result = invoke(url, *words)
    assert result.exit_code == 2
    assert reason in result.output


def test_no_server_at_all_ends_in_two():
    with over_http(FakeServer()) as url:
        pass
    result = invoke(url)
    assert result.exit_code == 2
    assert f"no server answers at {url}" in result.output
    assert "--url" in result.output


def test_an_address_with_v1_is_the_same_server():
    assert BenchClient("http://a:1/v1/", timeout=1).url == "http://a:1"
    assert BenchClient("http://a:1/v1x", timeout=1).url == "http://a:1/v1x"


def test_keys_do_not_reach_the_recorded_command():
    words = ["fader", "--api-key", "one", "--api-key=two", "--seed", "3"]
    assert safe_command(words) == ["fader", "--api-key", "***", "--api-key=***", "--seed", "3"]


def test_command_does_not_load_torch():
    code = "import sys, fader_server.bench.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
