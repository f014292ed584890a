"""What DoRA, biases, adapted ends and trained tokens bring along is checked, and folded in fp32."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.limits import Limits
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from fader_adapters.weightspace.alone import own_linears
from tests.adapters.peft_files import make_config, make_raw

VOCAB, WIDTH = 40, 64
LINEARS = (
    LinearSpec("model.layers.0.q_proj", WIDTH, 32, 0),
    LinearSpec("model.embed_tokens", VOCAB, WIDTH, None, conv1d=True, role="embedding"),
    LinearSpec("lm_head", WIDTH, VOCAB, None, role="head"),
)
UNTIED = BaseSpec(LINEARS, Digest("0" * 64), "test")
TIED = BaseSpec(LINEARS, Digest("0" * 64), "test", tied=True)
Q, TABLE, HEAD = (f"base_model.model.{linear.path}" for linear in LINEARS)


class Weights:
    """Random W of every linear; the head's is the embedding's table."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(3)
        self.w = [
            torch.randn(linear.out_features, linear.in_features, generator=random)
            for linear in LINEARS
        ]
        self.w[2] = self.w[1].t()

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        yield from self.w[linear].split(7)


WEIGHTS = Weights()


def pair(path: str, rows: int, width: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*s, generator=random) * 0.1 for s in ((rank, width), (rows, rank)))
    if path == TABLE:
        return {f"{path}.lora_embedding_A": a, f"{path}.lora_embedding_B": b}
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


PLAIN = pair(Q, 32, WIDTH)
MAGNITUDE = {f"{Q}.lora_magnitude_vector": torch.rand(32) + 0.5}
BIAS = {f"{Q}.lora_B.bias": torch.randn(32)}
ROWS = {f"{TABLE}.token_adapter.trainable_tokens_delta": torch.randn(3, WIDTH)}


def load(
    tensors: dict[str, torch.Tensor],
    *,
    base: BaseSpec = UNTIED,
    weights: Weights | None = WEIGHTS,
    limits: Limits | None = None,
    **config: Any,
) -> ParsedAdapter:
    config = {"target_modules": ["q_proj"], **config}
    raw = make_raw(make_config(**config), tensors)
    return read_adapter(raw, base, dtype=torch.float32, weights=weights, limits=limits)


def test_dora_is_folded_with_the_norms_of_the_whole_weight():
    parsed = load({**PLAIN, **MAGNITUDE}, use_dora=True)
    (factors,), (delta,) = parsed.factors, parsed.spec.deltas
    a, b = (PLAIN[f"{Q}.lora_{name}.weight"].double() for name in "AB")
    w = WEIGHTS.w[0].double()
    changed = w + 2.0 * b @ a
    changed *= (MAGNITUDE[f"{Q}.lora_magnitude_vector"].double() / changed.norm(dim=1))[:, None]
    assert factors.gain is not None
    ours = w * (1 + factors.gain.double())[:, None]
    ours += delta.scale * factors.bt.double().t() @ factors.a.double()
    torch.testing.assert_close(ours, changed, rtol=1e-6, atol=1e-6)
    norm = float((changed - w).norm())
    assert parsed.report.delta_norm == pytest.approx(norm, rel=1e-5)
    assert parsed.report.kinds == ("dora",)
    plain = load(PLAIN).report
    assert plain.kinds == ()
    assert plain.delta_norm != pytest.approx(norm, rel=1e-2)


def test_rows_that_no_module_has_keep_their_norm_beside_dora():
    """A packed linear of which one part is adapted."""
    path = "model.layers.0.self_attn.qkv_proj"
    base = replace(UNTIED, linears=(LinearSpec(path, WIDTH, 32, 0, parts=(16, 8, 8)),))
    own = f"base_model.model.{path.replace('qkv_proj', 'k_proj')}"
    tensors = {name.replace(Q, own): tensor[:8] for name, tensor in PLAIN.items()}
    tensors[f"{own}.lora_magnitude_vector"] = torch.rand(8) + 0.5
    parsed = load(tensors, base=base, target_modules=["k_proj"], use_dora=True)
    gain = parsed.factors[0].gain
    assert gain is not None
    assert gain[16:24].all()
    assert not gain[:16].any()
    assert not gain[24:].any()


