"""The mixture's benchmark: it compares both sides first, and prints what it timed."""

import json
import sys

import pytest
import torch

from bench import mixture
from fader_adapters.kernels import native
from fader_server.verification import Verified

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 4,
    "num_experts_per_tok": 2,
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.available(), reason=native.reason() or "built"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(mixture, "SHAPE", SMALL)
    monkeypatch.setattr(mixture, "ROWS", 2)
    monkeypatch.setattr(mixture, "ANSWER", 8)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
def test_every_way_is_timed_and_told(tmp_path, monkeypatch, capsys):
    out = tmp_path / "mixture.json"
    monkeypatch.setattr(sys, "argv", ["mixture", "--rounds", "2", "--json", str(out)])
    mixture.main()
    document = json.loads(out.read_text())
    rates = document["output_tokens_per_second"]
    assert set(rates) == {
        f"{side}, {what}, {rows}"
        for side in ("fader", "peft") for what in ("base", "adapters") for rows in (1, 2)
    }  # fmt: skip
    assert all(rate["low"] > 0 for rate in rates.values())
    assert document["parity"]["largest_logprob_difference_fp32"] < 1e-4
    assert capsys.readouterr().out.count("tokens/s") == len(rates)


def test_no_figure_where_the_sides_differ(tmp_path, monkeypatch):
    wrong = Verified((), threshold=-1.0, dtype="float32")
    monkeypatch.setattr(Verified, "ok", property(lambda self: self.threshold > 0))
    monkeypatch.setattr(mixture, "verify", lambda *args, **kwargs: wrong)
    with pytest.raises(SystemExit, match="nothing to compare"):
        mixture.check(tmp_path, {})
