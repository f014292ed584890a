"""Unquantised experts in Triton's interpreter, in fp32, against float64 and torch: every pair by
its own expert, however the weight lies, and a pair's bits in any company."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernels here", allow_module_level=True)

from fader_adapters.kernels.cuda import plain_expert_configs as configs
from fader_adapters.kernels.cuda import plain_experts
from fader_adapters.kernels.cuda.plain_experts import CudaStackWeight
from fader_adapters.kernels.stack_weights import StackWeight
from tests.support.nf4_weights import rms
from tests.support.stacks import COUNTS, counted

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXPERTS, OUT, IN = 5, 150, 208
LIMIT = 5e-7


@pytest.fixture(params=[2, 4], ids=["tiles of two bytes", "tiles of four"])
def _size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 is computed in the tiles of the others, too."""
    choose = configs.launch
    monkeypatch.setattr(
        configs, "launch", lambda pairs, experts, _: choose(pairs, experts, request.param)
    )


def made(*, transposed: bool, bias: bool) -> CudaStackWeight:
    shape = (EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN)
    offset = torch.randn(EXPERTS, OUT) if bias else None
    return CudaStackWeight(torch.randn(shape), offset, transposed=transposed)


@pytest.mark.usefixtures("_size")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mix", COUNTS)
def test_each_pair_meets_its_own_expert(mix: str, bias: bool, transposed: bool) -> None:
    weight, routing = made(transposed=transposed, bias=bias), counted(COUNTS[mix])
    x = torch.randn(sum(COUNTS[mix]), IN)

    def expect(expert: torch.Tensor) -> torch.Tensor:
        y = torch.einsum("pk,pnk->pn", x.double(), weight.values.double()[expert])
        return y if weight.bias is None else y + weight.bias.double()[expert]

    got = weight.grouped(x, routing)
    assert rms(got, expect(routing.expert)) <= LIMIT
    assert rms(got, expect((routing.expert + 1) % EXPERTS)) > 0.1, "they are told apart"
    plain = StackWeight(weight.source, weight.bias, transposed=transposed)
    assert rms(got, plain.grouped(x, routing)) <= 2 * LIMIT


def test_a_pair_has_the_same_bits_alone_and_in_any_company() -> None:
    """One product a turn of the loop: what the interpreter sums inside of one goes by the tile."""
    weight, counts = made(transposed=False, bias=True), COUNTS["skewed"]
    x = torch.zeros(sum(counts), IN)
    x[:, ::32] = torch.randn(sum(counts), -(-IN // 32))
    routing = counted(counts)
    together = weight.grouped(x, routing)
    for pair in (0, 100, 136, 155):
        alone = [0] * EXPERTS
        alone[int(routing.expert[pair])] = 1
        assert torch.equal(weight.grouped(x[pair : pair + 1], counted(alone))[0], together[pair])


def test_no_pairs_are_no_launch() -> None:
    assert made(transposed=False, bias=False).grouped(
        torch.empty(0, IN), counted([0] * 5)
    ).shape == (0, OUT)


def test_it_stands_in_where_torchs_own_product_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for capability, dtype, waits in (
        ((9, 0), torch.bfloat16, False),
        ((10, 0), torch.bfloat16, False),
        ((8, 0), torch.bfloat16, True),
        ((12, 0), torch.bfloat16, True),
        ((9, 0), torch.float16, True),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert plain_experts.waits(gpu, dtype) is waits
    assert not plain_experts.waits(torch.device("cpu"), torch.float32)
    weight = StackWeight(torch.randn(2, 8, 64))
    assert CudaStackWeight.of(weight) is weight
    monkeypatch.setattr(plain_experts, "waits", lambda device, dtype: True)
    found = CudaStackWeight.of(weight)
    assert isinstance(found, CudaStackWeight)
    assert found.source is weight.source


def test_what_a_launch_is_given_is_what_was_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: given.append(options)

    monkeypatch.setattr(plain_experts, "plain_experts", Recorder())
    listed = {
        (tuple(sorted(e.constexprs.items())), e.num_warps, e.num_stages) for e in configs.shipped()
    }
    for transposed in (False, True):
        weight = made(transposed=transposed, bias=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            own = CudaStackWeight(weight.source.to(dtype), weight.bias, transposed=transposed)
            for counts in COUNTS.values():
                own.grouped(torch.randn(sum(counts), IN), counted(counts))
                told = given[-1]
                assert (told["w_row"], told["w_column"])[not transposed] == 1
                names = ("BM", "BN", "BK", "HAS_BIAS", "STAGES")
                fixed = {name: told[name] for name in names}
                fixed["w_row" if transposed else "w_column"] = 1
                launched = (told["num_warps"], told["num_stages"])
                assert (tuple(sorted(fixed.items())), *launched) in listed
