"""Bases whose layers keep states in native kernels: PEFT's answers, a row's own bits, and steps
that are recorded like those of any other base."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fader_adapters.kernels.native import Scan
from fader_server.errors import EngineFault
from fader_server.model import packed_states, solo_rehearsal
from fader_server.model.mixers import Mixers
from fader_server.model.packed_states import KEPT, PackedStates
from fader_server.model.prefill import NativeReplays
from fader_server.model.state_kernels import StateKernels
from fader_server.model.state_slots import NOBODY, SPARE, StateSlots
from fader_server.model.states import StateShape
from tests.server.parity.test_many_families import asks, equals_peft
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
    same_bits_alone,
    sent_back,
)
from tests.support.solo_families import BY_KEY, SOLO
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = {
    *("bamba", "falcon-h1", "granite-hybrid", "granite-hybrid-moe", "lfm2", "lfm2-moe"),
    *("falcon-mamba", "jamba", "jamba-moe", "mamba"),
    *("nemotron-h", "olmo-hybrid", "qwen3-next", "qwen3.5", "qwen3.5-moe", "lara-mini"),
} & SOLO.keys()
QUICK = frozenset({"jamba-moe", "lfm2", "mamba", "qwen3.5"})
STATEFUL = "qwen3.5"
FAMILIES = [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(PACKED)]
KEYED = [pytest.param(f, marks=[] if f == "kimi-linear" else pytest.mark.slow) for f in BY_KEY]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting.of(STATEFUL, tmp_path_factory.mktemp(STATEFUL))


@pytest.mark.parametrize("family", [*FAMILIES, *KEYED])
def test_mixed_batches_equal_peft(family: str, tmp_path: Path):
    base = write_many(*(SOLO | BY_KEY)[family], tmp_path / "base")
    world = TinyWorld(base)
    assert world.base.solo is None
    assert world.base.packed_states is not None
    assert world.blocks.findable
    equals_peft(base, tmp_path, world)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted({*PACKED, *BY_KEY}))
def test_in_every_family_a_row_has_the_bits_that_it_has_alone(
    family: str, dtype: torch.dtype, tmp_path: Path
):
    same_bits_alone(Setting.of(family, tmp_path), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_bits_that_it_has_alone(setting: Setting, dtype: torch.dtype):
    same_bits_alone(setting, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_recorded_and_trusted(family: str, tmp_path: Path):
    setting = Setting.of(family, tmp_path)
    world = setting.world(limits=LIMITS)
    questions = [replace(ask, params=greedy(12)) for ask in asks(512)[:4]]
    first = bits(world.run(questions))
    replays = world.runner._replays
    assert isinstance(replays, NativeReplays)
    for _ in range(6):  # what was recorded is proven by later steps
        assert bits(world.run(questions)) == first
    assert replays.decode.enabled
    assert replays.decode._trusted
    assert replays.prefill._enabled
    assert replays.prefill._trusted


def test_who_is_sent_back_goes_on_from_what_was_kept_with_the_same_bits(setting: Setting):
    narrow = sent_back(setting)
    assert narrow.blocks.hits


def test_who_is_sent_back_and_finds_nothing_goes_on_with_the_same_bits(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    """In chunks of any size: a state depends on tokens, not on how they were cut."""
    monkeypatch.setattr(StateSlots, "longest", lambda self, keys: 0)
    narrow = sent_back(setting)
    rows = [row for plan in narrow.plans for row in plan.rows]
    again = [r for r in rows if r.count > 1 and r.start + r.count > r.sequence.prompt_len]
    assert again, "answers are computed again many tokens at a time"


def test_a_step_may_be_run_again(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    questions = asks(512)[:4]
    expected = bits(setting.world(limits=LIMITS).run(questions))
    world = setting.world(limits=LIMITS)
    monkeypatch.setattr(world.runner, "run", Twice(world))
    assert bits(world.run(questions)) == expected
    own = StateSlots._own

    def one_slot(self, held, at):
        return own(self, held, at) if NOBODY in held.slots else held.slots[1 - at]

    monkeypatch.setattr(StateSlots, "_own", one_slot)
    with pytest.raises(ValueError, match="outside its table"):  # a state is not written over
        world.run(questions)


def test_a_step_of_which_half_was_computed_may_be_run_again(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
):
    a_half_computed_step_runs_again(setting, monkeypatch)


def test_a_state_that_is_not_there_is_a_fault(setting: Setting):
    world = setting.world(limits=LIMITS)
    world.run([Ask(asks(512)[0].prompt, {}, greedy(3))])
    later = next(plan for plan in world.plans if plan.rows[0].start)
    sequence = later.rows[0].sequence
    sequence.blocks = []
    world.run([Ask(asks(512)[0].prompt, {}, greedy(1))])  # whoever ended is forgotten
    sequence.blocks = list(range(1, 1 + world.blocks.blocks_for(len(sequence.tokens))))
    with pytest.raises(EngineFault, match="state of this sequence"):
        world.runner.run(later)


@pytest.mark.parametrize("reserved", [False, True])
def test_slots_return_when_sequences_end_and_what_was_reserved_is_enough(
    setting: Setting, reserved: bool, monkeypatch: pytest.MonkeyPatch
):
    if not reserved:
        monkeypatch.setattr(PackedStates, "reserve", lambda self, rows: None)
    world = setting.world(limits=LIMITS)
    states, grown = world.base.packed_states, []
    assert states is not None
    grow = StateKernels.grow
    monkeypatch.setattr(StateKernels, "grow", lambda *a: (grown.append(a), grow(*a))[1])
    for _ in range(3):
        world.run([replace(ask, params=greedy(3)) for ask in asks(512)])
    assert states.slots.count <= SPARE + 2 * LIMITS.max_rows + KEPT * reserved
    assert bool(grown) == (not reserved)


@pytest.mark.parametrize("ask", asks(512)[:2], ids=["base", "adapter"])
def test_tokens_depend_on_what_was_computed_before(setting: Setting, ask: Ask, monkeypatch):
    places = StateSlots.places

    def forgetting(self, rows):
        came_from, to = places(self, rows)
        return [-1] * len(came_from), to

    a_forgotten_state_shows(
        setting, ask, lambda: monkeypatch.setattr(StateSlots, "places", forgetting)
    )


def test_a_merged_lane_runs_there_too(setting: Setting):
    """Recorded, proven, trusted."""
    a_lane_equals_peft(setting, rounds=3)


def test_a_merge_is_measured_there_too(setting: Setting):
    a_merge_is_measured(setting)


@pytest.mark.parametrize("family", [f for f in ("jamba", "mamba") if f in SOLO])
def test_selective_scans_are_measured_and_run_in_lanes_and_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their own code, which measures, is given a text in chunks."""
    selective = Setting.of(family, tmp_path)
    a_merge_is_measured(selective)
    a_lane_equals_peft(selective, rounds=3)
    a_half_computed_step_runs_again(selective, monkeypatch)
    assert sent_back(selective).blocks.hits


