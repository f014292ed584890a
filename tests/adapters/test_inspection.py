"""The health report: numbers against dense mathematics, and what is said of the base."""

from contextlib import contextmanager

import pytest
import torch

from fader_adapters.inspection import Inspector
from fader_adapters.report import verdict
from fader_adapters.spec import BaseSpec
from tests.adapters.peft_files import BASE, LAYERS, make_config, make_raw, make_tensors


class Weights:
    """W of every linear from its index, in two panels; counts what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def panels(self, linear: int):
        self.asked.append(linear)
        return iter(torch.chunk(self.dense(linear), 2))

    def dense(self, linear: int) -> torch.Tensor:
        spec = BASE.linears[linear]
        g = torch.Generator().manual_seed(linear)
        return torch.randn(spec.out_features, spec.in_features, generator=g)


def inspect(weights: Weights | None = None, base: BaseSpec = BASE, **config: object):
    inspector = Inspector(base, dtype=torch.float32, weights=weights)
    parsed = inspector.read(make_raw(make_config(**config)))
    return inspector, parsed, inspector.health(parsed)


def test_what_is_computed_of_the_base_is_computed_aside_once():
    weights, inside, times = Weights(), [False], []

    @contextmanager
    def aside():
        inside[0] = True
        times.append(len(weights.asked))
        yield
        inside[0] = False

    panels = weights.panels
    weights.panels = lambda linear: panels(linear) if inside[0] else pytest.fail("not aside")
    inspector = Inspector(BASE, dtype=torch.float32, weights=weights, aside=aside)
    parsed = inspector.read(make_raw(make_config()))
    assert inspector.health(parsed) == inspector.health(parsed)
    assert times == [0]
    assert weights.asked


def test_norms_are_those_of_dense_mathematics():
    weights = Weights()
    _, parsed, health = inspect(weights)
    tensors, deltas, bases = make_tensors(), {}, {}
    for delta in parsed.spec.deltas:
        path = BASE.linears[delta.linear].path
        a, b = (tensors[f"base_model.model.{path}.lora_{f}.weight"].double() for f in "AB")
        deltas[path] = 8 / 4 * (b @ a)
        bases[path] = weights.dense(delta.linear).double()

    def ratio(paths):
        top, bottom = (
            torch.cat([found[p].flatten() for p in paths]).norm() for found in (deltas, bases)
        )
        return float(top / bottom)

    assert health.relative_norm == pytest.approx(ratio(deltas))
    assert health.largest == pytest.approx(max(ratio([path]) for path in deltas))
    assert [kind.kind for kind in health.kinds] == ["down_proj", "q_proj", "v_proj"]
    for kind in health.kinds:
        assert (kind.modules, kind.ranks) == (LAYERS, (4,))
        own = [path for path in deltas if path.endswith(kind.kind)]
        assert kind.relative_norm == pytest.approx(ratio(own))
    assert (health.report.matched, health.report.total) == (9, 10)
    assert (health.dtype, health.nbytes) == ("float32", parsed.spec.numel * 4)


def test_a_norm_of_the_base_is_computed_once():
    weights = Weights()
    inspector, parsed, _ = inspect(weights)
    inspector.health(parsed)
    assert len(weights.asked) == len(set(weights.asked)) == 9


def test_without_weights_there_are_no_ratios():
    _, _, health = inspect()
    assert health.relative_norm is None
    assert {kind.relative_norm for kind in health.kinds} == {None}
    assert health.report.delta_norm > 0


@pytest.mark.parametrize(
    ("claimed", "base", "expected"),
    [
        ("org/Llama-3", "/models/llama-3/", "named"),
        ("org/llama-3", "llama-3", "named"),
        ("org/llama-3-chat", "org/llama-3", "other"),
        (None, "org/llama-3", "unnamed"),
        ("", "x", "unnamed"),
    ],
)
def test_what_an_adapter_says_of_its_base_is_compared(claimed, base, expected):
    assert verdict(claimed, base) == expected
    assert verdict(claimed, "else", base) == expected
    assert verdict(claimed, "else") == ("other" if claimed else "unnamed")


def test_the_verdict_names_what_was_claimed():
    _, _, health = inspect(base_model_name_or_path="org/other")
    assert health.match.fingerprint == BASE.fingerprint
    assert (health.match.verdict, health.match.claimed) == ("other", "org/other")
    assert "org/other" in health.match.told


@pytest.mark.parametrize("path", ["/home/someone/models/llama", "./llama", "C:\\models\\llama"])
def test_a_path_on_the_trainers_machine_is_not_told(path):
    _, _, health = inspect(base_model_name_or_path=path)
    assert health.match.claimed == "llama"
    assert path not in health.match.told
