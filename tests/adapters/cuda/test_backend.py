"""The CUDA backend behind a whole engine, interpreted in fp32: the reference's tokens, in mixed
batches of blends, prefill and decode; and through captured steps."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from fader_adapters.kernels.backend import Backend
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_server.core import Plan
from fader_server.engine.limits import Limits
from fader_server.model import graphs
from fader_server.model.attention import PagedAttention
from fader_server.model.cuda_attention import CudaAttention
from fader_server.model.graph_inputs import GraphInputs
from fader_server.model.graph_kinds import KINDS
from fader_server.model.kernels import choose_attention
from fader_server.model.loaded import LoadedBase
from tests.support import world as support
from tests.support.families import COMMON, CONFIGS, write_family
from tests.support.peft_adapters import write_adapter
from tests.support.world import Answer, Ask, TinyWorld, greedy

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tiny engine is on the CPU")

BLENDS: list[Mapping[str, float]] = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.7, "b": -0.4}]
LIMITS = Limits(max_rows=4, max_step_tokens=48, chunk_size=16, max_model_len=64)
Told = list[tuple[list[int], list[float]]]


def shallow() -> LlamaConfig:
    return LlamaConfig(**COMMON | {"num_hidden_layers": 1}, attention_bias=True)


class Setting:
    """A tiny base with two adapters of ranks that no chunk divides."""

    def __init__(self, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CONFIGS, "llama", shallow)
            self.source = write_family("llama", folder / "base")
        self.adapters = {
            name: write_adapter(self.source, folder / name, rank=rank, seed=rank)
            for name, rank in {"a": 8, "b": 20}.items()
        }

    def world(self) -> TinyWorld:
        world = TinyWorld(self.source, limits=LIMITS, blocks=40, backend="reference")
        for name, path in self.adapters.items():
            world.load(name, path)
        return world


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("llama"))


def asks(count: int = 4) -> list[Ask]:
    lengths = (3, 18, 7, 5)
    return [Ask(list(range(5 + i, 5 + i + lengths[i])), BLENDS[i], greedy(3)) for i in range(count)]


def told(answers: list[Answer]) -> Told:
    assert all(answer.error is None for answer in answers)
    return [(a.tokens, [entry.logprob for entry in a.logprobs]) for a in answers]


def use_cuda(patch: pytest.MonkeyPatch, entries: int = 8, *, prompts: int = 0) -> None:
    """prompts: tokens of captured steps of prompts, which take the interpreter their time."""

    def choose(device: torch.device, dtype: torch.dtype, name: str) -> Backend:
        return CudaBackend(device, dtype, entries=entries)

    def attention(base: LoadedBase, *, block_size: int) -> PagedAttention:
        return choose_attention(
            base, block_size=block_size, max_rows=4, max_context=64, max_tokens=prompts
        )

    patch.setattr(support, "choose", choose)
    patch.setattr(support, "choose_attention", attention)


def same(got: Told, want: Told) -> None:
    for (tokens, logprobs), (expected, others) in zip(got, want, strict=True):
        assert tokens == expected
        assert logprobs == pytest.approx(others, abs=1e-4)


@pytest.mark.slow
def test_mixed_batches_give_the_references_tokens(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = told(setting.world().run(asks()))
    assert len({tuple(logprobs) for _, logprobs in want}) == 4
    use_cuda(monkeypatch)
    world = setting.world()
    assert isinstance(world.base.backend, CudaBackend)
    assert isinstance(world.runner._attention, CudaAttention)
    same(told(world.run(asks())), want)
    assert any({r.count == 1 for r in p.rows} == {True, False} for p in world.plans)


def eager(run: graphs.Run) -> graphs.Run:
    """A graph that does not exist: the same work over the same buffers."""
    return run


def use_graphs(patch: pytest.MonkeyPatch, record: graphs.Record = eager) -> None:
    """Decode steps through captured work, on the CPU too, without a warm-up of prompts."""
    patch.setattr(graphs, "WARM_TOKENS", ())

    def choose(base, *, cache, attention, tables, forward):
        return graphs.capture(
            base, cache=cache, attention=attention, tables=tables, run=forward, record=record
        )

    patch.setattr("fader_server.model.runner.choose_replays", choose)


@pytest.fixture(scope="module")
def plain(setting: Setting) -> Told:
    """Three rows, then one, operator by operator."""
    with pytest.MonkeyPatch.context() as patch:
        use_cuda(patch)
        world = setting.world()
        assert world.runner._replays is None
        return told(world.run(asks(3)) + world.run(asks(2)[1:]))


@pytest.mark.slow
def test_an_answers_bits_do_not_depend_on_its_company(setting: Setting, plain: Told) -> None:
    """Prompts beside other prompts and beside running streams, decode steps of any rows."""
    with pytest.MonkeyPatch.context() as patch:
        use_cuda(patch)
        world = setting.world()
        alone = [told(world.run([ask]))[0] for ask in asks(3)]
    assert alone == plain[:3]
    assert {way for plan in world.plans for way in {row.count > 1 for row in plan.rows}} == {
        True,
        False,
    }


def poisoned(patch: pytest.MonkeyPatch, kept: Callable[[int], int]) -> None:
    """After every fill the rows from `kept(bucket)` on hold what no step may read or write."""
    fill = GraphInputs.fill

    def spoil(
        self: GraphInputs, plan: Plan, bucket: int, tokens: torch.Tensor | None = None
    ) -> None:
        fill(self, plan, bucket, tokens)
        rest = slice(kept(bucket), None)
        self._ids[rest] = 1 << 40
        self._positions[rest] = 1 << 40
        self._slots[rest] = 1 << 40
        self._contexts[rest] = 1 << 20
        self._tables[rest] = 1 << 20

    patch.setattr(GraphInputs, "fill", spoil)


@pytest.mark.slow
def test_captured_steps_give_the_bits_of_steps_run_operator_by_operator(
    setting: Setting, plain: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows of a bucket of four, then one; nothing past a bucket is read."""
    use_cuda(monkeypatch)
    ran: list[tuple[int, str]] = []

    def record(run: graphs.Run) -> graphs.Run:
        which = [(n, kind) for n in (4, 2, 1) for kind in KINDS][len(made)]
        made.append(which)

        def noted() -> None:
            ran.append(which)
            run()

        return noted

    made: list[tuple[int, str]] = []
    use_graphs(monkeypatch, record)
    poisoned(monkeypatch, lambda bucket: bucket)
    world = setting.world()
    captured = world.runner._replays
    assert isinstance(captured, graphs.DecodeGraphs)
    assert captured.captured == sorted(made)
    assert told(world.run(asks(3)) + world.run(asks(2)[1:])) == plain
    assert {(4, "deltas"), (1, "deltas")} <= set(ran)
    ran.clear()
    world.run(asks(1))
    assert set(ran) == {(1, "base")}


