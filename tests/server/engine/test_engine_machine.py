import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fader_adapters.spec import Digest
from fader_server.engine import blocks as blocks_module
from fader_server.engine.blocks import chain_seed
from tests.server.engine.engine_world import World, blend_of, request, version

NAMES = ("a", "p", "q", "c")
"""The two in the middle are activated."""
SIZES = {version("c"): 2}


class EngineMachine(RuleBasedStateMachine):
    """Any order of requests, aborts, forgets, steps and faults, in pools from tiny to roomy."""

    @initialize(
        blocks=st.integers(9, 30),
        rows=st.integers(1, 4),
        chunk=st.sampled_from([4, 6, 8]),
        spare=st.integers(0, 8),
    )
    def build(self, blocks, rows, chunk, spare):
        self.world = World(
            blocks=blocks,
            max_rows=rows,
            chunk_size=chunk,
            max_step_tokens=rows + chunk + spare,
            capacity=3,
            max_model_len=32,
        )
        self.count = 0

    @rule(
        start=st.integers(0, 1),
        length=st.integers(1, 20),
        tokens=st.integers(0, 12),
        terms=st.lists(
            st.tuples(st.sampled_from(NAMES), st.sampled_from([0.5, 1.0])),
            max_size=2,
            unique_by=lambda t: t[0],
        ),
        stop=st.booleans(),
        scores=st.booleans(),
        salt=st.sampled_from(["", "x"]),
    )
    def submit(self, start, length, tokens, terms, stop, scores, salt):
        self.count += 1
        self.world.submit(
            request(
                f"r{self.count}",
                range(start, start + length),
                blend=blend_of(*terms),
                sizes=SIZES,
                salt=salt,
                max_tokens=tokens,
                stop_token_ids=frozenset(range(0, 50, 5)) if stop else frozenset(),
                prompt_logprobs=0 if scores else None,
            )
        )

    @rule()
    def turn(self):
        self.world.turn()

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def abort(self, data):
        self.world.abort(f"r{data.draw(st.integers(1, self.count))}")

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name):
        self.world.pool.forget(version(name))

    @precondition(lambda self: self.count)
    @rule(data=st.data(), kind=st.sampled_from(["culprits", "nan"]))
    def fault(self, data, kind):
        getattr(self.world.device, kind).add(f"r{data.draw(st.integers(1, self.count))}")

    @rule(limit=st.sampled_from([3, 6, 10**9]))
    def memory(self, limit):
        self.world.device.out_of_memory_above = limit

    @rule(name=st.sampled_from(NAMES), bad=st.booleans())
    def upload_fault(self, name, bad):
        (self.world.device.bad_uploads.add if bad else self.world.device.bad_uploads.discard)(
            version(name)
        )

    @invariant()
    def promises_hold(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()


FEW = settings(max_examples=80, stateful_step_count=40, deadline=None)
EngineMachine.TestCase.settings = FEW
TestEngineInAnyOrder = EngineMachine.TestCase


def test_the_machine_notices_keys_that_ignore_the_blend(monkeypatch):
    empty = Digest("0" * 64)
    monkeypatch.setattr(
        blocks_module, "chain_seed", lambda blend, salt, size: chain_seed(empty, salt, size)
    )
    search = settings(
        FEW,
        max_examples=2000,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(EngineMachine, settings=search)
