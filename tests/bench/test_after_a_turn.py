"""Calls after a turn of the base: what is found is told, and a wrong answer ends the program."""

import json
import sys

import pytest

from bench import after_a_turn
from bench.make_model import DTYPES, PRESETS, write_all
from fader_server.engine import blocks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny")
    kind = DTYPES["fp32"]
    write_all(out, PRESETS["tiny"], adapters=1, seed=0, dtype=kind, adapter_dtype=kind)
    return out


def run(model, monkeypatch, *arguments: str) -> None:
    words = ["after_a_turn", str(model), "--history", "200", "--rounds", "2", *arguments]
    monkeypatch.setattr(sys, "argv", words)
    after_a_turn.main()


def test_what_is_found_and_how_long_it_took_is_told(model, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    run(model, monkeypatch, "--json", str(out))
    told = json.loads(out.read_text())
    assert told["cached"] == {"base": [224], "ordinary": [0], "activated": [224]}
    assert told["prompt"] == 200 + 32 + 4 + 12
    assert all(0 < one["low"] <= one["high"] for one in told["first_token_ms"].values())
    assert "activated" in capsys.readouterr().out


def test_an_answer_that_another_history_changed_ends_it(model, monkeypatch):
    monkeypatch.setattr(blocks, "turn", lambda phase, at: b"")
    with pytest.raises(SystemExit, match="another than alone"):
        run(model, monkeypatch)
