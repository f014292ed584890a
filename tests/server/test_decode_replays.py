"""Decode steps: a replay gives the bits of the model's own code, or is not used."""

from threading import Thread

import numpy as np
import pytest
import torch

from fader_adapters.kernels import native
from fader_adapters.kernels.native import Map, Program, Tape, activation
from fader_server.model.decode import DecodeReplays
from fader_server.model.recording import Recorder, Unrepeatable
from fader_server.model.replay import Layout, Replay
from tests.support.families import CONFIGS, write_family
from tests.support.peft_adapters import write_adapter
from tests.support.replays import BLENDS, QUICK, answered, opened, write
from tests.support.world import Ask, greedy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(CONFIGS)],
)
def family(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp(request.param))


def serve(family, dtype, *, replays=True):
    world, answers = opened(family, dtype, replays=replays), []
    for count in (1, 4):  # rows of a decode step, twice: recorded, compared, then replayed
        for turn in range(2):
            asks = [
                Ask(list(range(5 + turn, 25 + 3 * i)), blend, greedy(8 + turn, logprobs=2))
                for i, blend in enumerate(BLENDS[:count])
            ]
            answers += answered(world, asks)
    return answers, world.runner


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_replayed_steps_give_the_bits_of_the_models_code(family, dtype):
    plain, _ = serve(family, dtype, replays=False)
    replayed, runner = serve(family, dtype)
    assert runner._replays.decode._enabled
    assert {1, 4} <= set(runner._replays.decode._trusted)
    assert replayed == plain


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    source = write_family("llama", folder / "base")
    return source, [write_adapter(source, folder / n, rank=8, seed=i) for i, n in enumerate("ab")]


def test_a_llama_decodes_in_few_native_runs(llama):
    _, runner = serve(llama, torch.float32)
    for replay in runner._replays.decode._trusted.values():
        native = [len(part) for part in replay._parts if isinstance(part, Program)]
        assert sum(native) > 0.9 * (sum(native) + len(replay._parts) - len(native))


def test_a_replay_with_other_bits_is_never_used(llama, monkeypatch):
    plain, _ = serve(llama, torch.float32, replays=False)
    whole = Replay.__call__
    monkeypatch.setattr(Replay, "__call__", lambda self, plan: whole(self, plan) + 1.0)
    answers, runner = serve(llama, torch.float32)
    assert not runner._replays.decode._enabled
    assert not runner._replays.decode._trusted
    assert answers == plain


def test_a_step_that_reads_values_is_not_recorded(llama, monkeypatch):
    plain, _ = serve(llama, torch.float32, replays=False)
    record = Recorder.record

    def reading(self, forward):
        def both():
            torch.ones(1).sum().item()
            return forward()

        return record(self, both)

    monkeypatch.setattr(Recorder, "record", reading)
    answers, runner = serve(llama, torch.float32)
    assert not runner._replays.decode._enabled
    assert answers == plain


def test_reading_a_value_is_refused_with_its_operator():
    tape = native.Tape()
    with pytest.raises(Unrepeatable, match="_local_scalar_dense"):
        Recorder(tape).record(lambda: torch.ones(2) * torch.ones(1).item())
    assert tape.listener is None
    assert Recorder(tape).record(lambda: torch.ones(2) * 2).result.tolist() == [2, 2]


READS = {
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "__array__": np.asarray,
    "__dlpack__": np.from_dlpack,
}


@pytest.mark.parametrize("name", READS)
def test_reading_values_without_an_operator_is_refused_too(name):
    """As a router does that splits its rows by how many each expert has."""
    tape, read = native.Tape(), READS[name]
    before = dict(vars(torch.Tensor))
    with pytest.raises(Unrepeatable, match=rf"Tensor\.{name} reads values|Tensor\.numpy reads"):
        Recorder(tape).record(lambda: torch.ones(2) * float(read(torch.ones(2))[0]))
    assert dict(vars(torch.Tensor)) == before
    assert read(torch.ones(2))[1] == 1


def test_others_read_their_values_while_something_is_recorded():
    """Threads that load adapters, and what is run as a whole."""
    tape, found = native.Tape(), []

    def forward():
        other = Thread(target=lambda: found.append(torch.ones(2).tolist()))
        other.start()
        other.join()
        return tape.whole(lambda x: x * x.tolist()[0], (torch.full((2,), 3.0),), {})

    assert Recorder(tape).record(forward).result.tolist() == [9, 9]
    assert found == [[1, 1]]


def test_what_nobody_reads_is_not_run_again():
    tape, x, counter = Tape(), torch.randn(3, 16), torch.zeros(1)

    def forward(read: bool) -> torch.Tensor:
        constant = activation(x, Map.EXP, tape=tape).neg()
        counter.add_(1)
        y = x * 2
        return y + constant if read else y

    few = Recorder(tape).record(lambda: forward(False)).calls
    every = Recorder(tape).record(lambda: forward(True)).calls
    assert [call.function._schema.name for call in few] == ["aten::add_", "aten::mul"]
    assert len(every) == len(few) + 3


def test_layout_reuses_room_and_never_overlaps_what_lives():
    layout = Layout()
    a, b = layout.take(128), layout.take(64)
    layout.give(a, 128)
    c, d = layout.take(64), layout.take(64)
    assert {c, d} == {0, 64}
    assert len({b, c, d}) == 3
    assert layout.size == 192
    for start in (b, c, d):
        layout.give(start, 64)
    assert layout.take(192) == 0


def test_only_plain_decode_steps_are_taken(llama):
    _, runner = serve(llama, torch.float32)
    replays = runner._replays.decode
    assert isinstance(replays, DecodeReplays)
    assert 20 not in replays._trusted  # the prompts' own steps
