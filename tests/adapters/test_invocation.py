"""alora_invocation_tokens: what is accepted, what is refused, and that PEFT refuses it, too, or
takes it for something that nobody can mean."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from fader_adapters import attach
from fader_adapters.changes import Changes
from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge, BlendInvalid
from fader_adapters.spec import Blend, Term
from fader_adapters.weightspace.alone import own_linears
from fader_adapters.weightspace.compress import compress
from fader_adapters.weightspace.merge import merge
from fader_adapters.weightspace.terms import Ingredient
from tests.adapters.peft_files import BASE, make_config, make_raw, read
from tests.adapters.test_kinds_checked import (
    HEAD,
    MAGNITUDE,
    PLAIN,
    ROWS,
    TABLE,
    VOCAB,
    WIDTH,
    pair,
)
from tests.adapters.test_kinds_checked import load as load_kind
from tests.support.families import CONFIGS, write_family
from tests.support.many_families import MANY, write_many
from tests.support.peft_adapters import write_adapter

KEY = "alora_invocation_tokens"
A = {KEY: [5, 6]}


def test_the_tokens_are_told_and_a_part_of_the_version():
    plain, one, other = (read(make_raw(make_config(**extra))) for extra in ({}, A, {KEY: [6, 5]}))
    assert plain.spec.invocation == plain.report.invocation == ()
    assert one.spec.invocation == one.report.invocation == (5, 6)
    assert one.report.kinds == ("alora",)
    assert len({plain.spec.version, one.spec.version, other.spec.version}) == 3
    null = read(make_raw(make_config(**{KEY: None})))
    assert null.spec.version == plain.spec.version


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (5, AdapterInvalid, "list of token numbers"),
    "text": ("<|tool|>", AdapterInvalid, "list of token numbers"),
    "empty text": ("", AdapterInvalid, "list of token numbers"),
    "an object": ({}, AdapterInvalid, "list of token numbers"),
    "false": (False, AdapterInvalid, "list of token numbers"),
    "true": (True, AdapterInvalid, "list of token numbers"),
    "zero": (0, AdapterInvalid, "list of token numbers"),
    "texts": (["a"], AdapterInvalid, "list of token numbers"),
    "booleans": ([True], AdapterInvalid, "list of token numbers"),
    "fractions": ([1.0], AdapterInvalid, "list of token numbers"),
    "lists": ([[1]], AdapterInvalid, "list of token numbers"),
    "negative": ([1, -1], AdapterInvalid, "list of token numbers"),
    "none": ([], AdapterInvalid, "or null for an ordinary LoRA"),
    "beyond the vocabulary": ([5, 128], AdapterMismatch, "token 128, the base has 128"),
    "far beyond": ([10**30], AdapterMismatch, "the base has 128"),
    "very many": ([1] * 257, AdapterTooLarge, "257 tokens, the limit is 256"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_are_no_tokens_is_refused(name):
    value, error, told = WRONG[name]
    with pytest.raises(error, match=told):
        read(make_raw(make_config(**{KEY: value})))


@pytest.mark.parametrize("tokens", [[0], [127], [5] * 256])
def test_what_are_is_not(tokens):
    assert read(make_raw(make_config(**{KEY: tokens}))).spec.invocation == tuple(tokens)


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION", ...])
def test_other_tasks_are_refused_which_never_apply_it_in_peft(task):
    read(make_raw(make_config(task_type=task)))
    with pytest.raises(AdapterInvalid, match='expected "CAUSAL_LM" beside alora_invocation_tokens'):
        read(make_raw(make_config(task_type=task, **A)))


def made(**config: Any) -> Any:
    """PEFT's own model, its adapter not zero."""
    config = {"task_type": "CAUSAL_LM", "init_lora_weights": False} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())
        return peft.get_peft_model(base.eval(), peft.LoraConfig(r=4, **config)).eval()


@torch.inference_mode()
def applies(model: Any) -> bool:
    ids = torch.tensor([[1, 5, 6, 7]])
    under = model(input_ids=ids).logits
    with model.disable_adapter():
        return not torch.equal(under, model(input_ids=ids).logits)


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported")
def test_pefts_models_of_other_tasks_never_apply_it():
    assert applies(made(target_modules=["q_proj"], **A))
    assert not applies(made(target_modules=["q_proj"], **A, task_type=None))
    assert applies(made(target_modules=["q_proj"], task_type=None))


def test_no_tokens_are_an_ordinary_lora_to_peft_or_one_that_never_applies_by_the_kind_of_weight(
    tmp_path: Path,
):
    config = {"target_modules": ["q_proj"], KEY: []}
    assert applies(made(**config))
    four_bits = transformers.AutoModelForCausalLM.from_pretrained(
        write_family("llama", tmp_path),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **config)
    assert not applies(peft.get_peft_model(four_bits, lora).eval())


