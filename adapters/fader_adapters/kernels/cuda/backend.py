"""The CUDA backend: Triton linears over NF4 and batched deltas. Knows sites, not models."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from fader_adapters.errors import BaseUnsupported, first_line
from fader_adapters.kernels.cuda import nf4
from fader_adapters.kernels.cuda.beside import Beside
from fader_adapters.kernels.cuda.dense import FixedRows, linear
from fader_adapters.kernels.cuda.lora import ROW_BUCKETS, DeltaKernels, LoraStep
from fader_adapters.kernels.cuda.machines import Arch, arch_of
from fader_adapters.kernels.cuda.nf4_codes import CODES
from fader_adapters.kernels.cuda.nf4_experts import CudaNf4Stack
from fader_adapters.kernels.cuda.plain_experts import CudaStackWeight
from fader_adapters.kernels.cuda.sites import CudaLookup, CudaSite, CudaStack
from fader_adapters.kernels.cuda.states import CudaStates
from fader_adapters.kernels.dense import DenseLinear, filled
from fader_adapters.kernels.nf4 import BLOCK, Nf4Weight
from fader_adapters.kernels.nf4 import filled as nf4_filled
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.stack_weights import StackWeight, filled_stack
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

if TYPE_CHECKING:
    from fader_adapters.kernels.backend import BaseLinear, Product

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CudaRoom:
    """Merged weights in torch's memory."""

    def __init__(self, scratch: nf4.Scratch) -> None:
        self._scratch = scratch

    def plain(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> FixedRows:
        weight = filled(rows, shape)
        return FixedRows(DenseLinear(weight, bias), weight, self._scratch)

    head = plain

    def nf4(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> nf4.Nf4Linear | nf4.BitsandbytesLinear:
        return nf4.linear([nf4_filled(rows, shape)], bias, self._scratch)

    def stack(
        self,
        matrices: Iterable[torch.Tensor],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
    ) -> StackWeight:
        return CudaStackWeight.of(filled_stack(matrices, shape, bias))

    def nf4_stack(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int, int], bias: torch.Tensor | None
    ) -> CudaNf4Stack:
        return CudaNf4Stack(rows, shape, bias, self._scratch)


class CudaBackend:
    """bf16 on sm_80 and newer; fp16 and fp32 too, with every weight decoded at every call.

    A row's bits do not depend on its company: rows of one token go through the fused NF4 product,
    all longer ones through dequantised weights and the vendor's GEMM, always on the same number of
    rows at a time, as bitsandbytes' product takes them all on machines whose linears are its own
    (10.x and 11.x); those of NF4 experts all go through one fused product, routers' through
    products of one shape. On a CPU device the kernels run in Triton's interpreter, in fp32, for
    tests.
    """

    name = "cuda"
    together: int | None = ROW_BUCKETS[-1]

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        arch: Arch | None = None,
        entries: int = 1024,
    ) -> None:
        """Allocates the scratch of dequantised weights, and has torch's products summed in fp32,
        in this process. Raises KernelUnavailable for a dtype.

        entries  16-rank chunks of adapters that a captured decode step holds, over all its tiles
        """
        if arch is None:
            capable = device.type == "cuda"
            arch = arch_of(torch.cuda.get_device_capability(device) if capable else (8, 0))
        products = torch.backends.cuda.matmul
        products.allow_bf16_reduced_precision_reduction = False
        products.allow_fp16_reduced_precision_reduction = False
        self._scratch = nf4.Scratch(device)
        self._deltas = DeltaKernels(device, dtype, arch=arch, entries=entries)
        self._beside = Beside(device)

    @property
    def nbytes(self) -> int:
        """Resident bytes of scratch and step buffers."""
        return self._scratch.nbytes + self._deltas.nbytes

    def linear(
        self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None
    ) -> nf4.Nf4Linear | nf4.BitsandbytesLinear:
        """Raises BaseUnsupported for weights on another device than the backend's."""
        self._check_device(weights[0].packed.device)
        return nf4.linear(weights, bias, self._scratch)

    def room(self) -> CudaRoom:
        return CudaRoom(self._scratch)

    def bind(self, site: SiteSpec, base: "BaseLinear") -> CudaSite:
        if isinstance(base, DenseLinear):
            self._check_device(base.weight.device)
            base = FixedRows(base, base.weight, self._scratch)
        return CudaSite(self._deltas.bind(site), base, self._beside)

    def bind_lookup(self, site: SiteSpec) -> CudaLookup:
        return CudaLookup(self._deltas.bind_lookup(site))

    def bind_stack(self, site: SiteSpec, experts: int) -> CudaStack:
        return CudaStack(self._deltas.bind_stack(site))

    def states(self) -> CudaStates:
        return CudaStates(self._scratch.table.device)

    def router(self) -> "Product":
        return partial(linear, scratch=self._scratch)

    def pack_stack(self, weight: StackWeight | Nf4Stack) -> StackWeight | CudaNf4Stack:
        if isinstance(weight, StackWeight):
            self._check_device(weight.source.device)
            return CudaStackWeight.of(weight)
        self._check_device(weight.weight.packed.device)
        return CudaNf4Stack([weight.weight], weight.shape, weight.bias, self._scratch)

    def _check_device(self, device: torch.device) -> None:
        own = self._scratch.table.device
        if device != own:
            raise BaseUnsupported(
                f"expected all weights on {own}, got some on {device}; load the model on one "
                'device: device_map={"": 0}'
            )

    def prepare(self, tables: Tables, terms: StepTerms) -> LoraStep | None:
        """One copy and one launch, none where rows and tables are those of the step before.

        A step of the base too must come through here: its rows decide how linears multiply.
        """
        self._scratch.way = "fused" if all(r.tokens == 1 for r in terms.rows) else "pieces"
        return self._deltas.prepare(tables, terms)

    def blank(
        self, tables: Tables, rows: int | None, *, vectors: bool = False, stacks: bool = False
    ) -> LoraStep:
        """A step that adds nothing, to capture or compile with; see DeltaKernels.blank."""
        self._scratch.way = "pieces" if rows is None else "fused"
        return self._deltas.blank(tables, rows, vectors=vectors, stacks=stacks)

    def blank_prompt(
        self, tables: Tables, tokens: int, *, vectors: bool = False, stacks: bool = False
    ) -> LoraStep:
        """The same for a step of prompts; see DeltaKernels.blank_prompt."""
        self._scratch.way = "pieces"
        return self._deltas.blank_prompt(tables, tokens, vectors=vectors, stacks=stacks)

    def reserve_prompts(self, tables: Tables, buckets: Sequence[int]) -> None:
        """Buffers of steps of prompts that may be captured; see DeltaKernels.reserve_prompts."""
        self._deltas.reserve_prompts(tables, buckets)


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the backend cannot run there, in one line with what to do; empty when it can.

    Compiles and runs one small kernel, so that a missing compiler shows here and not in a request.
    """
    if dtype not in DTYPES:
        return f"it computes in bfloat16, float16 and float32, not in {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0; use an Ampere GPU or newer"
    try:
        sound = _trial(device)
    except Exception as error:  # noqa: BLE001 - whatever a driver, compiler or library raises
        line = first_line(error)
        return f"triton cannot compile or run a kernel ({line}); it needs gcc and Python's headers"
    return "" if sound else "a first kernel gave wrong numbers; check driver and triton versions"


def _trial(device: torch.device) -> bool:
    """Whether a decoded NF4 weight holds the codes it should, and a fused product, where linears
    have one, gives its columns."""
    size = 128
    bytes_of = [16 * i + (15 - i) for i in range(16)] * (size * size // 32)
    packed = torch.tensor(bytes_of, dtype=torch.uint8, device=device)
    scales = torch.full((size * size // BLOCK,), 2.0, device=device)
    scratch = nf4.Scratch(device, size * size * 4)
    linear = nf4.Nf4Linear([Nf4Weight(packed, scales, size, size)], None, scratch)
    got = linear.dense(torch.float32)
    want = [2 * CODES[nibble] for byte in bytes_of for nibble in (byte >> 4, byte & 15)]
    if not torch.equal(got.cpu().view(-1), torch.tensor(want, dtype=torch.float32)):
        return False
    if nf4.checked_arch(device) is None:
        return True
    dtype = torch.float32 if nf4.interpreted(packed) else torch.bfloat16
    picked = torch.eye(16, size, dtype=dtype, device=device)
    out = torch.empty(16, size, dtype=dtype, device=device)
    return torch.equal(linear.fused(picked, out), linear.dense(dtype).T[:16])
