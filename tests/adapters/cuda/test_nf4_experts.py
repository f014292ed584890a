"""Experts in NF4 in Triton's interpreter, in fp32, against float64 and the reference: every pair
by its own expert, and a pair's bits in any company."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the compiled kernels here", allow_module_level=True)

from fader_adapters.errors import BaseUnsupported
from fader_adapters.kernels.backend import ExpertsWeight
from fader_adapters.kernels.cuda import nf4_expert_configs as configs
from fader_adapters.kernels.cuda import nf4_experts
from fader_adapters.kernels.cuda.backend import CudaBackend
from fader_adapters.kernels.cuda.nf4_expert_kernels import SCAN
from fader_adapters.kernels.cuda.nf4_experts import CudaNf4Stack
from fader_adapters.kernels.cuda.nf4_tiles import TILE
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight
from tests.support.nf4_weights import random_weight, rms, values
from tests.support.stacks import COUNTS, counted

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CPU = torch.device("cpu")
EXPERTS, OUT, IN = 5, 150, 192
LIMIT = 5e-7


def made(
    shape: tuple[int, int, int] = (EXPERTS, OUT, IN), *, bias: bool = True
) -> tuple[Nf4Stack, CudaNf4Stack]:
    """A stack as the reference has it, and as the backend packs it."""
    experts, out, width = shape
    offset = torch.randn(experts, out) if bias else None
    plain = Nf4Stack(random_weight(experts * out, width), experts, offset)
    packed = CudaBackend(CPU, torch.float32, arch=90).pack_stack(plain)
    assert isinstance(packed, CudaNf4Stack)
    return plain, packed


def expect(stack: Nf4Stack, x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """[pairs, out] in float64, of any experts."""
    y = torch.einsum("pk,pnk->pn", x.double(), values(stack.weight).view(stack.shape)[expert])
    return y if stack.bias is None else y + stack.bias.double()[expert]


def test_memory_is_poisoned() -> None:
    assert bool(torch.empty(9).isnan().all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mix", COUNTS)
def test_each_pair_meets_its_own_expert(mix: str, bias: bool) -> None:
    plain, packed = made(bias=bias)
    routing = counted(COUNTS[mix])
    x = torch.randn(sum(COUNTS[mix]), IN)
    got = packed.grouped(x, routing)
    assert rms(got, expect(plain, x, routing.expert)) <= LIMIT
    assert rms(got, plain.grouped(x, routing)) <= 2 * LIMIT
    assert rms(got, expect(plain, x, (routing.expert + 1) % EXPERTS)) > 0.1, "they are told apart"


@pytest.mark.parametrize(
    "shape", [(1, 1, 128), (3, 128, 64), (2, 257, 64), (130, 3, 64), (260, 2, 64)]
)
def test_any_number_of_experts_and_rows_of_them(shape: tuple[int, int, int]) -> None:
    """More than are looked at in one load, too."""
    plain, packed = made(shape)
    counts = [0] * shape[0]
    for expert in (shape[0] // 2, shape[0] - 1, shape[0] - 2, 0):
        counts[expert] += 2
    routing = counted(counts)
    x = torch.randn(sum(counts), shape[2])
    assert rms(packed.grouped(x, routing), expect(plain, x, routing.expert)) <= LIMIT
    assert shape[0] <= 130 or shape[0] > 2 * SCAN.value


def test_tokens_with_several_experts_come_in_the_routings_order() -> None:
    plain, packed = made()
    luck = torch.rand(9, EXPERTS)
    routing = Routing.of(luck.topk(2).indices, EXPERTS)
    x = torch.randn(9, IN)[routing.token]
    got = packed.grouped(x, routing)
    assert rms(got, expect(plain, x, routing.expert)) <= LIMIT
    wrong = replace(routing, ends=torch.full_like(routing.ends, 18))
    assert rms(packed.grouped(x, wrong), expect(plain, x, routing.expert)) > 0.1


def sparse(pairs: int) -> torch.Tensor:
    """One column of each half block: what the interpreter sums in an order that goes by the tile's
    shape, where a GPU has one instruction for all tiles, is one product here."""
    x = torch.zeros(pairs, IN // 32, 32)
    x.scatter_(2, torch.randint(0, 32, (pairs, IN // 32, 1)), torch.randn(pairs, IN // 32, 1))
    return x.view(pairs, IN)


def test_a_pair_has_the_same_bits_alone_and_in_any_company() -> None:
    _, packed = made()
    counts = COUNTS["skewed"]
    routing = counted(counts)
    x = sparse(sum(counts))
    together = packed.grouped(x, routing)
    launches = set()
    for pair in (0, 100, 136, 155):
        expert = int(routing.expert[pair])
        for before, after in ((0, 0), (40, 25)) if pair else ((3, 1), (90, 160)):
            company = [0] * EXPERTS
            company[expert] = before + 1 + after
            company[(expert + 2) % EXPERTS] = 5 if before else 0
            other = counted(company)
            at = int((other.expert < expert).sum()) + before
            xs = sparse(sum(company))
            xs[at] = x[pair]
            assert torch.equal(packed.grouped(xs, other)[at], together[pair]), (pair, before)
            launches.add(configs.launch(80, sum(company), EXPERTS, OUT))
    assert {config.bm for config in launches} == {16, 32, 128}
    blocks = [2, 0, 1]
    packed.tiles.codes[:], packed.tiles.scales[:] = (
        held[:, blocks].clone() for held in (packed.tiles.codes, packed.tiles.scales)
    )
    rolled = x.view(-1, 3, 64)[:, blocks].reshape(x.shape)
    assert rms(packed.grouped(rolled, routing), together) <= LIMIT
    assert not torch.equal(packed.grouped(rolled, routing), together), "in another order"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_non_finite_pairs_stay_by_themselves() -> None:
    _, packed = made()
    routing = counted((2, 20, 1, 0, 1))
    x = torch.randn(24, IN)
    clean = packed.grouped(x, routing)
    x[3, 5], x[22, 1] = torch.inf, torch.nan
    dirty = packed.grouped(x, routing)
    others = [i for i in range(24) if i not in (3, 22)]
    assert torch.equal(dirty[others], clean[others])
    assert bool(dirty[22].isnan().all())


def test_strided_rows_and_no_rows() -> None:
    _, packed = made()
    routing, wide = counted((2, 0, 3, 1, 0)), torch.randn(6, 3 * IN)
    want = packed.grouped(wide[:, 16 : 16 + IN].contiguous(), routing)
    assert torch.equal(packed.grouped(wide[:, 16 : 16 + IN], routing), want)
    every_other = wide[:, : 2 * IN : 2]
    assert torch.equal(
        packed.grouped(every_other, routing), packed.grouped(every_other.contiguous(), routing)
    )
    assert not torch.equal(packed.grouped(every_other, routing), want)
    assert packed.grouped(wide[:0, :IN], counted((0,) * EXPERTS)).shape == (0, OUT)
    one = counted((0, 0, 1, 0, 0))
    column = torch.randn(IN, 9).T[4:5]
    assert torch.equal(packed.grouped(column, one), packed.grouped(column.contiguous(), one))


def test_half_precision_is_multiplied_as_such() -> None:
    """Codes and result are rounded to it, the sums are not."""
    plain, packed = made()
    routing = counted(COUNTS["few pairs"])
    x = torch.randn(7, IN).half()
    got = packed.grouped(x, routing)
    assert got.dtype == torch.float16
    assert 1e-6 < rms(got, expect(plain, x, routing.expert)) < 1e-3


@pytest.mark.parametrize("span", [(0, 1), (3, 140), (149, 151), (100, 450), (700, 750)])
def test_rows_and_products_are_the_references(span: tuple[int, int]) -> None:
    plain, packed = made()
    start, stop = span
    got = packed.rows(start, stop)
    assert torch.equal(got, values(plain.weight)[start:stop].float())
    assert not torch.equal(got, packed.rows(start, stop).flip(1))
    x = torch.randn(3, IN)
    assert rms(packed.product(x, start, stop), plain.product(x, start, stop)) <= LIMIT


@pytest.mark.parametrize("sizes", [(1, 149, 300, 300), (150,) * 5, (64,) * 11 + (46,), (750,)])
def test_a_lanes_stack_is_filled_by_rows_however_they_come(sizes: tuple[int, ...]) -> None:
    plain, packed = made()
    done: list[int] = []

    def parts() -> Iterator[Nf4Weight]:
        for size in sizes:
            at = sum(done)
            part = plain.weight.rows(at, at + size)
            lent = Nf4Weight(part.packed.clone(), part.absmax.clone(), size, IN)
            yield lent
            lent.packed.fill_(0)  # a part is done with before the next is asked for
            done.append(size)

    room = CudaBackend(CPU, torch.float32, arch=90).room()
    filled: ExpertsWeight = room.nf4_stack(parts(), plain.shape, plain.bias)
    assert isinstance(filled, CudaNf4Stack)
    assert torch.equal(filled.tiles.codes, packed.tiles.codes)
    assert torch.equal(filled.tiles.scales, packed.tiles.scales)
    assert sum(done) == EXPERTS * OUT


def test_resident_bytes_are_four_bits_and_the_absmax() -> None:
    _, packed = made((3, 2 * TILE, 128))
    assert packed.plain_dtype is None
    assert packed.nbytes == 3 * 2 * TILE * 128 * 0.5625
    assert made((3, TILE + 1, 128))[1].nbytes == packed.nbytes


def test_blocks_that_would_straddle_rows_are_refused() -> None:
    with pytest.raises(BaseUnsupported, match="straddle"):
        made((2, 64, 96))


def test_unquantised_stacks_stay_as_they_are() -> None:
    weight = StackWeight(torch.randn(2, 8, 64))
    assert CudaBackend(CPU, torch.float32, arch=90).pack_stack(weight) is weight


def test_what_a_launch_is_given_is_what_was_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """For bf16 on a machine of the tables, and for others."""
    given: list[tuple[tuple[int, ...], dict]] = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **options: given.append((grid, options))

    _, packed = made()
    monkeypatch.setattr(nf4_experts, "nf4_experts", Recorder())
    monkeypatch.setattr(nf4_experts, "interpreted", lambda x: False)
    names = ("BM", "BN", "HAS_BIAS", "EXACT", "STAGES")
    for arch, dtype in (
        *((90, torch.bfloat16), (80, torch.bfloat16), (None, torch.bfloat16)),
        *((90, torch.float16), (90, torch.float32)),
    ):
        monkeypatch.setattr(packed, "_arch", arch)
        for counts in COUNTS.values():
            packed.grouped(torch.randn(sum(counts), IN).to(dtype), counted(counts))
            grid, options = given[-1]
            exact = not arch or dtype != torch.bfloat16
            kind = {torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16"}.get(dtype, "*fp32:16")
            listed = [
                (e.constexprs, e.num_warps, e.num_stages)
                for e in configs.shipped()
                if (arch or 80) in e.archs and e.signature["x_ptr"] == kind
            ]
            launched = {name: options[name] for name in names}
            assert (launched, options["num_warps"], options["num_stages"]) in listed
            assert launched["EXACT"] is exact
            assert grid[0] * launched["BN"] >= OUT
    assert len({grid[1] for grid, _ in given}) > 3, "the grid goes by the number of pairs"
