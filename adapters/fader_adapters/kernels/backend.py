"""What a kernel backend does, and the one place that knows there is more than one."""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch

from fader_adapters.errors import KernelUnavailable
from fader_adapters.kernels import native
from fader_adapters.kernels.cpu import NativeBackend
from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.nf4_stack import Nf4Stack
from fader_adapters.kernels.reference import ReferenceBackend
from fader_adapters.kernels.routing import Routing
from fader_adapters.kernels.stack_weights import StackWeight
from fader_adapters.kernels.states import StateMaker
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms

log = logging.getLogger(__name__)

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x [..., in], weight [out, in], bias [out] → x·Wᵀ + b."""


class BaseLinear(Protocol):
    """A base weight in the form its backend wants: x [T, in] → x·Wᵀ + b [T, out]."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None
    """b [out]"""

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The weight's, where it is not quantised; None: NF4."""
        ...

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weight."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in]."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """W[start:stop] in fp32 [stop − start, in], on the caller's thread alone."""
        ...

    def product(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x·W[start:stop]ᵀ in fp32 [T, stop − start], without bias, on the caller's thread
        alone."""
        ...


class ExpertsWeight(Protocol):
    """The weights of a stack of experts in the form its backend wants, biases included."""

    bias: torch.Tensor | None
    """[experts, out]"""

    @property
    def plain_dtype(self) -> torch.dtype | None:
        """The weight's, where it is not quantised; None: NF4."""
        ...

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weight."""
        ...

    @property
    def resident(self) -> tuple[torch.Tensor, ...]:
        """What it lies in, its codes or values and then its scales; () where that is what the
        model's module holds anyway."""
        ...

    def grouped(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each pair's product with its expert's weight: x [pairs, in] in the routing's order →
        [pairs, out] in x's dtype. A pair's bits depend on the pair alone."""
        ...

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the matrix [experts · out, in] in fp32, on the caller's thread alone."""
        ...

    def product(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """x times those rows in fp32, without bias, on the caller's thread alone."""
        ...


Step = object
"""A step's delta metadata on the device, made once by a backend and read by its sites only. One
with a `valid` that is false has given its place to a later one, and is to be prepared again."""


class SiteKernel(Protocol):
    """One site bound to its base weight."""

    base: BaseLinear

    def __call__(self, x: torch.Tensor, step: Step | None) -> torch.Tensor:
        """y[t] = (W·x[t]) ∘ (1 + Σᵢ γ[t,i]·gain[slotᵢ,m]) + b
                 + Σᵢ γ[t,i]·s[slotᵢ,m]·((x[t]·A[slotᵢ,m]ᵀ)·B[slotᵢ,m] + biasB[slotᵢ,m]).

        x        [T, in]   the step's tokens in packed order, all of them
        returns  [T, Σ out of the members] in x's dtype
        Rows without terms equal base(x[t]) bit for bit; a row's terms are summed in the order of
        its RowTerms, whatever else is in the step; a zero coefficient selects, it never multiplies.
        """
        ...


class Room(Protocol):
    """Where the weights of one merged lane lie: apart from the base's, freed when none is used."""

    def plain(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> BaseLinear:
        """A weight [out, in] = shape as a base linear, of x's dtype. Its rows come in order, some
        at a time; each part is stored before the next is asked for. On any thread."""
        ...

    def head(
        self, rows: Iterable[torch.Tensor], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> BaseLinear:
        """The same for the output head's: its logits are as fine as those of the base's head."""
        ...

    def nf4(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int], bias: torch.Tensor | None
    ) -> BaseLinear:
        """The same as `Backend.linear`, with the same kernels."""
        ...

    def stack(
        self,
        matrices: Iterable[torch.Tensor],
        shape: tuple[int, int, int],
        bias: torch.Tensor | None,
    ) -> ExpertsWeight:
        """Experts (experts, out, in) = shape, of matrices [out, in] that come one after the other;
        each is stored before the next is asked for. On any thread."""
        ...

    def nf4_stack(
        self, rows: Iterable[Nf4Weight], shape: tuple[int, int, int], bias: torch.Tensor | None
    ) -> ExpertsWeight:
        """The same in NF4, with the kernels of a base's; rows of [experts · out, in] in order, some
        at a time."""
        ...


class Backend(Protocol):
    """Base linears and batched deltas on one kind of device."""

    name: str
    together: int | None
    """Rows of one token run in forwards of their own, so many in one, or their bits would depend on
    longer ones; None: all rows in one."""

    def linear(self, weights: Sequence[Nf4Weight], bias: torch.Tensor | None) -> BaseLinear:
        """Bring NF4 weights, stacked by rows, into this backend's layout, once, at load."""
        ...

    def room(self) -> Room:
        """A place for weights beside the base's."""
        ...

    def bind(self, site: SiteSpec, base: BaseLinear) -> SiteKernel:
        """Prepare the call of one site; base holds the members' stacked weights."""
        ...

    def prepare(self, tables: Tables, terms: StepTerms) -> Step | None:
        """Metadata of one step; None when no row has a term."""
        ...


class LookupKernel(Protocol):
    """The delta of one embedding."""

    def __call__(self, y: torch.Tensor, ids: torch.Tensor, step: Step | None) -> None:
        """y[t] += y[t]∘G + Σᵢ γ[t,i]·s[slotᵢ]·A[slotᵢ][:, ids[t]]ᵀ·B[slotᵢ], in place; G as above.

        y    [T, out]   what the embedding gave
        ids  [T]        int64
        """
        ...


@runtime_checkable
class LookupBackend(Protocol):
    """A backend that also adapts embeddings; with others they are no target."""

    def bind_lookup(self, site: SiteSpec) -> LookupKernel:
        """Prepare the call of the embedding's site: in is the vocabulary."""
        ...


class StackKernel(Protocol):
    """The deltas of one stack of experts."""

    def __call__(
        self, y: torch.Tensor, x: torch.Tensor, routing: Routing, step: Step | None
    ) -> torch.Tensor:
        """y[p] + Σᵢ γ[t,i]·s[slotᵢ]·(x[p]·A[slotᵢ,e]ᵀ)·B[slotᵢ,e], t and e being p's token and
        expert; summed in fp32, rounded to y's dtype; y may be changed.

        y        [pairs, out]  what the experts gave, in the order of the routing
        x        [pairs, in]   what they were given
        routing  of the tokens of the step, all of them
        A pair without terms keeps its bits, others have theirs whatever else is in the step.
        """
        ...


@runtime_checkable
class StackBackend(Protocol):
    """A backend that also adapts stacks of experts; with others they are no target."""

    def bind_stack(self, site: SiteSpec, experts: int) -> StackKernel:
        """Prepare the call of one stack: in and out are those of one expert."""
        ...

    def router(self) -> Product | None:
        """How routers multiply; None: torch's own way gives a row its bits in any company."""
        ...

    def pack_stack(self, weight: StackWeight | Nf4Stack) -> ExpertsWeight:
        """Bring a base's experts into this backend's layout, once, at load; as they are where it
        has none."""
        ...


@runtime_checkable
class StateBackend(Protocol):
    """A backend with kernels for layers that keep states; elsewhere the model's own code runs."""

    def states(self) -> StateMaker: ...


BackendName = Literal["auto", "reference", "native", "cuda"]


def choose(device: torch.device, dtype: torch.dtype, name: BackendName = "auto") -> Backend:
    """The fastest backend for `device` and the activations' dtype, or the one asked for.

    A machine that should have the fast kernels and has not is told so, once, in the log. Raises
    KernelUnavailable when the one asked for cannot run here, and for a GPU that is not the current
    one: kernels, events and copies go to that.
    """
    _check_current(device)
    if name == "reference":
        return ReferenceBackend()
    backend, obstacle = _fastest(device, dtype, name)
    if backend is not None:
        return backend
    if name != "auto":
        raise KernelUnavailable(f"the {name} backend is not available: {obstacle}")
    log.warning("running on the slow reference kernels: %s", obstacle)
    return ReferenceBackend()


def _fastest(
    device: torch.device, dtype: torch.dtype, name: BackendName
) -> tuple[Backend | None, str]:
    """The backend made for the device, or why there is none."""
    if name != "cuda" and (device.type == "cpu" or name == "native"):
        obstacle = _native_obstacle(device, dtype)
        return (None, obstacle) if obstacle else (NativeBackend(), "")
    if device.type != "cuda":
        return None, f"it runs on NVIDIA GPUs, not on {device.type}; use --device cuda"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed; install the torch build for CUDA, which brings it"
    try:
        from fader_adapters.kernels.cuda import backend as cuda  # imports triton
    except ImportError as error:
        return None, f"triton cannot be imported ({error}); install it again"
    obstacle = cuda.obstacle(device, dtype)
    if not obstacle and dtype != torch.bfloat16:
        log.warning("in %s every NF4 weight is decoded at every call: bfloat16 is faster", dtype)
    return (None, obstacle) if obstacle else (cuda.CudaBackend(device, dtype), "")


def _check_current(device: torch.device) -> None:
    if device.type != "cuda" or device.index is None:
        return
    current = torch.cuda.current_device()
    if device.index != current:
        raise KernelUnavailable(
            f"the base is on {device} and the current device is cuda:{current}, where its kernels "
            f"would be launched; call torch.cuda.set_device({device.index}) first, or set "
            f"CUDA_VISIBLE_DEVICES={device.index} for the whole process"
        )


def _native_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in float32 and bfloat16, not in {dtype}"
    return "" if native.available() else native.reason()
