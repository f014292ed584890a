"""Whole embeddings and heads beside an adapter: the exact deltas they are, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.parse import ParsedAdapter, read_adapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from fader_adapters.weightspace.alone import own_linears
from tests.adapters.peft_files import make_config, make_raw

VOCAB, WIDTH = 96, 32
LINEARS = (
    LinearSpec("model.layers.0.q_proj", WIDTH, 32, 0),
    LinearSpec("model.embed_tokens", VOCAB, WIDTH, None, conv1d=True, role="embedding"),
    LinearSpec("lm_head", WIDTH, VOCAB, None, role="head"),
)
UNTIED = BaseSpec(LINEARS, Digest("0" * 64), "test")
TIED = BaseSpec(LINEARS, Digest("0" * 64), "test", tied=True)
Q, TABLE, HEAD = (f"base_model.model.{linear.path}" for linear in LINEARS)
RANDOM = torch.Generator().manual_seed(3)


class Weights:
    """Random W; the head's is the table of a tied base. The table has values that bf16 has."""

    def __init__(self, *, tied: bool) -> None:
        self.tables = [torch.randn(VOCAB, WIDTH, generator=RANDOM).bfloat16().float()]
        self.tables *= 2
        if not tied:
            self.tables[1] = torch.randn(VOCAB, WIDTH, generator=RANDOM)

    def panels(self, linear: int) -> Iterator[torch.Tensor]:
        w = (torch.ones(32, WIDTH), self.tables[0].t(), self.tables[1])[linear]
        yield from w.split(7)


OWN = {base: Weights(tied=base.tied) for base in (UNTIED, TIED)}
LORA = {
    f"{Q}.lora_A.weight": torch.randn(4, WIDTH, generator=RANDOM),
    f"{Q}.lora_B.weight": torch.randn(32, 4, generator=RANDOM),
}
BOTH: dict[str, Any] = {"modules_to_save": ["lm_head", "embed_tokens"]}


