"""Bases whose sequences run one by one between their linears: PEFT's answers, a row's own bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fader_server.errors import EngineFault, ModelUnsupported
from fader_server.model import alone, rehearsal
from fader_server.model import solo as solo_module
from fader_server.model.mixers import Mixers
from fader_server.model.solo import SoloForward
from fader_server.model.states import StateShape
from tests.server.parity.test_many_families import asks, equals_peft
from tests.support.families import write_family
from tests.support.many_families import write_many
from tests.support.own_states import (
    LIMITS,
    Setting,
    Twice,
    a_forgotten_state_shows,
    a_half_computed_step_runs_again,
    a_lane_equals_peft,
    a_merge_is_measured,
    bits,
    nothing_is_found,
    same_bits_alone,
    sent_back,
)
from tests.support.solo_families import SOLO
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = frozenset({"bloom", "falcon-40b", "falcon-rw", "lfm2"})
STATEFUL = "qwen3.5"
ELSEWHERE = "reference"
"""The backend: native kernels take states of all rows at once (`test_packed_states`)."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(SOLO)],
)
def test_mixed_batches_equal_peft(family: str, tmp_path: Path):
    base = write_many(*SOLO[family], tmp_path / "base")
    world = TinyWorld(base, backend=ELSEWHERE)
    assert world.base.solo is not None
    equals_peft(base, tmp_path, world)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.of(STATEFUL, tmp_path_factory.mktemp(STATEFUL), ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(SOLO))
def test_in_every_family_a_row_has_the_bits_that_it_has_alone(
    family: str, dtype: torch.dtype, tmp_path: Path
):
    same_bits_alone(Setting.of(family, tmp_path, ELSEWHERE), dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_row_has_the_bits_that_it_has_alone(setting: Setting, dtype: torch.dtype):
    same_bits_alone(setting, dtype)


@pytest.mark.slow
def test_who_is_sent_back_goes_on_with_the_same_bits(setting: Setting):
    sent_back(setting)


@pytest.mark.slow
def test_computed_again_in_chunks_the_bits_would_be_others(setting: Setting):
    """The rule that answers are computed again token by token is needed."""
    questions = [replace(ask, params=greedy(40)) for ask in asks(512)[1::2]]
    expected = bits(setting.world(limits=LIMITS).run(questions))
    narrow = setting.world(limits=LIMITS, blocks=32)
    narrow.scheduler.limits = replace(narrow.scheduler.limits, solo=False)
    assert bits(narrow.run(questions)) != expected


def test_nothing_is_found_that_another_computed(setting: Setting):
    nothing_is_found(setting)


@pytest.mark.slow
def test_a_step_may_be_run_again(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    questions = asks(512)[:4]
    expected = bits(setting.world(limits=LIMITS).run(questions))
    world = setting.world(limits=LIMITS)
    monkeypatch.setattr(world.runner, "run", Twice(world))
    assert bits(world.run(questions)) == expected
    monkeypatch.setattr(solo_module, "restore", lambda cache, kept: None)
    assert bits(world.run(questions)) != expected


@pytest.mark.slow
def test_a_step_of_which_half_was_computed_may_be_run_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    a_half_computed_step_runs_again(setting, monkeypatch)


def test_a_state_that_is_not_there_is_a_fault(setting: Setting):
    world = setting.world(limits=LIMITS)
    world.run([Ask(asks(512)[0].prompt, {}, greedy(3))])
    later = next(plan for plan in world.plans if plan.rows[0].start)
    sequence = later.rows[0].sequence
    sequence.blocks = list(range(1, 1 + world.blocks.blocks_for(len(sequence.tokens))))
    with pytest.raises(EngineFault, match="state of this sequence"):
        world.runner.run(later)


@pytest.mark.parametrize("ask", asks(512)[:2], ids=["base", "adapter"])
def test_tokens_depend_on_what_was_computed_before(setting: Setting, ask: Ask, monkeypatch):
    at = solo_module.States.at

    def forgetting(self, sequence, start):
        held = at(self, sequence, start)
        for layer in held.cache.layers:
            if hasattr(layer, "recurrent_states"):
                layer.reset()
        return held

    a_forgotten_state_shows(
        setting, ask, lambda: monkeypatch.setattr(solo_module.States, "at", forgetting)
    )


def test_a_merged_lane_runs_there_too(setting: Setting):
    a_lane_equals_peft(setting, rounds=1)


@pytest.mark.parametrize("family", [STATEFUL, "bloom"])
def test_a_merge_is_measured_there_too(family: str, tmp_path: Path):
    a_merge_is_measured(Setting.of(family, tmp_path, ELSEWHERE))


def test_what_a_sequence_takes_is_what_was_planned(setting: Setting):
    base = setting.world().base
    recurrent, convolved = 4 * 32 * 32 * 4, (2 * 64 + 128) * 4 * 4
    assert base.state == StateShape(per_token=0, fixed=2 * (recurrent + convolved))
    kept = 2 * 2 * 32 * 4
    assert base.block_bytes(16) == 16 * kept, "k and v of the attention layer, in fp32"


def test_what_a_sequence_that_runs_alone_takes_is_what_was_planned(tmp_path: Path):
    base = TinyWorld(write_many(*SOLO["bloom"], tmp_path / "base")).base
    kept = 2 * 2 * 128 * 4
    assert base.state == StateShape(per_token=kept, fixed=64 * kept)
    assert base.block_bytes(16) == 16 * kept
    assert not base.layers


ROW_BY_ROW = {
    *("bamba", "falcon-h1", "granite-hybrid", "granite-hybrid-moe", "lara-mini", "lfm2"),
    *("falcon-mamba", "jamba", "jamba-moe", "lfm2-moe", "mamba"),
    *("nemotron-h", "olmo-hybrid", "qwen3-next", "qwen3.5", "qwen3.5-moe", "zamba2"),
}
"""Families of which only the layers with states run row by row, in fp32 as well."""
WITHOUT_ATTENTION = frozenset({"falcon-mamba", "mamba"})


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(SOLO)],
)
def test_only_what_keeps_states_runs_row_by_row_where_rows_keep_their_bits(
    family: str, tmp_path: Path
):
    base = TinyWorld(write_many(*SOLO[family], tmp_path / "base"), backend=ELSEWHERE).base
    assert isinstance(base.solo, Mixers if family in ROW_BY_ROW else SoloForward)
    assert bool(base.layers) == (family in ROW_BY_ROW - WITHOUT_ATTENTION)


