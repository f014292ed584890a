"""Names that a base has packed in one part and split in another: what the adapter's model had."""

import pytest

from fader_adapters.errors import AdapterInvalid
from fader_adapters.spec import BaseSpec, Digest, LinearSpec
from tests.adapters.peft_files import make_config, make_raw, make_tensors, read

TEXT, TOWER = "model.language_model.layers", "model.visual.blocks"
PACKED = ("gate_up_proj",)
SPLIT = ("gate_proj", "up_proj")


def part(prefix: str, names: tuple[str, ...]) -> list[LinearSpec]:
    """Two layers of these linears."""
    return [
        LinearSpec(
            f"{prefix}.{layer}.mlp.{name}", 64, 192 // len(names), layer,
            parts=(96, 96) if names == PACKED else (),
        )
        for layer in range(2)
        for name in names
    ]  # fmt: skip


def base_of(text: tuple[str, ...], tower: tuple[str, ...]) -> BaseSpec:
    return BaseSpec((*part(TEXT, text), *part(TOWER, tower)), Digest("0" * 64), "test")


MIXED = base_of(PACKED, SPLIT)


def adapter(linears: list[LinearSpec], names: tuple[str, ...]):
    """Of a model with these linears, by these names; `""`: the linears' own."""
    model = BaseSpec(tuple(linears), Digest("1" * 64), "test")
    return make_raw(make_config(target_modules=list(names)), make_tensors(model, names))


def test_a_name_the_base_has_somewhere_means_only_those():
    found = read(adapter(part(TEXT, PACKED), PACKED), MIXED)
    assert found.report.matched == 2
    assert {MIXED.linears[delta.linear].path for delta in found.spec.deltas} == {
        f"{TEXT}.{layer}.mlp.gate_up_proj" for layer in range(2)
    }
    tower = read(adapter(part(TOWER, SPLIT), SPLIT), MIXED)
    assert {MIXED.linears[delta.linear].path for delta in tower.spec.deltas} == {
        f"{TOWER}.{layer}.mlp.{name}" for layer in range(2) for name in SPLIT
    }


@pytest.mark.parametrize("names", [PACKED, SPLIT])
def test_paths_of_the_file_tell_that_its_model_had_both_alike(names):
    everywhere = [*part(TEXT, names), *part(TOWER, names)]
    found = read(adapter(everywhere, names), MIXED)
    assert {delta.linear for delta in found.spec.deltas} == set(range(len(MIXED.linears)))
    older = [
        LinearSpec(item.path.replace("language_model.", ""), 64, item.out_features, item.layer)
        for item in part(TEXT, names)
    ]
    assert len({delta.linear for delta in read(adapter(older, names), MIXED).spec.deltas}) == 2


def test_one_layer_of_a_part_is_partial_and_no_other_part():
    everywhere = [*part(TEXT, PACKED), *part(TOWER, PACKED)]
    with pytest.raises(AdapterInvalid, match=r"blocks\.1\.mlp\.gate_up_proj.*partial"):
        read(adapter(everywhere[:-1], PACKED), MIXED)


def test_a_base_without_the_name_takes_it_for_all_its_siblings():
    base = base_of(SPLIT, SPLIT)
    with pytest.raises(AdapterInvalid, match=r"visual.*partial"):
        read(adapter(part(TEXT, PACKED), PACKED), base)
    found = read(adapter([*part(TEXT, PACKED), *part(TOWER, PACKED)], PACKED), base)
    assert len({delta.linear for delta in found.spec.deltas}) == len(base.linears)
