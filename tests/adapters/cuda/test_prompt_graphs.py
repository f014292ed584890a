"""Steps of prompts through captured work, interpreted: the bits of the model's own code."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the CUDA kernels need triton")

from fader_adapters.kernels.cuda import nf4
from fader_server.core import Plan
from fader_server.model import graphs, prompt_graphs
from fader_server.model.launching import LaunchingRunner
from fader_server.model.prompt_graphs import PROMPT_ROWS, PromptInputs, buckets
from tests.adapters.cuda.test_backend import Setting, Told, asks, told, use_cuda, use_graphs
from tests.support import world as support
from tests.support.world import Ask, TinyWorld, greedy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")

PIECE = 16


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "PIECE", PIECE)
    monkeypatch.setattr(prompt_graphs, "PIECE", PIECE)


@pytest.fixture(scope="module")
def plain(setting: Setting) -> Told:
    """Operator by operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "PIECE", PIECE)
        use_cuda(patch)
        return told(setting.world().run(given()))


def given() -> list[Ask]:
    """Prompts of 18, 7 and 5 tokens: chunks of 16 and 2 beside others, adapters and a blend."""
    return [replace(ask, params=greedy(2)) for ask in asks(4)[1:]]


def started(
    setting: Setting, patch: pytest.MonkeyPatch, *, tokens: int = 2 * PIECE
) -> tuple[TinyWorld, list[tuple[int, str]]]:
    """A world whose steps of prompts are captured, and which of them ran."""
    ran: list[tuple[int, str]] = []
    use_cuda(patch, prompts=tokens)
    use_graphs(patch)
    patch.setattr(support, "ModelRunner", LaunchingRunner)
    run = prompt_graphs.PromptGraphs.run

    def noted(self, plan: Plan, step, forward):
        ran.append((plan.tokens, prompt_graphs.kind_of(step)))
        return run(self, plan, step, forward)

    patch.setattr(prompt_graphs.PromptGraphs, "run", noted)
    return setting.world(), ran


@pytest.mark.slow
def test_captured_prompts_give_the_bits_of_those_run_operator_by_operator(
    setting: Setting, plain: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ran = started(setting, monkeypatch)
    captured = world.runner._replays
    assert isinstance(captured, graphs.DecodeGraphs)
    assert captured.prompts is not None
    assert {tokens for tokens, _ in captured.prompts.captured} == {PIECE, 2 * PIECE}
    assert told(world.run(given())) == plain
    assert {"base", "deltas"} >= {kind for _, kind in ran} >= {"deltas"}
    assert max(tokens for tokens, _ in ran) > PIECE
    assert len({tokens for tokens, _ in ran}) > 1


@pytest.mark.slow
def test_what_a_bucket_holds_beyond_its_step_is_never_read(
    setting: Setting, plain: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill = PromptInputs.fill

    def spoiled(self: PromptInputs, plan: Plan, bucket: int) -> None:
        fill(self, plan, bucket)
        self._ids[bucket:] = self._positions[bucket:] = self._slots[bucket:] = 1 << 40
        for i, row in enumerate(plan.rows):
            self._tables[i, -(-(row.start + row.count) // 16) :] = 1 << 20
        self._tables[len(plan.rows) :] = 1 << 20

    monkeypatch.setattr(PromptInputs, "fill", spoiled)
    world, ran = started(setting, monkeypatch)
    assert told(world.run(given())) == plain
    assert ran

    def wrong(self: PromptInputs, plan: Plan, bucket: int) -> None:
        fill(self, plan, bucket)
        self._positions[plan.rows[0].count - 1] += 1

    monkeypatch.setattr(PromptInputs, "fill", wrong)
    assert told(world.run(given())) != plain


@pytest.mark.slow
def test_more_prompts_than_a_bucket_has_rows_and_scored_ones_go_the_usual_way(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, ran = started(setting, monkeypatch, tokens=PIECE)
    scored = Ask([3, 4, 5, 6], {}, greedy(1, prompt_logprobs=0))
    (answer,) = world.run([scored])
    assert len(answer.prompt_logprobs) == 3
    long = Ask(list(range(5, 5 + PIECE + 4)), {}, greedy(1))
    world.scheduler.limits = replace(world.scheduler.limits, chunk_size=32, max_step_tokens=48)
    world.run([long])
    assert not ran
    world.run([Ask([3, 4, 5, 6], {}, greedy(1))])
    assert ran == [(4, "base")]


@pytest.mark.slow
def test_more_deltas_than_a_bucket_holds_run_operator_by_operator(
    setting: Setting, plain: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fader_adapters.kernels.cuda.lora_rooms.PROMPT_ENTRIES", 1)
    world, _ = started(setting, monkeypatch)
    captured = world.runner._replays
    assert isinstance(captured, graphs.DecodeGraphs)
    assert captured.prompts is not None

    def refuse() -> None:
        raise AssertionError("more entries than the buffers hold")

    for bucket, kind in captured.prompts.captured:
        if kind != "base":
            captured.prompts._graphs[bucket, kind] = refuse
    assert told(world.run(given()[2:])) == plain[2:]


@pytest.mark.slow
def test_prompts_that_cannot_be_captured_leave_decode_steps_theirs(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nadvice")

    monkeypatch.setattr(prompt_graphs.PromptGraphs, "capture", fail)
    world, ran = started(setting, monkeypatch)
    captured = world.runner._replays
    assert isinstance(captured, graphs.DecodeGraphs)
    assert captured.prompts is None
    assert captured.captured
    assert "steps of prompts run without CUDA graphs: operation not permitted" in caplog.text
    world.run(given()[2:])
    assert not ran


def test_buckets_are_whole_pieces_up_to_the_steps_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_graphs, "PIECE", 256)
    assert buckets(0) == []
    assert buckets(1) == buckets(256) == [256]
    assert buckets(512) == [256, 512]
    assert buckets(700) == [256, 512, 768]
    assert buckets(1 << 20) == [256, 512, 1024, 2048]
    assert PROMPT_ROWS == 8