def test_rows_that_would_not_keep_their_bits_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when an activation takes another path for one row than for several."""
    source = write_many(*SOLO[STATEFUL], tmp_path / "base")
    monkeypatch.setattr(rehearsal, "_packed", _noisy(rehearsal._packed))
    assert isinstance(TinyWorld(source, backend=ELSEWHERE).base.solo, SoloForward)


def _noisy(packed):
    def run(model, ids, *others):
        return packed(model, ids, *others) * (1 + 1e-7 * (len(ids) > 1))

    return run


def refused(base: Path) -> str:
    with pytest.raises(ModelUnsupported) as error:
        TinyWorld(base, backend=ELSEWHERE)
    return str(error.value)


def test_a_cache_of_another_kind_is_refused(tmp_path: Path):
    changes = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4}
    reason = refused(write_many("minimax", changes, tmp_path / "base"))
    assert "cache of its own" in reason
    assert "\n" not in reason


def test_what_looks_ahead_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model whose pieces are not what the whole is."""
    base = write_many(*SOLO[STATEFUL], tmp_path / "base")
    monkeypatch.setattr(alone, "new_cache", _forgetful)
    assert "in pieces what it gives at once" in refused(base)


def _forgetful(config):
    from fader_server.model.states import new_cache

    cache = new_cache(config)
    cache.update_recurrent_state = lambda states, *_, **__: states
    return cache


def test_a_packed_base_stays_packed(tmp_path: Path):
    world = TinyWorld(write_family("llama", tmp_path / "base"))
    assert world.base.solo is None
    assert world.blocks.findable
