"""Adapters of experts and routers from their files: the layout, and each fault under its name."""

import math
from dataclasses import replace

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.parse import ParsedAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from tests.adapters.peft_files import make_config, make_raw, read

EXPERTS, RANK, WIDTH, INNER = 4, 3, 64, 32
PARAMETERS = ["mlp.experts.gate_up_proj", "experts.down_proj", "gate.weight"]


def base_of(prefix: str = "model.", layers: int = 2) -> BaseSpec:
    linears: list[LinearSpec] = []
    for layer in range(layers):
        own = f"{prefix}layers.{layer}"
        linears.append(LinearSpec(f"{own}.self_attn.q_proj", WIDTH, WIDTH, layer))
        for name, width, out, parts in (
            ("gate_up_proj", WIDTH, 2 * INNER, (INNER, INNER)),
            ("down_proj", INNER, WIDTH, (WIDTH,)),
        ):
            path = f"{own}.mlp.experts.{name}"
            linears.append(
                LinearSpec(
                    path, width, out, layer, role="experts", parts=parts, experts=EXPERTS
                )
            )  # fmt: skip
        linears.append(LinearSpec(f"{own}.mlp.gate", WIDTH, EXPERTS, layer, role="router"))
    return BaseSpec(tuple(linears), Digest("0" * 64), "test")


BASE = base_of()


