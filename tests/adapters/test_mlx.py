"""MLX-LM's adapters: the delta of its own formula, and everything else refused by name."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.limits import Limits
from fader_adapters.mlx import in_peft_terms
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.roots import look
from fader_adapters.source import WEIGHTS_FILE, LocalSources, RawAdapter
from fader_adapters.weightspace.alone import own_linears
from tests.adapters.mlx_files import (
    RANK,
    SCALE,
    make_mlx_config,
    make_mlx_tensors,
    mlx_files,
    write_mlx,
)
from tests.adapters.peft_files import BASE, TARGETS, make_raw


class Weights:
    """Random W of every linear of BASE."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        self.w = [
            torch.randn(linear.out_features, linear.in_features, generator=random)
            for linear in BASE.linears
        ]

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        yield from self.w[linear].split(7)


WEIGHTS = Weights()


def raw_of(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> RawAdapter:
    return RawAdapter.of(mlx_files(config, tensors), "test", Limits())


def load(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> ParsedAdapter:
    return read_adapter(raw_of(config, tensors), BASE, dtype=torch.float32, weights=WEIGHTS)


def theirs(w: torch.Tensor, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """y as MLX-LM's layers compute it, in fp64. `tensors` by role, W [out, in], x [tokens, in]."""
    a, b = tensors["lora_a"].double(), tensors["lora_b"].double()
    y = x @ w.double().T + SCALE * ((x @ a) @ b)
    if "m" in tensors:
        adapted = w.double() + (SCALE * b.T) @ a.T
        y = (tensors["m"].double() / torch.linalg.vector_norm(adapted, dim=1)) * y
    return y


def ours(parsed: ParsedAdapter, linear: int, x: torch.Tensor) -> torch.Tensor:
    """The same by the specification of the delta."""
    delta = parsed.spec.by_linear[linear]
    factors = parsed.factors[parsed.spec.deltas.index(delta)]
    y = x @ WEIGHTS.w[linear].double().T
    if factors.gain is not None:
        y = y * (1 + factors.gain.double())
    return y + delta.scale * ((x @ factors.a.double().T) @ factors.bt.double())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_every_linear_answers_by_their_formula(kind):
    tensors = make_mlx_tensors(dora=kind == "dora")
    parsed = load(make_mlx_config(fine_tune_type=kind), tensors)
    assert len(parsed.spec.deltas) == 3 * len(TARGETS)
    for delta in parsed.spec.deltas:
        linear = BASE.linears[delta.linear]
        own = {
            name.rpartition(".")[2]: tensor
            for name, tensor in tensors.items()
            if name.rpartition(".")[0] == linear.path
        }
        x = torch.randn(5, linear.in_features, dtype=torch.float64)
        want = theirs(WEIGHTS.w[delta.linear], own, x)
        torch.testing.assert_close(ours(parsed, delta.linear, x), want, rtol=2e-5, atol=2e-5)
        other = theirs(WEIGHTS.w[delta.linear], {**own, "lora_b": -own["lora_b"]}, x)
        assert not torch.allclose(ours(parsed, delta.linear, x), other, rtol=1e-2, atol=1e-2)


def test_half_precision_keeps_its_bits_and_the_same_files_give_the_same_version():
    tensors = make_mlx_tensors(dtype=torch.bfloat16)
    first, again = (load(make_mlx_config(), tensors) for _ in range(2))
    assert first.spec.version == again.spec.version
    path = "model.layers.0.self_attn.q_proj"
    a = first.factors[0].a
    assert torch.equal(a, tensors[f"{path}.lora_a"].float().T)
    assert first.report.source_dtypes == ("BF16",)
    other = load(make_mlx_config(), make_mlx_tensors(dtype=torch.bfloat16, seed=1))
    assert other.spec.version != first.spec.version


def test_arguments_of_the_run_are_no_part_of_the_version():
    tensors = make_mlx_tensors()
    version = load(make_mlx_config(), tensors).spec.version
    assert load(make_mlx_config(iters=7, train=False), tensors).spec.version == version
    parameters = {"rank": RANK, "scale": SCALE * 2, "dropout": 0.0}
    assert load(make_mlx_config(lora_parameters=parameters), tensors).spec.version != version


KEYS = ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"]


def parameters(**changes: Any) -> dict[str, Any]:
    whole = {"rank": RANK, "scale": SCALE, "dropout": 0.0, **changes}
    return {"lora_parameters": {key: value for key, value in whole.items() if value is not ...}}


@pytest.mark.parametrize(
    "changes",
    [
        parameters(keys=KEYS),
        parameters(keys=None),
        parameters(dropout=...),
        parameters(keys=[*KEYS, "self_attn.k_norm"]),
        {"fine_tune_type": ...},
        {"num_layers": 3},
        {"num_layers": -1},
        {"model": None},
        {"wandb": "runs"},
        {"an_argument_of_tomorrow": None},
    ],
)
def test_what_their_loader_reads_alike_is_the_same_adapter(changes):
    tensors = make_mlx_tensors()
    same = load(make_mlx_config(**changes), tensors)
    assert same.spec.version == load(make_mlx_config(), tensors).spec.version


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fine_tune_type": "full"}, "whole weights, no adapter"),
        ({"fine_tune_type": "qlora"}, "expected 'lora' or 'dora'"),
        ({"lora_parameters": ...}, "expected an object with rank"),
        (parameters(rank=...), "lora_parameters.rank"),
        (parameters(rank=4.0), "lora_parameters.rank"),
        (parameters(scale=...), "lora_parameters.scale"),
        (parameters(scale=-1.0), "lora_parameters.scale"),
        (parameters(scale=True), "lora_parameters.scale"),
        (parameters(scale=10**400), "lora_alpha"),
        (parameters(rank=True), "lora_parameters.rank"),
        (parameters(alpha=16), "leave alpha out"),
        (parameters(gates=2), "lora_parameters.gates"),
        (parameters(keys="self_attn.q_proj"), "expected a list of paths"),
        (parameters(keys=KEYS[:2]), "do not name it"),
        ({"num_layers": ...}, "num_layers"),
        ({"num_layers": "all"}, "num_layers"),
        ({"num_layers": 2}, "for 3 layers"),
        ({"an_argument_of_tomorrow": 1}, "an_argument_of_tomorrow"),
        (parameters(rank=8), "declares rank 8"),
    ],
)
def test_what_they_would_compute_otherwise_is_refused_by_name(changes, told):
    load(make_mlx_config(), make_mlx_tensors())
    with pytest.raises(AdapterInvalid, match=told):
        load(make_mlx_config(**changes), make_mlx_tensors())


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", (4, RANK, 64), "mixture's experts"),
        ("model.layers.0.mlp.up_proj.lora_a", (4, RANK, 64), "mixture's experts"),
        ("model.embed_tokens.lora_a", (128, RANK), "of an embedding"),
        ("model.layers.0.mlp.up_proj.weight", (96, 64), "none of lora_a, lora_b and m"),
        ("model.layers.0.mlp.up_proj.lora_c", (96, 64), "none of lora_a, lora_b and m"),
        ("model.layers.0.self_attn.q_proj.m", (64, 1), r"expected \[out\]"),
        ("model.layers.0.self_attn.q_proj.m", (64,), "use_dora = false"),
        ("model.layers.0.mlp.up_proj.lora_a", (64, RANK), "no lora_B"),
    ],
)
def test_tensors_without_a_place_are_refused(name, shape, told):
    with pytest.raises(AdapterInvalid, match=told):
        load(make_mlx_config(), {**make_mlx_tensors(), name: torch.ones(shape)})


