"""The memory plan, in integers."""

import pytest

from fader_server.errors import ConfigInvalid
from fader_server.model.memory import MemoryPlan, plan_memory, workspace_bytes


def _plan(**changes) -> MemoryPlan:
    facts = {
        "available": 1 << 30,
        "on_host": True,
        "base": 100,
        "block_bytes": 1 << 10,
        "block_size": 16,
        "max_rows": 4,
        "max_model_len": 256,
        "max_positions": 4096,
        "arena": None,
        "kv_cache": None,
    }
    return plan_memory(**(facts | changes))


def test_default_cache_holds_every_row_at_full_length_and_the_null_block():
    assert _plan().blocks == 4 * 16 + 1


def test_default_reservations_leave_half_of_the_host_memory_free():
    plan = _plan(max_rows=10**6)
    assert plan.arena + plan.kv_cache <= 1 << 29
    assert plan.arena + plan.kv_cache > 0.49 * (1 << 30)


def test_what_was_asked_for_is_kept_to_the_byte():
    plan = _plan(arena=12345, kv_cache=20 << 10)
    assert (plan.arena, plan.kv_cache, plan.blocks) == (12345, 20 << 10, 20)
    assert plan.total == 100 + 12345 + (20 << 10)


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_bytes_it_needs():
    with pytest.raises(ConfigInvalid, match=f"raise --kv-cache to {17 << 10} bytes"):
        _plan(kv_cache=16 << 10)
    assert _plan(kv_cache=17 << 10).blocks == 17


def test_more_than_there_is_is_refused():
    with pytest.raises(ConfigInvalid, match="ask for less"):
        _plan(arena=1 << 30, kv_cache=1 << 20)


def test_a_length_nobody_asked_for_shrinks_to_what_the_cache_holds():
    assert _plan(max_model_len=None, kv_cache=17 << 10).max_model_len == 256
    assert _plan(max_model_len=None, kv_cache=1 << 20).max_model_len == 4096
    assert _plan(max_model_len=300, kv_cache=1 << 20).max_model_len == 300


def test_the_work_of_a_step_is_left_free_on_a_gpu():
    without = _plan(on_host=False, max_rows=10**6)
    plan = _plan(on_host=False, max_rows=10**6, workspace=1 << 28)
    assert plan.workspace == 1 << 28
    assert plan.arena + plan.kv_cache + plan.workspace <= 1 << 30
    assert plan.kv_cache <= without.kv_cache - (1 << 27)


def test_too_little_memory_is_told_with_the_bytes_it_needs_and_has():
    with pytest.raises(
        ConfigInvalid, match=rf"work of a step need {(1 << 31) + 17408}, but {1 << 30} are"
    ):
        _plan(on_host=False, workspace=1 << 31, arena=0, kv_cache=17 << 10)
    with pytest.raises(ConfigInvalid, match=f"but {1 << 30} are free"):
        _plan(on_host=False, workspace=1 << 31)


def test_workspace_grows_with_rows_vocabulary_and_width():
    facts = {"max_rows": 32, "step_tokens": 512, "chunk": 256, "widest": 28672, "vocab": 128256}
    whole = workspace_bytes(**facts, itemsize=2)
    assert whole < 2 << 30
    for name in facts:
        assert workspace_bytes(**(facts | {name: 2 * facts[name]}), itemsize=2) > whole