def test_what_a_sequence_takes_is_what_was_planned(setting: Setting):
    base = setting.world().base
    recurrent, convolved = 4 * 32 * 32 * 4, (2 * 64 + 128) * 3 * 4
    assert base.state == StateShape(per_token=0, fixed=2 * (recurrent + convolved))


def _unscaled(self, *args, **kwargs):
    return SCAN(self, *args, **kwargs) * 1.02


SCAN = Scan.__call__


@pytest.mark.parametrize(
    "fault",
    [
        lambda patch: patch.setattr(Scan, "__call__", _unscaled),
        lambda patch: patch.setattr(StateKernels, "functions", {}),
        lambda patch: patch.setattr(packed_states, "NOBODY", 5),
        lambda patch: patch.setattr(
            solo_rehearsal, "same_bits", lambda model, aside: isinstance(aside, Mixers)
        ),
    ],
    ids=["another result", "functions unknown", "a state from nowhere", "other bits in company"],
)
def test_layers_that_do_not_compute_what_they_did_go_the_usual_way(
    setting: Setting, fault, monkeypatch: pytest.MonkeyPatch
):
    ask = asks(512)[1]
    expected = setting.world().run([ask])[0]
    fault(monkeypatch)
    world = setting.world()
    assert isinstance(world.base.solo, Mixers)
    assert world.base.packed_states is None
    found = world.run([ask])[0]
    assert found.tokens == expected.tokens