def load(
    tensors: dict[str, torch.Tensor],
    *,
    base: BaseSpec = UNTIED,
    weights: bool = True,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> ParsedAdapter:
    raw = make_raw(make_config(**{"target_modules": ["q_proj"], **config}), {**LORA, **tensors})
    return read_adapter(raw, base, dtype=dtype, weights=OWN[base] if weights else None)


def drawn(base: BaseSpec, end: int, rows: object = None) -> torch.Tensor:
    """The table of an end (0: embedding, 1: head) with other values in some rows."""
    table = OWN[base].tables[end].clone()
    some: Any = slice(None) if rows is None else rows
    noise = torch.randn(VOCAB, WIDTH, generator=RANDOM).bfloat16().float()
    table[some] = noise[some]
    return table


def given(parsed: ParsedAdapter, base: BaseSpec, gamma: float = 1.0) -> list[torch.Tensor]:
    """What embedding and head [VOCAB, WIDTH] become: W ∘ (1 + γ·gain) + γ·s·B·A, in fp64."""
    found = [table.double() for table in OWN[base].tables]
    for delta, factors in zip(parsed.spec.deltas, parsed.factors, strict=True):
        role = base.linears[delta.linear].role
        if role == "linear":
            continue
        end = int(role == "head")
        w = found[end] if end else found[end].t()
        if factors.gain is not None:
            w = w * (1 + gamma * factors.gain.double())[:, None]
        w = w + gamma * delta.scale * (factors.bt.double().t() @ factors.a.double())
        found[end] = w if end else w.t()
    return found


FEW, MANY = [0, 5, 95], list(range(0, 96, 2))


@pytest.mark.parametrize("rows", [FEW, MANY, None], ids=["few", "half", "all"])
@pytest.mark.parametrize("base", [UNTIED, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_table_takes_the_place_of_its_module_alone(rows, base, dtype):
    for end, (name, path) in enumerate((("embed_tokens", TABLE), ("lm_head", HEAD))):
        saved = drawn(base, end, rows)
        tensors = {f"{path}.weight": saved}
        parsed = load(tensors, base=base, dtype=dtype, modules_to_save=[name])
        become = given(parsed, base)
        assert torch.equal(become[end], saved.double())
        assert torch.equal(become[1 - end], OWN[base].tables[1 - end].double())
        (told,) = [m for m in parsed.report.modules if m.path in path]
        moved = float((saved - OWN[base].tables[end]).norm())
        assert told.delta_norm == pytest.approx(moved, rel=1e-4)
        assert parsed.report.kinds == ("modules_to_save",)
        assert parsed.report.copies == ()
        half = given(parsed, base, 0.5)[end]
        torch.testing.assert_close(half, (saved + OWN[base].tables[end]).double() / 2)
        assert parsed.spec.deltas[-1].rank <= WIDTH


@pytest.mark.parametrize("base", [UNTIED, TIED], ids=["untied", "tied"])
def test_the_base_is_only_read(base):
    before = [table.clone() for table in OWN[base].tables]
    for rows in (FEW, None):
        saved = {f"{p}.weight": drawn(base, end, rows) for end, p in enumerate((TABLE, HEAD))}
        assert len(load(saved, base=base, **BOTH).spec.deltas) == 3
    assert all(map(torch.equal, before, OWN[base].tables))


def test_a_table_that_overflows_its_dtype_in_memory_is_refused():
    saved = {f"{HEAD}.weight": drawn(UNTIED, 1)}
    saved[f"{HEAD}.weight"][5, 3] = 7e4
    assert load(saved, modules_to_save=["lm_head"]).report.matched == 2
    with pytest.raises(AdapterInvalid, match=r"infinite values as torch\.float16"):
        load(saved, dtype=torch.float16, modules_to_save=["lm_head"])


def test_a_table_costs_its_rows_or_itself():
    vocabulary, width = VOCAB, WIDTH
    for rows, wanted in ((FEW, 3), (MANY, width), (None, width)):
        parsed = load({f"{HEAD}.weight": drawn(UNTIED, 1, rows)}, modules_to_save=["lm_head"])
        assert parsed.spec.deltas[-1].rank == wanted
        parsed = load({f"{TABLE}.weight": drawn(UNTIED, 0, rows)}, modules_to_save=["embed_tokens"])
        assert parsed.spec.deltas[-1].rank == min(2 * wanted, width)
    own = load({f"{HEAD}.weight": drawn(UNTIED, 1)}, modules_to_save=["lm_head"]).spec.numel
    assert own - load({f"{HEAD}.weight": OWN[UNTIED].tables[1]}).spec.numel == (
        width * vocabulary + width * width + vocabulary
    )


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["model.embed_tokens"]])
def test_with_ensure_weight_tying_one_table_is_both_ends_of_a_tied_base(saved):
    table = drawn(TIED, 0)
    config = {"modules_to_save": saved, "ensure_weight_tying": True}
    ends = {f"{TABLE}.weight": table, f"{HEAD}.weight": table.clone()}
    become = given(load(ends, base=TIED, **config), TIED)
    assert all(torch.equal(end, table.double()) for end in become)
    with pytest.raises(AdapterInvalid, match="differ, and PEFT loads both"):
        load({**ends, f"{HEAD}.weight": drawn(TIED, 1)}, base=TIED, **config)
    for name in ends:
        with pytest.raises(AdapterInvalid, match="partial"):
            load({name: table}, base=TIED, **config)


def test_a_copy_of_the_base_is_loaded_into_both_ends_of_a_tied_one():
    table, head = drawn(TIED, 0, FEW), drawn(UNTIED, 1, FEW)
    for name in (f"{TABLE}.weight", f"{HEAD}.weight"):
        become = given(load({name: table}, base=TIED), TIED)
        assert all(torch.equal(end, table.double()) for end in become)
    become = given(load({f"{HEAD}.weight": head}), UNTIED)
    assert torch.equal(become[1], head.double())
    assert torch.equal(become[0], OWN[UNTIED].tables[0].double())
    with pytest.raises(AdapterInvalid, match="differ, and PEFT loads both"):
        load({f"{TABLE}.weight": table, f"{HEAD}.weight": drawn(TIED, 1, FEW)}, base=TIED)
    # what modules_to_save has beside it: its own once more, and the base's
    own = drawn(TIED, 1)
    kept = {
        f"{HEAD}.weight": own,
        f"{HEAD}.modules_to_save.weight": own.clone(),
        f"{HEAD}.original_module.weight": table,
        f"{TABLE}.weight": table.clone(),
    }
    become = given(load(kept, base=TIED, modules_to_save=["lm_head"]), TIED)
    assert torch.equal(become[0], table.double())
    assert torch.equal(become[1], own.double())
    kept[f"{HEAD}.modules_to_save.weight"] += 1
    with pytest.raises(AdapterInvalid, match="differ, and PEFT loads both"):
        load(kept, base=TIED, modules_to_save=["lm_head"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_that_are_the_bases_in_any_dtype_change_nothing_and_are_told(dtype):
    copies = {
        f"{TABLE}.weight": OWN[UNTIED].tables[0].to(dtype),
        f"{HEAD}.weight": OWN[UNTIED].tables[1].to(dtype),
    }
    for config in ({}, BOTH):
        parsed = load(copies, **config)
        assert parsed.report.copies == tuple(copies)
        assert [delta.linear for delta in parsed.spec.deltas] == [0]
    (name, table), *_ = copies.items()
    table = table.clone()
    table[3, 4] += 1
    assert [delta.rank for delta in load({name: table}).spec.deltas] == [4, 2]


def test_lora_stands_on_a_copy_that_was_trained():
    head = {
        f"{HEAD}.lora_A.weight": torch.randn(4, WIDTH, generator=RANDOM),
        f"{HEAD}.lora_B.weight": torch.randn(VOCAB, 4, generator=RANDOM),
    }
    table = {
        f"{TABLE}.lora_embedding_A": torch.randn(4, VOCAB, generator=RANDOM),
        f"{TABLE}.lora_embedding_B": torch.randn(WIDTH, 4, generator=RANDOM),
    }
    for rows in (FEW, None):
        for end, (path, pair) in enumerate(((TABLE, table), (HEAD, head))):
            saved = drawn(UNTIED, end, rows)
            a, b = pair.values()
            lora = 2.0 * b.double() @ a.double()
            targets = ["q_proj", path.rpartition(".")[2]]
            tensors = {**pair, f"{path}.base_layer.weight": saved}
            parsed = load(tensors, target_modules=targets)
            wanted = saved.double() + (lora if end else lora.t())
            torch.testing.assert_close(given(parsed, UNTIED)[end], wanted, rtol=1e-6, atol=1e-6)
            moved = float((wanted - OWN[UNTIED].tables[end].double()).norm())
            assert parsed.report.modules[-1].delta_norm == pytest.approx(moved, rel=1e-5)


def test_a_smaller_vocabulary_leaves_the_bases_rows_beyond_it_and_a_larger_one_is_refused():
    for base in (UNTIED, TIED):
        for rows in (FEW[:2], None):
            saved = [drawn(base, end, rows)[:80] for end in (0, 1)]
            tensors = {f"{TABLE}.weight": saved[0], f"{HEAD}.weight": saved[1]}
            for end, become in enumerate(given(load(tensors, base=base, **BOTH), base)):
                assert torch.equal(become[:80], saved[end].double())
                assert torch.equal(become[80:], OWN[base].tables[end][80:].double())
    for path in (TABLE, HEAD):
        larger = torch.cat([drawn(UNTIED, 0), torch.ones(1, WIDTH)])
        with pytest.raises(AdapterMismatch, match=r"97 tokens, the base 96.*resize_token_embed"):
            load({f"{path}.weight": larger}, modules_to_save=[path.rpartition(".")[2]])


def test_what_is_trained_whole_is_not_what_a_copy_is():
    """One content, two versions: a copy is at both ends of a tied base."""
    tensors = {f"{HEAD}.weight": drawn(TIED, 1)}
    versions = {
        load(tensors, base=TIED, **config).spec.version
        for config in ({}, {"modules_to_save": ["lm_head"]})
    }
    assert len(versions) == 2


def test_names_that_mean_nothing_are_told():
    parsed = load({f"{HEAD}.weight": drawn(UNTIED, 1)}, modules_to_save=["wte", "lm_head"])
    assert parsed.report.unmatched == ("wte",)
    also = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]}
    assert load({f"{HEAD}.weight": drawn(UNTIED, 1)}, **also).report.matched == 2


HEAD_ONLY: dict[str, Any] = {"modules_to_save": ["lm_head"]}
LORA_HEAD = {
    f"{HEAD}.lora_A.weight": torch.ones(4, WIDTH),
    f"{HEAD}.lora_B.weight": torch.ones(VOCAB, 4),
}
TOKENS = {f"{HEAD}.token_adapter.trainable_tokens_delta": torch.ones(2, WIDTH)}
ONES = torch.ones(VOCAB, WIDTH)
BAD: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], type[Exception], str]] = {
    "config alone": ({}, HEAD_ONLY, AdapterInvalid, "'lm_head'.*no weight for it: a partial"),
    "other width": (
        {f"{HEAD}.weight": ONES[:, 1:].clone()},
        HEAD_ONLY,
        AdapterMismatch,
        "another base",
    ),
    "a vector": ({f"{HEAD}.weight": torch.ones(VOCAB)}, HEAD_ONLY, AdapterMismatch, "has shape"),
    "integers": ({f"{HEAD}.weight": ONES.int()}, HEAD_ONLY, AdapterInvalid, "I32"),
    "NaN": (
        {f"{HEAD}.weight": ONES.index_fill(0, torch.tensor([95]), torch.nan)},
        HEAD_ONLY,
        AdapterInvalid,
        "lm_head.weight' has NaN",
    ),
    "Inf in a copy": (
        {f"{TABLE}.weight": ONES * torch.inf},
        {},
        AdapterInvalid,
        "embed_tokens.weight' has NaN or inf",
    ),
    "kept and unnamed": (
        {f"{HEAD}.modules_to_save.weight": ONES},
        {},
        AdapterInvalid,
        "modules_to_save of adapter_config.json does not name",
    ),
    "norm": (
        {"base_model.model.model.norm.weight": torch.ones(WIDTH)},
        {"modules_to_save": ["norm"]},
        AdapterInvalid,
        "model.norm.weight' is a whole module.*leave 'norm' out",
    ),
    "linear": (
        {f"{Q[:-6]}v_proj.weight": torch.ones(32, WIDTH)},
        {"modules_to_save": ["v_proj"]},
        AdapterInvalid,
        "v_proj.weight' is a whole module",
    ),
    "adapted linear": ({f"{Q}.weight": ONES}, {}, AdapterInvalid, "q_proj.weight' is a whole"),
    "bias": ({f"{HEAD}.bias": torch.ones(VOCAB)}, HEAD_ONLY, AdapterInvalid, "trained bias"),
    "LoRA too": (
        {**LORA_HEAD, f"{HEAD}.modules_to_save.weight": ONES},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "lm_head"]},
        AdapterInvalid,
        "'lm_head', which has LoRA factors",
    ),
    "tokens too": (
        {**TOKENS, f"{HEAD}.weight": ONES},
        {"modules_to_save": ["lm_head"], "trainable_token_indices": {"lm_head": [1, 2]}},
        AdapterInvalid,
        "'lm_head', which has trained tokens",
    ),
    "tokens on a trained copy": (
        {**TOKENS, f"{HEAD}.token_adapter.base_layer.weight": ONES},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
        AdapterInvalid,
        "trained tokens over a copy of the base's weight that differs",
    ),
    "DoRA on a trained copy": (
        {
            **LORA_HEAD,
            f"{HEAD}.lora_magnitude_vector": torch.ones(VOCAB),
            f"{HEAD}.base_layer.weight": ONES,
            f"{Q}.lora_magnitude_vector": torch.ones(32),
        },
        {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
        AdapterInvalid,
        "DoRA over a copy",
    ),
    "not names": ({}, {"modules_to_save": "lm_head"}, AdapterInvalid, "expected a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_served_exactly_is_refused_by_name(name):
    tensors, config, error, message = BAD[name]
    with pytest.raises(error, match=message):
        load(tensors, **config)


def test_without_the_base_only_copies_of_adapted_modules_are_taken_on_trust():
    tensors = {f"{HEAD}.weight": drawn(UNTIED, 1)}
    with pytest.raises(AdapterInvalid, match="name the base"):
        load(tensors, weights=False, **HEAD_ONLY)
    raw = make_raw(make_config(target_modules=["q_proj"], **HEAD_ONLY), {**LORA, **tensors})
    with pytest.raises(AdapterInvalid, match="name the base"):
        own_linears(raw)


def test_lora_of_a_tied_head_stands_on_trained_tokens():
    rows = torch.randn(2, WIDTH, generator=RANDOM)
    tensors = {**LORA_HEAD, f"{TABLE}.token_adapter.trainable_tokens_delta": rows}
    config = {"trainable_token_indices": [7, 3], "target_modules": ["q_proj", "lm_head"]}
    become = given(load(tensors, base=TIED, **config), TIED)
    table = OWN[TIED].tables[0].double()
    table[[7, 3]] = rows.double()
    torch.testing.assert_close(become[0], table)
    torch.testing.assert_close(become[1], table + 8.0, rtol=1e-6, atol=1e-6)
    apart = {
        "trainable_token_indices": {"lm_head": [7, 3]},
        "target_modules": ["q_proj", "lm_head"],
    }
    with pytest.raises(AdapterInvalid, match="both LoRA factors and trained tokens"):
        load({**LORA_HEAD, **TOKENS}, **apart)


def test_beside_invocation_tokens_only_copies_of_the_bases_own_are_taken():
    """PEFT applies whole modules everywhere, before the invocation, too."""
    activated = {"alora_invocation_tokens": [5, 6]}
    own = {f"{TABLE}.weight": OWN[UNTIED].tables[0]}
    assert load(own, **activated).spec.invocation == (5, 6)
    trained = {f"{TABLE}.weight": drawn(UNTIED, 0, [3])}
    load(trained)
    with pytest.raises(AdapterInvalid, match=r"a copy of 'model\.embed_tokens' that differs"):
        load(trained, **activated)
    saved = {"modules_to_save": ["embed_tokens"]}
    load(trained, **saved)
    with pytest.raises(AdapterInvalid, match="whole modules would change what comes before"):
        load(trained, **saved, **activated)
