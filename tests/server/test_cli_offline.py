import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fader_adapters.weightspace import disk
from fader_server.cli import main
from fader_server.cli.offline import split_weight
from tests.support.families import write_family
from tests.support.peft_adapters import write_adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    base = write_family("llama", root / "base")
    write_adapter(base, root / "adapters/tone", rank=4, seed=1)
    write_adapter(base, root / "adapters/domain", rank=8, seed=2, target_modules=["q_proj"])
    return root


def tell(world, *arguments: object) -> int:
    return main([str(item).replace("@", f"{world}/") for item in arguments])


def failed(capsys, code, told, *, wanted=2):
    """One line on stderr, that exit code, those words."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("fader: ")]
    assert code == wanted, lines
    assert len(errors) == 1
    assert re.search(told, errors[0]), errors


def test_merge_then_the_same_again_keeps_what_is_finished(world, tmp_path, capsys):
    given = ("merge", "@adapters/tone:0.7", "domain:-0.2", "--adapter-dir", "@adapters")
    options = ("--base", "@base", "--out", tmp_path / "m", "--dtype", "nf4", "--shard-mib", "1")
    assert tell(world, *given, *options) == 0
    first = capsys.readouterr().out
    assert "14 linears merged" in first
    assert "finished before" not in first
    assert tell(world, *given, *options) == 0
    assert "1 of them finished before" in capsys.readouterr().out
    report = json.loads((tmp_path / "m/merge_report.json").read_text())
    assert sorted(term["weight"] for term in report["blend"]) == [-0.2, 0.7]
    assert report["dtype"] == "nf4"
    code = tell(world, "merge", "@adapters/tone:0.6", *options)
    failed(capsys, code, "another blend")


def test_merge_warns_when_four_bits_take_the_delta_away(world, tmp_path, capsys):
    main(["quantize", f"{world}/base", str(tmp_path / "nf4")])
    capsys.readouterr()
    options = ("--base", tmp_path / "nf4", "--dtype")
    for name, weight, form, warned in (
        ("weak", "0.05", "nf4", True),
        ("strong", "12", "nf4", False),
        ("dense", "0.05", "bf16", False),
    ):
        out = tmp_path / name
        assert tell(world, "merge", f"@adapters/tone:{weight}", *options, form, "--out", out) == 0
        assert ("WARNING" in capsys.readouterr().err) == warned, name


def test_extract_and_compress_tell_their_error_and_warn(world, tmp_path, capsys):
    main(
        ["merge", f"{world}/adapters/tone", "--base", f"{world}/base", "--out", str(tmp_path / "m")]
    )
    tensors = load_file(tmp_path / "m/model.safetensors")
    base = load_file(world / "base/model.safetensors")
    assert (tensors["lm_head.weight"] == base["lm_head.weight"].bfloat16()).all()
    tuned = {key: base[key] if tensors[key].ndim == 1 else tensors[key].float() for key in base}
    tuned["lm_head.weight"], tuned["model.embed_tokens.weight"] = (
        base["lm_head.weight"],
        base["model.embed_tokens.weight"],
    )
    save_file(tuned, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    options = ("--base", "@base", "--rank", "4")
    assert tell(world, "extract", tmp_path / "m", *options, "--out", tmp_path / "e") == 0
    told = capsys.readouterr()
    assert "14 linears, 0 unchanged" in told.out
    assert "WARNING" not in told.err
    tuned["model.norm.weight"] = base["model.norm.weight"] + 1
    save_file(tuned, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    more = ("--targets", "q_proj,k_proj", "--exclude", "k_proj", "--out", tmp_path / "q")
    assert tell(world, "extract", tmp_path / "m", *options, *more) == 0
    told = capsys.readouterr()
    assert "2 linears" in told.out
    assert "WARNING" in told.err
    assert (
        "model.norm.weight"
        in json.loads((tmp_path / "q/extract_report.json").read_text())["not_carried"][-1].values()
    )
    config = json.loads((tmp_path / "e/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{world}/base"

    terms = ("compress", "@adapters/tone", "@adapters/domain")
    blend = ("--weights=0.7,-0.2", "--rank", "12")
    assert tell(world, *terms, *blend, "--out", tmp_path / "c", "--base", "@base") == 0
    assert "14 linears, 14 exactly" in capsys.readouterr().out
    blend = ("--weights", "0.7,0.2", "--rank", "3")
    assert tell(world, *terms, *blend, "--out", tmp_path / "d") == 0
    assert "14 linears, 0 exactly" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["merge", "nobody", "--base", "@base", "--out", "@x"], "nobody.*--adapter-dir"),
        (["merge", "@adapters/tone:much", "--base", "@base", "--out", "@x"], "'much' is no number"),
        (["merge", "@adapters/tone:99", "--base", "@base", "--out", "@x"], "±16"),
        (["merge", "@adapters/tone", "--base", "@nothing", "--out", "@x"], "no model at"),
        (["merge", "@adapters/tone", "--base", "@base", "--out", "@base"], "base itself"),
        (["merge", "@adapters/tone", "--base", "@base", "--out", "@adapters"], "is not empty"),
        (["merge", "@adapters/tone", "--base", "@base", "--out", "@x", "--dtype", "q8"], "--dtype"),
        (["merge", "--base", "@base", "--out", "@x"], "NAME_OR_DIR"),
        (["extract", "@base", "--base", "@base", "--rank", "4", "--out", "@x"], "equals the base"),
        (["extract", "@base", "--base", "@base", "--rank", "0", "--out", "@x"], "rank"),
        (["compress", "@adapters/tone", "--rank", "4", "--weights", "1,2", "--out", "@x"], "2 num"),
        (["compress", "@adapters/tone", "--rank", "4", "--weights", "a", "--out", "@x"], "numbers"),
        (
            ["compress", "@adapters/tone:1", "--rank", "4", "--weights", "2", "--out", "@x"],
            "give them once",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(world, capsys, arguments, told):
    failed(capsys, tell(world, *arguments), told)
    assert not (world / "x").exists()


@pytest.mark.parametrize(("number", "code"), [("ENOSPC", 2), ("EIO", 1)])
def test_a_disk_that_fails_is_one_line_and_leaves_nothing_that_loads(
    world, tmp_path, capsys, monkeypatch, number, code
):
    import errno

    def fail(path):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    given = ("merge", "@adapters/tone", "--base", "@base", "--out", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "_sync_and_close", fail)
        failed(capsys, tell(world, *given), "disk refused", wanted=code)
    assert not (tmp_path / "out/config.json").exists()
    assert tell(world, *given) == 0


def test_a_folder_whose_name_ends_like_a_weight_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_weight("tone:0.5", []) == ("tone", 0.5)
    (tmp_path / "tone:0.5").mkdir()
    assert split_weight("tone:0.5", []) == ("tone:0.5", None)
    assert split_weight("tone:0.5:2", []) == ("tone:0.5", 2.0)
    assert split_weight("./x", []) == ("./x", None)


def test_fader_serves_what_merge_wrote(world, tmp_path):
    from fader_adapters.kernels.backend import choose
    from fader_server.model.loader import load_base

    for form in ("nf4", "bf16"):
        out = tmp_path / form
        assert (
            tell(world, "merge", "@adapters/tone", "--base", "@base", "--dtype", form, "--out", out)
            == 0
        )
        cpu = torch.device("cpu")
        backend = choose(cpu, torch.float32, "reference")
        base = load_base(str(out), dtype=torch.float32, device=cpu, backend=backend)
        assert sum(item.role == "linear" for item in base.installed.spec.linears) == 14


@pytest.mark.slow
def test_killed_for_real_the_same_command_goes_on(world, tmp_path):
    """SIGKILL as soon as the first shard is there."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    big = write_family("llama", tmp_path / "base", scale=0.02)
    tensors = load_file(big / "model.safetensors")
    for i in range(24):  # ballast that transformers would ignore, so that there is time
        tensors[f"ballast.{i}"] = torch.full((1 << 20,), float(i))
    save_file(tensors, big / "model.safetensors", metadata={"format": "pt"})
    code = (
        "import sys, os, signal\n"
        "from fader_adapters.weightspace import manifest\n"
        "save = manifest.Manifest.save\n"
        "def note(self, directory):\n"
        "    save(self, directory)\n"
        "    if len(self.shards) == int(sys.argv.pop()):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sys.argv.append('3')\n"
        "if sys.argv[-1] != 'no': manifest.Manifest.save = note\n"
        "from fader_server.cli import main\n"
        "sys.exit(main(sys.argv[1:-1]))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)

    def command(target, *extra):
        given = ["merge", str(world / "adapters/tone"), "--base", str(big), "--shard-mib", "8"]
        return subprocess.run(
            [sys.executable, "-c", code, *given, "--out", str(target), *extra],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )

    assert command(out, "3").returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    assert len(list(out.glob("*.safetensors"))) == 3
    done = command(out, "no")
    assert done.returncode == 0, done.stderr
    assert "3 of them finished before" in done.stdout
    assert command(whole, "no").returncode == 0
    one, two = ({p.name: p.read_bytes() for p in directory.iterdir()} for directory in (out, whole))
    assert one == two


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "bf16"])
def test_memory_is_bounded_by_a_linear_not_by_the_model(tmp_path, form):
    """Three times the layers, 268 MB more of them, and nearly the same peak."""
    peaks = [_peak(tmp_path / str(layers), layers, form) for layers in (2, 6)]
    assert min(peaks) > 10e6, "the meter sees the work"
    assert abs(peaks[1] - peaks[0]) < 90e6  # what allocators keep differs beside other load


def _peak(directory, layers: int, form: str) -> int:
    """Bytes of resident memory that a merge adds at its worst."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    base = directory / "base"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter = write_adapter(base, directory / "tone", rank=4, seed=1)
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from fader_adapters.weightspace.base import open_base\n"
        "from fader_adapters.weightspace.merge import merge\n"
        "from fader_adapters.weightspace.terms import Ingredient\n"
        "def peak():\n"
        "    status = open('/proc/self/status').read()\n"
        "    return int(re.search(r'VmHWM:\\s+(\\d+)', status)[1])\n"
        "base, adapter, out, form = map(Path, sys.argv[1:])\n"
        "open_base(base)\n"
        "before = peak()\n"
        "merge(base, [Ingredient(adapter)], out, form=str(form))\n"
        "print((peak() - before) * 1024)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(base), str(adapter), str(directory / "out"), form],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return int(told.split()[-1])