def pair(key: str, a: tuple[int, int], b: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    key = f"base_model.model.model.{key}"
    return {
        f"{key}.lora_A.weight": torch.randn(a, generator=g),
        f"{key}.lora_B.weight": torch.randn(b, generator=g),
    }


def tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    """As PEFT writes them: the first parameter of a module is the innermost wrapper."""
    ranks, found = RANK * EXPERTS, {}
    for layer in range(layers):
        mlp = f"layers.{layer}.mlp"
        found |= pair(f"{mlp}.experts.base_layer", (ranks, WIDTH), (2 * INNER, ranks), layer)
        found |= pair(f"{mlp}.experts", (ranks, INNER), (WIDTH, ranks), 10 + layer)
        found |= pair(f"{mlp}.gate", (RANK, WIDTH), (EXPERTS, RANK), 20 + layer)
    return found


def config(**changes):
    given = {"r": RANK, "lora_alpha": 6, "target_modules": [], "target_parameters": PARAMETERS}
    return make_config(**{**given, **changes})


def written(parsed: ParsedAdapter) -> torch.Tensor:
    flat = torch.full((parsed.spec.numel,), math.nan)
    parsed.write(flat)
    assert flat.isfinite().all()
    return flat


def test_every_expert_has_its_factors_in_its_place():
    given = tensors()
    parsed = read(make_raw(config(), given), BASE)
    flat = written(parsed)
    paths = [BASE.linears[delta.linear].path for delta in parsed.spec.deltas]
    assert paths == [item.path for item in BASE.linears if item.role != "linear"]
    for delta in parsed.spec.deltas:
        linear = BASE.linears[delta.linear]
        mlp = linear.path.partition(".mlp.")[0] + ".mlp."
        named = {
            "gate_up_proj": "experts.base_layer",
            "down_proj": "experts",
            "gate": "gate",
        }[linear.path.rpartition(".")[2]]
        a = given[f"base_model.model.{mlp}{named}.lora_A.weight"]
        b = given[f"base_model.model.{mlp}{named}.lora_B.weight"]
        count, sizes = linear.experts, (linear.in_features, linear.out_features)
        own = flat[delta.a_offset :][: a.numel()].view(count, RANK, sizes[0])
        assert torch.equal(own, a.view(count, RANK, sizes[0]))
        own = flat[delta.b_offset :][: b.numel()].view(count, RANK, sizes[1])
        assert torch.equal(own, b.view(sizes[1], RANK, count).permute(2, 1, 0))
        assert (delta.rank, delta.scale) == (RANK, 2.0)


def test_a_delta_norm_is_that_of_all_experts_together():
    given = tensors()
    parsed = read(make_raw(config(), given), BASE)
    (report,) = (m for m in parsed.report.modules if m.path.endswith("0.mlp.experts.down_proj"))
    a = given["base_model.model.model.layers.0.mlp.experts.lora_A.weight"].double()
    b = given["base_model.model.model.layers.0.mlp.experts.lora_B.weight"].double()
    whole = torch.einsum("ore,eri->eoi", b.view(WIDTH, RANK, EXPERTS), a.view(EXPERTS, RANK, INNER))
    assert report.delta_norm == pytest.approx(2 * float(whole.norm()), rel=1e-5)
    assert report.rank == RANK


def test_some_parameters_of_some_layers_under_another_prefix():
    only = {"target_parameters": ["1.mlp.experts.down_proj"]}
    key = "base_model.model.model.layers.1.mlp.experts"
    given = {name: value for name, value in tensors().items() if name.startswith(f"{key}.lora")}
    raw = make_raw(config(**only), given)
    for base in (BASE, base_of("language_model.model."), base_of("model.language_model.")):
        (delta,) = read(raw, base).spec.deltas
        assert base.linears[delta.linear].path.endswith("layers.1.mlp.experts.down_proj")


def test_patterns_of_ranks_and_alphas_are_matched_with_parameters():
    changed = config(
        r=9, rank_pattern={r".*\.(gate_up|down)_proj": RANK, "gate.weight": RANK},
        alpha_pattern={"experts.gate_up_proj": 12},
    )  # fmt: skip
    parsed = read(make_raw(changed, tensors()), BASE)
    scales = {BASE.linears[d.linear].path.rpartition(".")[2]: d.scale for d in parsed.spec.deltas}
    assert scales == {"gate_up_proj": 4.0, "down_proj": 2.0, "gate": 2.0}


EXPERT = "base_model.model.model.layers.0.mlp.experts"


def without(*parts: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in tensors().items() if not any(part in k for part in parts)}


def other(key: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**tensors(), key: value}


FAULTS = {
    "experts missing": (config(), without("0.mlp.experts.lora"), "partial adapter"),
    "router missing": (config(), without("1.mlp.gate"), "partial adapter"),
    "B missing": (config(), without("0.mlp.experts.lora_B"), "no lora_B"),
    "rank lies": (config(r=4), tensors(), "declares rank 4 of 4 experts"),
    "another number of experts": (
        config(),
        other(f"{EXPERT}.lora_A.weight", torch.randn(RANK * 5, INNER)),
        r"expected A \[12, in\]",
    ),
    "another width": (
        config(),
        other(f"{EXPERT}.lora_A.weight", torch.randn(RANK * EXPERTS, 48)),
        "another base",
    ),
    "one wrapper too many": (
        config(),
        {**tensors(), **pair("layers.0.mlp.experts.base_layer.base_layer", (12, 64), (64, 12), 5)},
        "target_parameters selects 2 parameters",
    ),
    "not selected": (
        config(target_parameters=["experts.down_proj"]),
        tensors(),
        "target_parameters selects 1 parameters",
    ),
    "names nothing": (
        config(target_parameters=["gate.w9"]),
        {k: v for k, v in tensors().items() if "gate.lora" in k},
        "target_parameters names 'gate.w9'",
    ),
    "as a module": (
        config(target_modules=["gate_up_proj"]),
        tensors(),
        "target_modules names 'gate_up_proj'",
    ),
    "no parameters named": (
        config(target_modules=["experts"], target_parameters=None),
        tensors(),
        "names no linear of",
    ),
    "dora": (config(use_dora=True), tensors(), "use_dora"),
    "bias": (config(lora_bias=True), tensors(), "lora_bias"),
    "NaN in one expert": (
        config(),
        other(f"{EXPERT}.lora_B.weight", torch.full((WIDTH, RANK * EXPERTS), math.nan)),
        "NaN or infinite",
    ),
    "a magnitude": (
        config(),
        other(f"{EXPERT}.lora_magnitude_vector", torch.ones(WIDTH)),
        "use_dora",
    ),
    "text as parameters": (config(target_parameters="experts.*"), tensors(), "target_parameters"),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_what_is_not_whole_and_exact_is_refused(fault: str):
    given, weights, told = FAULTS[fault]
    with pytest.raises((AdapterInvalid, AdapterMismatch), match=told):
        read(make_raw(given, weights), BASE)


def test_a_stack_of_one_expert_is_a_stack():
    base = replace(
        BASE,
        linears=tuple(replace(i, experts=1) if i.role == "experts" else i for i in BASE.linears),
    )
    own = pair("layers.0.mlp.experts", (RANK, INNER), (WIDTH, RANK), 1)
    parsed = read(make_raw(config(target_parameters=["0.mlp.experts.down_proj"]), own), base)
    (factors,), (a, b) = parsed.factors, own.values()
    assert torch.equal(factors.a, a[None])
    assert torch.equal(factors.bt, b.T[None])


def test_ranks_are_bounded_by_expert():
    assert read(make_raw(config(), tensors()), BASE, limits=Limits(rank=RANK))
    with pytest.raises(AdapterTooLarge, match="limit is 2"):
        read(make_raw(config(), tensors()), BASE, limits=Limits(rank=RANK - 1))


def older(names: tuple[str, str, str], mixture: str = "mlp", ranks=(2, 2, 2)):
    gate, up, down = names
    found: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            own = f"layers.{layer}.{mixture}.experts.{expert}"
            for i, (name, width, out) in enumerate(
                ((gate, WIDTH, INNER), (up, WIDTH, INNER), (down, INNER, WIDTH))
            ):
                found |= pair(f"{own}.{name}", (ranks[i], width), (out, ranks[i]), 7 * expert + i)
    return found


@pytest.mark.parametrize(
    ("mixture", "names"),
    [
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mlp", ("w1", "w3", "w2")),
        ("block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_experts_as_modules_lie_in_the_rows_of_the_stack(mixture, names):
    given = older(names, mixture)
    parsed = read(make_raw(make_config(r=2, lora_alpha=2, target_modules=list(names)), given), BASE)
    flat, spec = written(parsed), parsed.spec.deltas[0]
    assert [delta.rank for delta in parsed.spec.deltas] == [4, 2] * 2
    key = f"base_model.model.model.layers.0.{mixture}.experts.1"
    for part, name in enumerate(names[:2]):
        a, b = given[f"{key}.{name}.lora_A.weight"], given[f"{key}.{name}.lora_B.weight"]
        own = flat[spec.a_offset :].view(-1)[: EXPERTS * 4 * WIDTH].view(EXPERTS, 4, WIDTH)
        assert torch.equal(own[1, 2 * part : 2 * part + 2], a)
        own = flat[spec.b_offset :].view(-1)[: EXPERTS * 8 * INNER].view(EXPERTS, 4, 2 * INNER)
        rows = slice(part * INNER, (part + 1) * INNER)
        assert torch.equal(own[1, 2 * part : 2 * part + 2, rows], b.T)
        assert not own[1, 2 * part : 2 * part + 2, INNER - part * INNER :][:, :INNER].any()


def test_a_module_of_one_expert_that_is_missing_is_a_partial_adapter():
    names = ("gate_proj", "up_proj", "down_proj")
    given = {k: v for k, v in older(names).items() if ".1.mlp.experts.2.up_proj" not in k}
    with pytest.raises(AdapterInvalid, match="partial adapter"):
        read(make_raw(make_config(r=2, target_modules=list(names)), given), BASE)


def test_experts_of_other_ranks_are_padded_and_keep_their_scales():
    names = ("gate_proj", "up_proj", "down_proj")
    given = older(names)
    for factor, shape in (("A", (5, INNER)), ("B", (WIDTH, 5))):
        given[f"{EXPERT}.3.down_proj.lora_{factor}.weight"] = torch.randn(shape)
    changed = make_config(
        r=2, lora_alpha=2, target_modules=list(names), rank_pattern={"0.mlp.experts.3.down_proj": 5}
    )
    parsed = read(make_raw(changed, given), BASE)
    flat, delta = written(parsed), parsed.spec.deltas[1]
    assert (delta.rank, delta.scale) == (5, 1.0)
    b = flat[delta.b_offset :][: EXPERTS * 5 * WIDTH].view(EXPERTS, 5, WIDTH)
    assert torch.allclose(b[3], given[f"{EXPERT}.3.down_proj.lora_B.weight"].T * 2 / 5)
    assert torch.equal(b[0, :2], given[f"{EXPERT}.0.down_proj.lora_B.weight"].T)
    assert not b[0, 2:].any()


def test_a_file_may_name_every_expert_of_its_base():
    names = ("gate_proj", "up_proj", "down_proj")
    raw = make_raw(make_config(r=2, target_modules=list(names)), older(names))
    assert read(raw, BASE, limits=Limits(tensors=4, header_bytes=1024))
    with pytest.raises(AdapterTooLarge, match="limit"):
        read(make_raw(), limits=Limits(tensors=4))


@pytest.mark.parametrize("as_modules", [False, True])
def test_experts_that_are_no_targets_are_refused_by_name(as_modules: bool):
    kept = tuple(item for item in BASE.linears if item.role == "linear")
    base = replace(BASE, linears=kept, left_out=frozenset({"experts", "router"}))
    names = ("gate_proj", "up_proj", "down_proj")
    raw = make_raw(config(), tensors())
    if as_modules:
        raw = make_raw(make_config(r=2, target_modules=list(names)), older(names))
    with pytest.raises(AdapterMismatch, match="computes otherwise"):
        read(raw, base)
    only = pair("layers.0.self_attn.q_proj", (3, 64), (64, 3), 1)
    raw = make_raw(make_config(r=3, target_modules=["0.self_attn.q_proj"]), only)
    assert read(raw, base).report.matched == 1


@pytest.mark.parametrize("what", ["DoRA", "lora_bias"])
def test_vectors_of_experts_by_themselves_are_refused_not_left_out(what: str):
    names = ("gate_proj", "up_proj", "down_proj")
    given = older(names)
    for key in [key for key in given if key.endswith("lora_B.weight")]:
        vector = torch.ones(len(given[key]))
        own = "lora_magnitude_vector" if what == "DoRA" else "lora_B.bias"
        given[key.replace("lora_B.weight", own)] = vector
    flag = {"use_dora": True} if what == "DoRA" else {"lora_bias": True}
    config = make_config(r=2, lora_alpha=6, target_modules=list(names), **flag)
    with pytest.raises(AdapterInvalid, match=f"{what} of a mixture's experts is not implemented"):
        read(make_raw(config, given), BASE)


@pytest.mark.parametrize("what", ["DoRA", "lora_bias"])
def test_vectors_of_a_router_are_refused_by_name(what: str):
    given = pair("layers.0.mlp.gate", (RANK, WIDTH), (EXPERTS, RANK), 1)
    key = "base_model.model.model.layers.0.mlp.gate"
    own = "lora_magnitude_vector" if what == "DoRA" else "lora_B.bias"
    given[f"{key}.{own}"] = torch.ones(EXPERTS)
    flag = {"use_dora": True} if what == "DoRA" else {"lora_bias": True}
    config = make_config(r=RANK, target_modules=["0.mlp.gate"], **flag)
    told = f"0.mlp.gate': {what} of a mixture's router is not implemented"
    with pytest.raises(AdapterInvalid, match=told):
        read(make_raw(config, given), BASE)


@pytest.mark.parametrize("name", ["gate", "experts.down_proj", "q_proj"])
def test_token_rows_are_those_of_embedding_and_head_alone(name: str):
    given = pair("layers.0.self_attn.q_proj", (RANK, WIDTH), (WIDTH, RANK), 1)
    own = "self_attn.q_proj" if name == "q_proj" else f"mlp.{name}"
    key = f"base_model.model.model.layers.1.{own}.token_adapter.trainable_tokens_delta"
    given[key] = torch.ones(1, WIDTH)
    config = make_config(
        r=RANK, target_modules=["0.self_attn.q_proj"], trainable_token_indices={name: [1]}
    )
    with pytest.raises(AdapterInvalid, match=f"trainable_token_indices names '{name}', which is n"):
        read(make_raw(config, given), BASE)


def test_a_pattern_over_every_expert_of_a_large_mixture_is_within_the_budget():
    layers, experts = 24, 128
    base = base_of(layers=layers)
    base = replace(
        base,
        linears=tuple(
            replace(i, experts=experts) if i.role == "experts" else i for i in base.linears
        ),
    )
    names = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
    given = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_{ab}.weight": (
            torch.ones(1, width) if ab == "A" else torch.ones(out, 1)
        )
        for layer in range(layers)
        for expert in range(experts)
        for name, (width, out) in names.items()
        for ab in "AB"
    }
    chosen = r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj"
    raw = make_raw(make_config(r=1, target_modules=chosen), given)
    assert read(raw, base).report.matched == 2 * layers
    with pytest.raises(AdapterInvalid, match="costs too much"):
        read(raw, base, limits=Limits(pattern_work=-(10**9)))
