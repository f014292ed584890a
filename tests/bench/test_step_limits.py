import pytest
import torch

from bench import step_limits
from bench.make_model import PRESETS, write_all
from bench.step_limits import measure, step_work, token_flop
from bench.step_rig import Rig, read_adapters
from fader_adapters.kernels import native
from fader_adapters.kernels.backend import choose
from fader_adapters.kernels.measure.limits import Limits
from fader_server.model.loader import load_base

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "built")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    dtypes = {"dtype": torch.bfloat16, "adapter_dtype": torch.bfloat16}
    write_all(folder, PRESETS["tiny"], adapters=2, seed=0, **dtypes)
    cpu = torch.device("cpu")
    base = load_base(
        str(folder / "base"), dtype=torch.bfloat16, device=cpu, backend=choose(cpu, torch.bfloat16)
    )
    return base, read_adapters(folder / "adapters", base, 2)


def test_work_counts_weights_once_and_rows_each(loaded):
    base, adapters = loaded
    linears = [i for i in base.installed.spec.linears if i.role == "linear"]
    assert token_flop(base, None) == 2 * sum(i.in_features * i.out_features for i in linears)
    one, four = (step_work(base, rows, 32, []) for rows in (1, 4))
    assert four.flop == 4 * one.flop
    assert base.installed.nbytes < one.read_bytes < four.read_bytes < 2 * one.read_bytes
    adapted = step_work(base, 4, 32, adapters)
    sizes = [adapter.flat for adapter in adapters]
    assert adapted.read_bytes - four.read_bytes == sum(flat.nbytes for flat in sizes)
    assert adapted.flop - four.flop == 2 * 2 * sum(flat.numel() for flat in sizes)


def test_nothing_is_faster_than_its_floor(loaded):
    base, adapters = loaded
    case, seen = measure(base, adapters, 2, repeats=1, limits=Limits(32 << 20, 1))
    assert len(seen) == 5
    assert 0 < case.step_floor_ms < case.step_ms
    assert 0 < case.prefill_tokens_per_s < case.prefill_most_tokens_per_s


def test_nothing_is_timed_before_parity(loaded, monkeypatch):
    def refuse(*_):
        raise SystemExit("parity failed")

    monkeypatch.setattr(step_limits, "check_parity", refuse)
    monkeypatch.setattr(Rig, "steps", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="parity failed"):
        measure(loaded[0], [], 3, repeats=1, limits=Limits(32 << 20, 1))
