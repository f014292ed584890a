"""What a kernel backend does, and the one place that knows there is more than one."""

from typing import Literal, Protocol

import torch

from fader_adapters.kernels.nf4 import Nf4Weight
from fader_adapters.kernels.reference import ReferenceBackend
from fader_adapters.kernels.tables import Tables
from fader_adapters.spec import SiteSpec, StepTerms


class BaseLinear(Protocol):
    """A base weight in the form its backend wants: x [T, in] → x·Wᵀ + b [T, out]."""

    in_features: int
    out_features: int

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weight."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out, in]."""
        ...


Step = object
"""A step's delta metadata on the device, made once by a backend and read by its sites only."""


class SiteKernel(Protocol):
    """One site bound to its base weight."""

    base: BaseLinear

    def __call__(self, x: torch.Tensor, step: Step | None) -> torch.Tensor:
        """y[t] = base(x[t]) + Σᵢ γ[t,i]·s[slotᵢ,m]·(x[t]·A[slotᵢ,m]ᵀ)·B[slotᵢ,m].

        x        [T, in]   the step's tokens in packed order, then padding that gets the base alone
        returns  [T, Σ out of the members] in x's dtype
        Rows without terms equal base(x[t]) bit for bit; a row's terms are summed in the order of
        its RowTerms, whatever else is in the step; a zero coefficient selects, it never multiplies.
        """
        ...


class Backend(Protocol):
    """Base linears and batched deltas on one kind of device."""

    name: str

    def linear(self, weight: Nf4Weight, bias: torch.Tensor | None) -> BaseLinear:
        """Bring an NF4 weight into this backend's layout, once, at load."""
        ...

    def bind(self, site: SiteSpec, base: BaseLinear) -> SiteKernel:
        """Prepare the call of one site; base holds the members' stacked weights."""
        ...

    def prepare(self, tables: Tables, terms: StepTerms) -> Step | None:
        """Metadata of one step; None when no row has a term."""
        ...


BackendName = Literal["auto", "reference"]


def choose(device: torch.device, name: BackendName = "auto") -> Backend:
    """The fastest backend for `device`, or the one asked for.

    Raises KernelUnavailable when the one asked for cannot run here.
    """
    return ReferenceBackend()