def test_another_base_is_told_as_of_any_adapter():
    tensors = {name.replace("q_proj", "wq"): tensor for name, tensor in make_mlx_tensors().items()}
    with pytest.raises(AdapterMismatch, match="wq"):
        load(make_mlx_config(), tensors)


def test_a_base_whose_weights_they_fold_multipliers_into_is_refused_to_them_alone():
    base = replace(BASE, model_type="falcon_h1")
    raw = raw_of(make_mlx_config(), make_mlx_tensors())
    with pytest.raises(AdapterMismatch, match="multipliers"):
        read_adapter(raw, base, dtype=torch.float32)
    read_adapter(raw, BASE, dtype=torch.float32)
    read_adapter(make_raw(), base, dtype=torch.float32)


def test_files_of_peft_are_left_as_they_are():
    raw = make_raw()
    assert in_peft_terms(raw.config, raw.weights, Limits()) == (raw.config, raw.weights)
    noted = raw.config.replace(b"tiny/base", b"lora_parameters")
    assert in_peft_terms(noted, raw.weights, Limits()) == (noted, raw.weights)
    assert in_peft_terms(*mlx_files(), Limits()) != mlx_files()


def test_its_folder_is_found_read_and_looked_at_without_a_base(tmp_path):
    write_mlx(tmp_path / "tone")
    ((found,), passed) = look(tmp_path)
    assert (found.name, found.complete, passed) == ("tone", True, [])
    raw = LocalSources((tmp_path,)).fetch("tone")
    assert len(own_linears(raw).linears) == 3 * len(TARGETS)
    assert json.loads(raw.config)["base_model_name_or_path"] == "tiny/base"
    (tmp_path / "tone" / WEIGHTS_FILE).write_bytes(make_raw().weights)
    with pytest.raises(AdapterInvalid, match="none of lora_a"):  # PEFT's name comes first
        LocalSources((tmp_path,)).fetch("tone")