def test_the_extent_holds_gain_and_bias_where_the_spec_says():
    for tensors, flag, vector in (
        ({**PLAIN, **MAGNITUDE}, {"use_dora": True}, "gain"),
        ({**PLAIN, **BIAS}, {"lora_bias": True}, "bias"),
    ):
        parsed = load(tensors, **flag)
        flat = torch.full((parsed.spec.numel,), float("nan"))
        parsed.write(flat)
        (delta,), (factors,) = parsed.spec.deltas, parsed.factors
        offset, values = getattr(delta, f"{vector}_offset"), getattr(factors, vector)
        assert torch.equal(flat[offset : offset + 32], values)
        assert flat.isfinite().all()


def test_trained_tokens_are_rows_of_one_hot_deltas_and_of_a_tied_head_too():
    trained, tokens = next(iter(ROWS.values())), [5, 39, 0]
    for base, count in ((UNTIED, 2), (TIED, 3)):
        parsed = load({**PLAIN, **ROWS}, base=base, trainable_token_indices=tokens)
        assert len(parsed.factors) == count
        for factors, delta in zip(parsed.factors[1:], parsed.spec.deltas[1:], strict=True):
            table = WEIGHTS.w[delta.linear] + delta.scale * factors.bt.t() @ factors.a
            table = table if base.linears[delta.linear].role == "head" else table.t()
            torch.testing.assert_close(table[tokens], trained)
            rest = [token for token in range(VOCAB) if token not in tokens]
            assert torch.equal(table[rest], WEIGHTS.w[2][rest])
    versions = {
        load({**PLAIN, **ROWS}, trainable_token_indices=given).spec.version
        for given in ([5, 39, 0], [5, 39, 1])
    }
    assert len(versions) == 2


def tied_pairs(table: str = TABLE) -> dict[str, torch.Tensor]:
    """One delta at the embedding and, transposed, at the head, as PEFT saves it."""
    ends = {name.replace(TABLE, table): t for name, t in pair(TABLE, WIDTH, VOCAB).items()}
    a, b = ends.values()
    return {
        **ends,
        f"{HEAD}.lora_A.weight": b.t().contiguous(),
        f"{HEAD}.lora_B.weight": a.t().contiguous(),
    }


TYING: dict[str, Any] = {"ensure_weight_tying": True}


@pytest.mark.parametrize(
    "targets", [["embed_tokens"], ["model.embed_tokens"], r"(?:embed_tokens|^model\.embed_tokens$)"]
)
def test_a_tied_delta_is_wanted_at_both_ends_and_only_there(targets):
    config = {"target_modules": targets, **TYING}
    assert load(tied_pairs(), base=TIED, **config).report.matched == 2
    with pytest.raises(AdapterInvalid, match="does not select"):
        load(tied_pairs(), base=UNTIED, **config)
    with pytest.raises(AdapterInvalid, match="partial"):
        load(pair(TABLE, WIDTH, VOCAB), base=TIED, **config)
    assert load(pair(TABLE, WIDTH, VOCAB), base=UNTIED, **config).report.matched == 1


def test_an_embedding_of_a_name_that_peft_does_not_know_is_adapted_alone():
    path = "transformer.wte"
    table = f"base_model.model.{path}"
    base = replace(TIED, linears=(LINEARS[0], replace(LINEARS[1], path=path), LINEARS[2]))
    ends = tied_pairs(table)
    alone = {name: tensor for name, tensor in ends.items() if name.startswith(table)}
    for targets in (["wte"], r".*\.wte"):
        config = {"target_modules": targets, **TYING}
        assert load(alone, base=base, **config).report.matched == 1
        with pytest.raises(AdapterInvalid, match="does not select"):
            load(ends, base=base, **config)
    # of these PEFT knows the head, and adapts both
    config = {"target_modules": ["wte", "lm_head"], **TYING}
    assert load(ends, base=base, **config).report.matched == 2
    with pytest.raises(AdapterInvalid, match="partial"):
        load(alone, base=base, **config)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_tied_head_that_is_not_the_embedding_transposed_is_refused_by_name(name):
    config = {"target_modules": ["embed_tokens"], **TYING}
    other = tied_pairs()
    other[f"{HEAD}.{name}.weight"] = other[f"{HEAD}.{name}.weight"] + 2.0**-10
    with pytest.raises(AdapterInvalid, match=rf"ensure_weight_tying.*{HEAD}\.{name}"):
        load(other, base=TIED, **config)
    apart = {"target_modules": ["embed_tokens", "lm_head"]}
    assert load(other, base=TIED, **apart).report.matched == 2


