"""Adapted parameters that older versions of PEFT wrote the other way round."""

from dataclasses import replace

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from tests.adapters.peft_files import make_raw, read
from tests.adapters.test_expert_targets import (
    BASE,
    EXPERTS,
    INNER,
    RANK,
    WIDTH,
    config,
    pair,
    written,
)

UP, DOWN = "experts.gate_up_proj", "experts.down_proj"
R = RANK * EXPERTS
STORED = replace(
    BASE, linears=tuple(replace(item, conv1d=item.role == "experts") for item in BASE.linears)
)
"""Experts as gpt-oss stores them: [in, out]."""


def of(*targets: str, around: tuple[int, int] = (INNER, WIDTH)) -> dict[str, torch.Tensor]:
    """Of the first layer: the square one, and the other, whose A and B have these widths."""
    found: dict[str, torch.Tensor] = {}
    name = "layers.0.mlp.experts"
    if UP in targets:
        wrapped = name + ".base_layer" * (DOWN in targets)
        found |= pair(wrapped, (R, WIDTH), (WIDTH, R), 1)
    if DOWN in targets:
        found |= pair(name, (R, around[0]), (around[1], R), 2)
    return found


def deltas(base: BaseSpec, version: str | None, given: dict[str, torch.Tensor], *targets: str):
    """W's change [experts, out, in] by the path's last part."""
    told = {} if version is None else {"peft_version": version}
    names = [f"0.mlp.{name}" for name in targets]
    parsed = read(make_raw(config(target_parameters=names, **told), given), base)
    flat, found = written(parsed), {}
    for delta in parsed.spec.deltas:
        linear = base.linears[delta.linear]
        a = flat[delta.a_offset :][: R * linear.in_features].view(EXPERTS, RANK, -1)
        bt = flat[delta.b_offset :][: R * linear.out_features].view(EXPERTS, RANK, -1)
        found[linear.path.rpartition(".")[2]] = bt.mT @ a
    return found, parsed


def by_peft(given: dict[str, torch.Tensor], name: str, *, turned: bool) -> torch.Tensor:
    """By the formula in PEFT's ParamWrapper: o is B's dimension, i is A's."""
    a = given[f"base_model.model.model.{name}.lora_A.weight"].view(EXPERTS, RANK, -1)
    b = given[f"base_model.model.model.{name}.lora_B.weight"]
    b = b.view(len(b), RANK, EXPERTS)
    return torch.einsum("ore,eri->eio" if turned else "ore,eri->eoi", b, a)


@pytest.mark.parametrize(
    ("version", "base", "turned"),
    [
        (None, BASE, False),
        ("0.17.1", BASE, True),
        ("0.18.1", BASE, True),
        ("0.19.0", BASE, True),
        ("0.19.1", BASE, False),
        ("0.21.2", BASE, False),
        ("1.0.0.dev0@main", BASE, False),
        ("nonsense", BASE, False),
        (None, STORED, False),
        ("0.17.1", STORED, False),
        ("0.18.1", STORED, False),
        ("0.19.1", STORED, False),
    ],
)
def test_of_a_square_stack_alone_the_version_tells(version, base, turned):
    given = of(UP)
    found, _ = deltas(base, version, given, UP)
    name = "layers.0.mlp.experts"
    right = by_peft(given, name, turned=turned)
    assert torch.allclose(found["gate_up_proj"], right, atol=1e-5)
    assert not torch.allclose(right, by_peft(given, name, turned=not turned), atol=1e-2)


def test_where_nothing_tells_it_is_refused():
    with pytest.raises(AdapterInvalid, match="wrote square experts either way"):
        deltas(STORED, "0.19.0", of(UP), UP)


@pytest.mark.parametrize("version", [None, "0.17.1", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("base", [BASE, STORED], ids=["out first", "in first"])
@pytest.mark.parametrize("turned", [False, True])
def test_one_that_is_not_square_tells_of_the_other(version, base, turned):
    given = of(UP, DOWN, around=(WIDTH, INNER) if turned else (INNER, WIDTH))
    found, parsed = deltas(base, version, given, UP, DOWN)
    name = "layers.0.mlp.experts"
    for kind, path in (("gate_up_proj", f"{name}.base_layer"), ("down_proj", name)):
        assert torch.allclose(found[kind], by_peft(given, path, turned=turned), atol=1e-5)
    _, again = deltas(base, "0.21.2", given, UP, DOWN)
    assert again.spec == parsed.spec


def test_a_version_that_means_another_delta_is_another_adapter():
    given = of(UP)
    old, new = (deltas(BASE, version, given, UP)[1] for version in ("0.18.1", "0.21.2"))
    assert old.spec.version != new.spec.version


@pytest.mark.parametrize(("out", "widths"), [(64, (64, 64)), (192, (192, 64))])
def test_the_weight_of_a_conv1d_is_turned(out: int, widths: tuple[int, int]):
    linear = LinearSpec("transformer.h.0.attn.c_proj", 64, out, 0, conv1d=True)
    base = BaseSpec((linear,), Digest("0" * 64), "gpt2")
    key = "base_model.model.transformer.h.0.attn.c_proj"
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(RANK, widths[0], generator=g), torch.randn(widths[1], RANK, generator=g)
    given = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    parsed = read(make_raw(config(target_parameters=["c_proj.weight"]), given), base)
    (delta,) = parsed.spec.deltas
    flat = written(parsed)
    own_a = flat[delta.a_offset :][: RANK * 64].view(RANK, 64)
    own_bt = flat[delta.b_offset :][: RANK * out].view(RANK, out)
    assert torch.allclose(own_bt.T @ own_a, (b @ a).T, atol=1e-5)


def test_what_fits_neither_way_is_another_base():
    with pytest.raises(AdapterMismatch, match="another base"):
        deltas(BASE, "0.18.1", of(DOWN, around=(48, WIDTH)), DOWN)