OTHERS = {
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_peft_refuses_beside_it(name):
    made(**OTHERS[name])
    with pytest.raises(ValueError, match="unsupported variant"):
        made(**OTHERS[name], **A)


def test_dora_trained_tokens_and_an_adapted_embedding_are_refused():
    with pytest.raises(AdapterInvalid, match=r"use_dora.*no DoRA that is activated"):
        load_kind({**PLAIN, **MAGNITUDE}, use_dora=True, **A)
    rows = {"trainable_token_indices": [1, 2, 3]}
    load_kind({**PLAIN, **ROWS}, **rows)
    with pytest.raises(AdapterInvalid, match="trained tokens would change what comes before"):
        load_kind({**PLAIN, **ROWS}, **rows, **A)
    table = {**PLAIN, **pair(TABLE, WIDTH, VOCAB)}
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    load_kind(table, **targets)
    with pytest.raises(AdapterInvalid, match=r"embed_tokens.*PEFT activates linears alone"):
        load_kind(table, **targets, **A)
    head = load_kind(
        {**PLAIN, **pair(HEAD, VOCAB, WIDTH)}, target_modules=["q_proj", "lm_head"], **A
    )
    assert head.spec.invocation == (5, 6)


def test_the_embedding_says_how_many_tokens_there_are_where_it_is_known():
    load_kind(PLAIN, **{KEY: [VOCAB - 1]})
    with pytest.raises(AdapterMismatch, match=f"token {VOCAB}, the base has {VOCAB}"):
        load_kind(PLAIN, **{KEY: [VOCAB]})
    raw = make_raw(make_config(**{KEY: [10**6]}))
    alone = own_linears(raw)  # nobody knows
    assert read(raw, alone).spec.invocation == (10**6,)


@pytest.mark.parametrize("target", ["mlp.experts.down_proj", "mlp.gate.weight"])
def test_experts_and_routers_are_refused_as_by_peft(target: str, tmp_path: Path):
    base = write_many(*MANY["mixtral"], tmp_path / "base")
    adapter = write_adapter(
        base, tmp_path / "one", rank=4, seed=1, target_modules=[], target_parameters=[target]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    attached = attach(model, arena_bytes=1 << 22)
    attached.load("one", adapter)
    path = adapter / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{KEY}": null', f'"{KEY}": [5]'))
    with pytest.raises(AdapterInvalid, match="which is no linear"):
        attached.load("two", adapter)
    attached.detach()
    given = {"target_modules": [], "target_parameters": [target]}
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **given, **A)
    with pytest.raises(ValueError, match="unsupported variant"):
        peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)


def test_no_weights_are_made_of_it(tmp_path: Path):
    base = write_family("llama", tmp_path / "base")
    plain = write_adapter(base, tmp_path / "plain", rank=4, seed=1)
    one = write_adapter(base, tmp_path / "one", rank=4, seed=2, **A)
    blends = [Ingredient(plain), Ingredient(one)], [Ingredient(one, -0.5)]
    for blend in blends:
        with pytest.raises(BlendInvalid, match=r"one.*activated LoRA.*serve it as an adapter"):
            merge(base, blend, tmp_path / "merged", form="nf4")
        with pytest.raises(BlendInvalid, match=r"one.*activated LoRA.*serve it as an adapter"):
            compress(blend, tmp_path / "small", rank=8)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "small").exists()
    merge(base, blends[0][:1], tmp_path / "merged", form="nf4")
    compress(blends[0][:1], tmp_path / "small", rank=8)


def test_nor_a_lane():
    plain = read(make_raw())
    one = read(make_raw(make_config(**A)))
    adapters: Any = {parsed.spec.version: parsed for parsed in (plain, one)}
    Changes(Blend.of([Term(plain.spec.version, 1.0)]), adapters, BASE)
    both = Blend.of([Term(version, 0.5) for version in adapters])
    with pytest.raises(BlendInvalid, match=f"{one.spec.version[:12]} is an activated LoRA"):
        Changes(both, adapters, BASE)


def test_a_notebook_has_no_places_in_prompts(tmp_path: Path):
    base = write_family("llama", tmp_path / "base")
    one = write_adapter(base, tmp_path / "one", rank=4, seed=2, **A)
    attached = attach(transformers.AutoModelForCausalLM.from_pretrained(base), arena_bytes=1 << 22)
    with pytest.raises(BlendInvalid, match="activated LoRA"):
        attached.load("one", one)
    attached.detach()
