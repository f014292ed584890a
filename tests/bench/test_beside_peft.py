"""Bases beside PEFT: the benchmark compares both sides first, and prints what it timed."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import beside_peft
from fader_adapters.kernels import native
from fader_server.verification import Verified

SMALL = {
    "mixture": {
        "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hybrid": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
        "linear_num_key_heads": 32, "linear_num_value_heads": 32, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.available(), reason=native.reason() or "built"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    families = beside_peft.FAMILIES
    made = {name: replace(families[name], shape=shape) for name, shape in SMALL.items()}
    monkeypatch.setattr(beside_peft, "FAMILIES", made)
    monkeypatch.setattr(beside_peft, "ROWS", 2)
    monkeypatch.setattr(beside_peft, "ANSWER", 8)
    yield
    torch.set_num_threads(threads)
    native.set_threads(None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", list(SMALL))
def test_every_way_is_timed_and_told(family, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["beside_peft", family, "--rounds", "2", "--json", str(out)])
    beside_peft.main()
    document = json.loads(out.read_text())
    rates = document["output_tokens_per_second"]
    sides = ("fader", "packed", "peft") if family == "mixture" else ("fader", "peft")
    assert set(document["base_bytes"]) == set(sides) - {"peft"}
    if family == "mixture":
        assert document["base_bytes"]["packed"] < document["base_bytes"]["fader"]
    assert set(rates) == {
        f"{side}, {what}, {rows}"
        for side in sides for what in ("base", "adapters") for rows in (1, 2)
    }  # fmt: skip
    assert all(rate["low"] > 0 for rate in rates.values())
    assert document["parity"]["largest_logprob_difference_fp32"] < 1e-4
    assert capsys.readouterr().out.count("tokens/s") == len(rates)


def test_no_figure_where_the_sides_differ(tmp_path, monkeypatch):
    wrong = Verified((), threshold=-1.0, dtype="float32")
    monkeypatch.setattr(Verified, "ok", property(lambda self: self.threshold > 0))
    monkeypatch.setattr(beside_peft, "verify", lambda *args, **kwargs: wrong)
    with pytest.raises(SystemExit, match="nothing to compare"):
        beside_peft.check(tmp_path, {})
