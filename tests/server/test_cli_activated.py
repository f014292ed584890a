"""`fader inspect` and `fader verify` of an activated adapter: what they say, and that verify can
say no."""

import json
from pathlib import Path

import pytest
import torch

from fader_server import demo, phases
from fader_server.cli import main
from fader_server.errors import ConfigInvalid
from fader_server.peft_side import PeftSide
from fader_server.verification import invoked
from tests.support.activated import activate
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import write_adapter

BASE = demo.base_dir()
ANSWER = [949, 757, 31]
""" Answer:"""


@pytest.fixture
def late(tmp_path: Path) -> str:
    return str(activate(demo.adapter_dirs()["shout"], tmp_path / "late", ANSWER))


def test_inspect_tells_the_tokens_and_with_a_base_their_text(late: str, capsys):
    for arguments, text in (([], None), (["--base", str(BASE)], " Answer:")):
        assert main(["inspect", late, *arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["kinds"] == ["lora", "alora"]
        assert (told["invocation_tokens"], told["invocation_text"]) == (ANSWER, text)
        assert main(["inspect", late, *arguments]) == 0
        table = " ".join(capsys.readouterr().out.split())
        assert "tokens 949, 757, 31" in table
        assert ("' Answer:'" in table) == (text is not None)
    assert main(["inspect", str(demo.adapter_dirs()["shout"]), "--base", str(BASE), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["invocation_tokens"] is told["invocation_text"] is None


def test_a_base_without_a_tokenizer_can_be_looked_at(late: str, tmp_path: Path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).symlink_to(BASE / name)
    assert main(["inspect", late, "--base", str(bare), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["invocation_tokens"], told["invocation_text"]) == (ANSWER, None)


def verified(capsys, *arguments: str) -> dict:
    code = main(["verify", *arguments, "--base", str(BASE), "--tokens", "8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["ok"] else 1)
    return told


def test_verify_asks_with_the_invocation_and_equals_peft(late: str, capsys):
    told = verified(capsys, late, str(demo.adapter_dirs()["german"]))
    assert told["ok"]
    base, activated, plain = told["findings"]
    assert activated["effect"] > 1.0
    assert (activated["tokens"], plain["tokens"], base["tokens"]) == (5 * 8, 4 * 8, 4 * 8)
    assert activated["same_tokens"] == activated["tokens"]


def test_verify_notices_another_place(late: str, capsys, monkeypatch):
    found = phases.last_occurrence
    monkeypatch.setattr(phases, "last_occurrence", lambda *own: (at := found(*own)) and at + 1)
    told = verified(capsys, late)
    assert not told["ok"]
    assert told["findings"][1]["difference"] > 10 * told["threshold"]


def test_what_peft_cannot_apply_is_one_line(tmp_path: Path):
    """A shared expert's linears get all tokens in one row."""
    base = write_many(*MANY["qwen2-moe"], tmp_path / "base")
    given = {"target_modules": ["shared_expert.down_proj"], "alora_invocation_tokens": ANSWER[2:]}
    side = PeftSide(
        str(base),
        torch.float32,
        {"a": write_adapter(base, tmp_path / "a", rank=4, seed=1, **given)},
    )
    assert side.logits([5, 6, *ANSWER[2:]], None).shape[0] == 3
    with pytest.raises(ConfigInvalid, match=r"PEFT cannot apply the activated .*/a: .*shape"):
        side.logits([5, 6, *ANSWER[2:]], "a")


def test_prompts_have_the_invocation_at_the_end_amid_and_not_at_all():
    prompts = [(1, 2, 3, 4), (5, 6)]
    assert invoked(prompts, ()) == prompts
    assert invoked(prompts, (8, 9)) == [(1, 2, 3, 4), (1, 2, 3, 4, 8, 9), (5, 8, 9, 6)]
