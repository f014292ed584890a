import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [p for p in (str(ROOT),) if p not in sys.path]

from bench.make_model import PRESETS, write_all  # noqa: E402
from bench.step_overhead import Round, check_parity, measure, quiet  # noqa: E402
from bench.step_rig import Rig, read_adapters  # noqa: E402
from fader_adapters.kernels.backend import choose  # noqa: E402
from fader_server.model.loader import load_base  # noqa: E402

ROWS = 4


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    dtypes = {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    write_all(folder, PRESETS["tiny"], adapters=2, seed=0, **dtypes)
    cpu = torch.device("cpu")
    backend = choose(cpu, torch.bfloat16)
    base = load_base(str(folder / "base"), dtype=torch.bfloat16, device=cpu, backend=backend)
    return Rig(base, read_adapters(folder / "adapters", base, 2), rows=ROWS, length=128)


def prompts() -> list[tuple[int, ...]]:
    return [tuple(range(10 * row, 10 * row + 20)) for row in range(ROWS)]


def test_shares_add_up_and_every_step_is_accounted_for(rig):
    check_parity(rig, prompts())
    (found,) = measure(rig, prompts(), rounds=1, steps=5)
    assert 0 < found.tensor_ms < found.profiled_step_ms
    assert found.plan_ms + found.commit_ms < found.step_ms
    expected = 1 - found.tensor_ms / found.profiled_step_ms
    assert found.outside_profiled == pytest.approx(expected)


def test_answers_that_change_in_company_stop_the_measurement(rig, monkeypatch):
    step = Rig.step

    def wrong(self: Rig, mark):
        plan, came = step(self, mark)
        return plan, [(name, token + len(plan.rows)) for name, token in came]

    monkeypatch.setattr(Rig, "step", wrong)
    with pytest.raises(SystemExit, match="parity failed"):
        check_parity(rig, prompts())


def test_figures_of_a_busy_machine_are_not_for_quoting():
    calm = Round(10.0, 0.1, 0.1, 8.0, 11.0, 0.2, 0.27)
    assert quiet([calm, replace(calm, step_ms=10.9)])
    assert not quiet([calm, replace(calm, step_ms=12.5, profiled_step_ms=13.0)])
    assert not quiet([replace(calm, step_ms=11.5)])
