"""Forwards that meet at their linears: one product for all, each its own rows, in any company."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from fader_adapters.kernels.backend import choose
from fader_adapters.layers import Installed, install
from fader_server.model.meeting import Meeting
from tests.support.families import write_family
from tests.support.oracle import nf4_oracle

CPU = torch.device("cpu")


class Met:
    """A llama with Fader's linears, and what was computed there: (forwards, rows, head)."""

    def __init__(self, base: Path) -> None:
        self.model = nf4_oracle(base, torch.float32)
        self.installed: Installed = install(self.model, choose(CPU, torch.float32, "reference"))
        self.meeting = Meeting(self.model)
        self.seen: list[tuple[list[int], list[int], bool]] = []
        self.products: list[int] = []
        for site in self.installed.every_site:
            self._count(site)

    def _count(self, site) -> None:
        kernel = site.kernel

        def counted(rows, step):
            self.products.append(rows.shape[0])
            return kernel(rows, step)

        site.kernel = _Kernel(kernel.base, counted)

    def run(self, forwards: list[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return self.meeting.run(forwards, _Host(self.seen))

    def forward(self, tokens: list[int]) -> Callable[[], torch.Tensor]:
        ids = torch.tensor([tokens])
        return lambda: self.model(input_ids=ids, use_cache=False).logits[0]


class _Host:
    def __init__(self, seen: list[tuple[list[int], list[int], bool]]) -> None:
        self._seen = seen
        self._now: int | None = None

    def linear(self, there: list[int], counts: list[int], *, head: bool) -> None:
        assert self._now is not None, "somebody had to come here"
        self._seen.append((there, counts, head))

    def forward(self, index: int) -> None:
        self._now = index


class _Kernel:
    def __init__(self, base, call) -> None:
        self.base = base
        self._call = call

    def __call__(self, rows, step):
        return self._call(rows, step)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("met") / "base")


@pytest.fixture
def met(base: Path) -> Met:
    return Met(base)


def alone(met: Met, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return met.forward(tokens)()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def test_each_gets_what_it_gets_alone(met: Met):
    expected = [alone(met, tokens) for tokens in PROMPTS]
    given = met.run([met.forward(tokens) for tokens in PROMPTS])
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_linear_is_computed_once_for_all(met: Met):
    alone(met, PROMPTS[0])
    once = len(met.products)
    met.products.clear()
    met.run([met.forward(tokens) for tokens in PROMPTS])
    assert met.products == [8] * once, "q, k and v are one product, as they are alone"
    assert {tuple(there) for there, _, _ in met.seen} == {(0, 1, 2)}
    assert {tuple(counts) for _, counts, _ in met.seen} == {(3, 1, 4)}
    assert [head for _, _, head in met.seen].count(True) == 1


def test_who_takes_another_way_meets_the_others_again(met: Met):
    """The last one goes through the first layer's MLP twice."""
    mlp = met.model.model.layers[0].mlp
    once = type(mlp).forward

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = once(mlp, x)
            return once(mlp, y) if x.shape[1] == len(PROMPTS[2]) else y

    met.model.model.layers[0].mlp = Twice()
    expected = [alone(met, tokens) for tokens in PROMPTS]
    met.seen.clear()
    given = met.run([met.forward(tokens) for tokens in PROMPTS])
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    together = [there for there, _, _ in met.seen]
    assert together.count([2]) == 3, "gate, up and down of its second way"
    assert together[-1] == [0, 1, 2]


def test_what_one_raises_ends_all_and_unwinds_them(met: Met):
    left: list[int] = []

    @contextmanager
    def watched(i: int):
        try:
            yield
        finally:
            left.append(i)

    def forward(i: int) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with watched(i):
                met.forward(PROMPTS[i])()
            if i == 1:
                raise ValueError("mine")
            return met.forward(PROMPTS[i])()

        return run

    with pytest.raises(ValueError, match="mine"):
        met.run([forward(i) for i in range(3)])
    assert sorted(left) == [0, 1, 2]
    torch.testing.assert_close(met.run([met.forward([5])])[0], alone(met, [5]))


def test_an_unfinished_one_is_unwound(met: Met):
    left: list[str] = []

    def waiting() -> torch.Tensor:
        try:
            return met.forward([5, 6])()
        finally:
            left.append("waiting")

    def failing() -> torch.Tensor:
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        met.run([waiting, failing])
    assert left == ["waiting"]


def test_outside_a_meeting_a_linear_is_itself(met: Met):
    assert met.meeting is not None
    alone(met, [5, 6])
    assert not met.seen


def test_who_has_no_rows_at_a_linear_takes_no_part(met: Met):
    """As an expert that a step's tokens are not routed to."""
    linear = met.model.model.layers[0].mlp.down_proj
    rows = torch.randn(1, 2, linear.in_features)

    def forward(x: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: linear(x)

    with torch.inference_mode():
        expected = linear(rows)
    none, some = met.run([forward(rows[:, :0]), forward(rows)])
    assert none.shape == (1, 0, linear.out_features)
    torch.testing.assert_close(some, expected, rtol=0, atol=1e-5)
    assert met.seen == [([1], [2], False)]


def test_what_is_changed_in_place_between_two_linears_is_seen(met: Met):
    layer = met.model.model.layers[0]
    x = torch.randn(1, 2, layer.self_attn.q_proj.in_features)

    def forward() -> torch.Tensor:
        own = x.clone()
        first = layer.self_attn.q_proj(own)
        own.mul_(2)
        return first.sum() + layer.mlp.up_proj(own)

    with torch.inference_mode():
        expected = forward()
    for given in met.run([forward, forward]):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-4)
