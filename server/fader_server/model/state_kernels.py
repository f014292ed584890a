"""A backend's kernels where transformers' functions over the tokens of one sequence stand: causal
convolutions, gated delta rules, state spaces, selective scans. They take all rows of a step at
once.

Knows those functions by name and signature; knows no module, no cache and no request.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fader_adapters.kernels.native import ScanForm, StateRows
from fader_adapters.kernels.states import (
    ConvolutionKernel,
    ScanKernel,
    SelectiveKernel,
    Slotted,
    StateMaker,
)
from fader_server.errors import ModelUnsupported

Function = Callable[..., Any]
SILU = ("silu", "swish")


class StateKernels:
    """Those of one layer."""

    def __init__(self, make: StateMaker, rows: Callable[[], StateRows | None]) -> None:
        """rows: of the step that runs, while one of the functions is called."""
        self._rows = rows
        self._make = make
        self._slots = 1
        self._convolutions: dict[int, ConvolutionKernel] = {}
        self._scan: ScanKernel | None = None
        self._selective: SelectiveKernel | None = None

    @property
    def functions(self) -> Mapping[str, Function]:
        """What stands in for which of transformers' functions."""
        return {
            "causal_conv1d_fn": self.convolve,
            "torch_chunk_gated_delta_rule": self.delta_rule,
            "chunk_kimi_delta_attention": self.delta_rule,
            "mamba2_chunk_scan": self.state_space,
            "mamba_selective_scan": self.select,
        }

    @property
    def bytes_per_slot(self) -> int:
        """Of what was called so far."""
        return sum(kernel.states[0].nbytes for kernel in self._kernels())

    def grow(self, slots: int) -> None:
        """Have room for so many states; those there are stay."""
        self._slots = slots
        for kernel in self._kernels():
            kernel.grow(slots)

    def at(self, slots: Tensor) -> list[Tensor]:
        """Copies of the states in these slots."""
        return [kernel.states[slots] for kernel in self._kernels()]

    def _kernels(self) -> list[Slotted]:
        scans = (self._scan, self._selective)
        return [*self._convolutions.values(), *(scan for scan in scans if scan is not None)]

    def convolve(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: object,
    ) -> Tensor:
        """`causal_conv1d_fn` of the step's rows: x [1, channels, T] → [1, channels, T]."""
        if activation is not None and activation not in SILU:
            raise ModelUnsupported(f"a convolution with the activation {activation}")
        kernel = self._convolutions.get(weight.data_ptr())
        if kernel is None:
            kernel = self._convolutions[weight.data_ptr()] = self._make.convolution(
                weight.data.contiguous(), None if bias is None else bias.data,
                slots=self._slots, silu=activation is not None,
            )  # fmt: skip
        x = hidden_states[0].t().to(weight.dtype)
        x = x if x.stride(1) == 1 else x.contiguous()
        return kernel(x, self._told()).to(hidden_states.dtype).t().unsqueeze(0)

    def delta_rule(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        use_qk_l2norm_in_kernel: bool = False,
        **_: object,
    ) -> tuple[Tensor, None]:
        """`torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention` of the step's rows.

        query, key [1, T, groups, keys], value [1, T, heads, values], beta [1, T, heads], g as beta
        or with a value for each key → [1, T, heads, values], and no state of one sequence.
        """
        if not use_qk_l2norm_in_kernel:
            raise ModelUnsupported("a delta rule whose keys are of any length")
        (groups, keys), (heads, values) = key.shape[2:], value.shape[2:]
        form = ScanForm(groups, heads, keys, values, delta=True, unit=True, by_key=g.dim() == 4)
        gates = torch.cat([g.flatten(2).float(), beta.float()], dim=-1)[0]
        parts = _side_by_side(query[0], key[0], value[0])
        return self._scanned(form, parts, gates, None, value.dtype), None

    def state_space(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        z: Tensor | None = None,
        return_final_states: bool = False,
        **_: object,
    ) -> Tensor:
        """`mamba2_chunk_scan` of the step's rows: x [1, T, heads, values], dt [1, T, heads], A, D
        [heads], B and C [1, T, groups, keys] → fp32 [1, T, heads, values].
        """
        if z is not None or return_final_states:
            raise ModelUnsupported("a state space with a gate, or asked for its states")
        dt = dt if dt_bias is None else dt + dt_bias
        dt = F.softplus(dt) if dt_softplus else dt
        dt = torch.clamp(dt, *dt_limit).float()
        form = ScanForm(
            B.shape[2], hidden_states.shape[2], B.shape[3], hidden_states.shape[3],
            delta=False, unit=False,
        )  # fmt: skip
        gates = torch.cat([dt * A.float(), dt], dim=-1)[0]
        parts = _side_by_side(C[0], B[0], hidden_states[0])
        return self._scanned(form, parts, gates, D, torch.float32)

    def select(
        self,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: object,
    ) -> Tensor:
        """`mamba_selective_scan` of the step's rows: x, dt and z [1, channels, T], A [channels,
        keys], which is the same in every call, B and C [1, keys, T] → [1, channels, T].
        """
        if return_last_state or A.shape != (hidden_states.shape[1], B.shape[1]):
            raise ModelUnsupported("a selective scan of other shapes, or asked for its states")
        if self._selective is None:
            self._selective = self._make.selective(
                A, delta_bias, D, slots=self._slots, softplus=delta_softplus
            )
        steps = torch.cat([part[0].t() for part in (dt, B, C)], dim=-1)
        gate = None if z is None else z[0].t()
        out = self._selective(hidden_states[0].t(), steps, self._told(), gate=gate)
        return out.t().unsqueeze(0)

    def _scanned(
        self,
        form: ScanForm,
        parts: tuple[Tensor, tuple[int, int, int]],
        gates: Tensor,
        skip: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        if self._scan is None:
            own = None if skip is None else skip.data
            self._scan = self._make.scan(form, slots=self._slots, skip=own)
        if self._scan.form != form:
            raise ModelUnsupported("a layer with two recurrences")
        x, places = parts
        return self._scan(x, gates, self._told(), places=places, dtype=dtype).unsqueeze(0)

    def _told(self) -> StateRows:
        rows = self._rows()
        assert rows is not None
        return rows


def _side_by_side(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """[T, n, width] each as one tensor [T, all], and where each begins in a row: slices of one
    tensor, as models make them, stay where they are."""
    parts = (q, k, v)
    first = min(parts, key=lambda part: part.storage_offset())
    begin = int(first.storage_offset())
    places = tuple(int(part.storage_offset()) - begin for part in parts)
    width = max(at + part[0].numel() for at, part in zip(places, parts, strict=True))
    row = first.stride(0) if len(first) > 1 else width
    same = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part[0].is_contiguous()
        and (len(part) == 1 or part.stride(0) == row)
        for part in parts
    )
    if same and width <= row:
        return first.as_strided((len(first), width), (row, 1)), (places[0], places[1], places[2])
    sizes = [part[0].numel() for part in parts]
    joined = torch.cat([part.flatten(1) for part in parts], dim=1)
    return joined, (0, sizes[0], sizes[0] + sizes[1])
