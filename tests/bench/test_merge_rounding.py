"""The rounding measurement on one adapter of the demo."""

import json

import pytest

from bench import merge_rounding


@pytest.mark.slow
def test_keep_loses_less_than_plain_and_the_file_says_so(tmp_path, capsys):
    out = tmp_path / "rounding.json"
    assert merge_rounding.main(["--gammas", "0.3", "--adapters", "shout", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    kl = {row["lane"]: row["kl"] for row in document["rows"]}
    assert kl["bf16"] < kl["keep"] < kl["plain"]
    assert document["keep_over_plain_kl"]["0.3"] == pytest.approx(kl["keep"] / kl["plain"])
    assert "KL with keep is" in capsys.readouterr().out