def test_without_a_base_the_adapter_of_a_tied_embedding_is_told_like_any_other():
    config = {"target_modules": ["embed_tokens", "q_proj"], **TYING}

    def alone(tensors: dict[str, torch.Tensor], **config: Any) -> ParsedAdapter:
        raw = make_raw(make_config(**config), tensors)
        return read_adapter(raw, own_linears(raw), dtype=torch.float32)

    assert alone({**tied_pairs(), **PLAIN}, **config).report.matched == 3
    embedding = pair(TABLE, WIDTH, VOCAB)
    assert alone(embedding, target_modules=["embed_tokens"]).report.matched == 1
    with pytest.raises(AdapterInvalid, match="does not select"):
        alone({**tied_pairs(), **PLAIN}, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterInvalid, match="does not select"):
        alone({**tied_pairs(), **PLAIN}, target_modules=["embed_tokens"], **TYING)
    with pytest.raises(AdapterInvalid, match=r"trainable_token_indices.*name the base"):
        alone({**PLAIN, **ROWS}, trainable_token_indices=[1, 2, 3])


def test_a_saved_copy_of_the_base_changes_nothing_and_wants_the_base():
    name = f"{HEAD}.base_layer.weight"
    head = {**pair(HEAD, VOCAB, WIDTH), name: WEIGHTS.w[2].contiguous()}
    parsed = load(head, target_modules=["lm_head"])
    assert parsed.report.copies == (name,)
    assert parsed.report.matched == 1
    with pytest.raises(AdapterInvalid, match="name the base"):
        load(head, weights=None, target_modules=["lm_head"])


THIRD = torch.tensor([3])
TOKENS: dict[str, Any] = {"trainable_token_indices": [1, 2, 3]}
BAD = {
    "magnitude missing": (PLAIN, {"use_dora": True}, AdapterInvalid, "no lora_magnitude_vector"),
    "magnitude short": (
        {**PLAIN, f"{Q}.lora_magnitude_vector": torch.ones(31)},
        {"use_dora": True},
        AdapterInvalid,
        r"expected \[32\]",
    ),
    **{
        f"magnitude {value}": (
            {**PLAIN, f"{Q}.lora_magnitude_vector": torch.ones(32).index_fill(0, THIRD, value)},
            {"use_dora": True},
            AdapterInvalid,
            "q_proj.lora_magnitude_vector' has NaN or infinite",
        )
        for value in (torch.nan, torch.inf, -torch.inf)
    },
    "bias missing": (PLAIN, {"lora_bias": True}, AdapterInvalid, "no lora_B.bias"),
    "bias beside DoRA": (
        {**PLAIN, **BIAS, **MAGNITUDE},
        {"lora_bias": True, "use_dora": True},
        AdapterInvalid,
        "beside use_dora",
    ),
    "rows missing": (PLAIN, TOKENS, AdapterInvalid, "no token rows"),
    "rows unnamed": ({**PLAIN, **ROWS}, {}, AdapterInvalid, "does not name its module"),
    "rows of another width": (
        {**PLAIN, f"{TABLE}.token_adapter.trainable_tokens_delta": torch.ones(3, 63)},
        TOKENS,
        AdapterMismatch,
        "expected",
    ),
    "token past the vocabulary": (
        {**PLAIN, **ROWS},
        {"trainable_token_indices": [1, 2, 40]},
        AdapterMismatch,
        "another base",
    ),
    "linear for an embedding": (
        {
            f"{TABLE}.lora_A.weight": torch.ones(4, VOCAB),
            f"{TABLE}.lora_B.weight": torch.ones(64, 4),
        },
        {"target_modules": ["embed_tokens"]},
        AdapterMismatch,
        "is an embedding",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_by_name(name):
    tensors, config, error, message = BAD[name]
    with pytest.raises(error, match=message):
        load(tensors, **config)


def test_limits_and_missing_weights_are_named():
    with pytest.raises(AdapterTooLarge, match="3 tokens"):
        load({**pair(Q, 32, WIDTH, rank=2), **ROWS}, limits=Limits(rank=2), r=2, **TOKENS)
    with pytest.raises(AdapterInvalid, match="not at hand"):
        load({**PLAIN, **ROWS}, weights=None, **TOKENS)