def test_a_read_of_a_poisoned_row_would_be_noticed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cuda(monkeypatch)
    use_graphs(monkeypatch)
    poisoned(monkeypatch, lambda bucket: bucket - 1)
    with pytest.raises(IndexError):
        setting.world().run(asks(1))


@pytest.mark.slow
def test_a_step_with_more_deltas_than_were_captured_runs_operator_by_operator(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cuda(monkeypatch, entries=2)

    def record(run: graphs.Run) -> graphs.Run:
        def refuse() -> None:
            raise AssertionError("more entries than the buffers hold")

        return refuse

    use_graphs(monkeypatch, record)
    world = setting.world()
    (answer,) = told(world.run([asks(4)[3]]))
    assert answer[0]


@pytest.mark.slow
def test_a_model_that_cannot_be_captured_serves_without_graphs(
    setting: Setting,
    plain: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def record(run: graphs.Run) -> graphs.Run:
        raise RuntimeError("operation not permitted when stream is capturing\nadvice")

    use_cuda(monkeypatch)
    use_graphs(monkeypatch, record)
    world = setting.world()
    assert world.runner._replays is None
    assert told(world.run(asks(2)[1:])) == plain[-1:]
    (line,) = [r.getMessage() for r in caplog.records if r.name == graphs.__name__]
    assert line.endswith("operation not permitted when stream is capturing")
