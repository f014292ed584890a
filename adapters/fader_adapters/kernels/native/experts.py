"""A stack of experts in one call: each row against its own expert's matrix. Knows weights and rows;
no routers, no adapters."""

import ctypes

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, ExpertsStruct, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.panels import PANEL, Nf4Panels
from fader_adapters.kernels.native.plain import PlainPanels
from fader_adapters.kernels.native.site import PLAIN
from fader_adapters.kernels.native.workspace import Workspace
from fader_adapters.kernels.nf4 import BLOCK


class ExpertPanels:
    """What multiplies by W [experts, n, k] in panels."""

    def __init__(
        self,
        panels: Nf4Panels | PlainPanels,
        experts: int,
        *,
        bias: Tensor | None = None,
        workspace: Workspace | None = None,
        tape: Tape | None = None,
    ) -> None:
        """panels: of W [experts · n, k], n a multiple of 32; bias [experts, n]. Raises: TypeError,
        ValueError."""
        self.panels, self.experts, self.k = panels, experts, panels.k
        self.n = panels.n // checks.positive("experts", experts)
        if panels.n % experts or not self.fits(self.n, self.k):
            raise ValueError(
                f"n must be a multiple of {PANEL} and k of {BLOCK}, "
                f"got {panels.n} rows of {panels.k} for {experts} experts"
            )
        self._workspace = workspace or Workspace()
        self._tape = tape
        self._struct = ExpertsStruct(n=self.n, k=self.k, experts=experts)
        self._struct.panels = panels.panels.data_ptr()
        if isinstance(panels, Nf4Panels):
            self._struct.scales = panels.scales.data_ptr()
        else:
            self._struct.weights = PLAIN
        self._inputs = (panels.dtype,) if isinstance(panels, PlainPanels) else checks.FLOATS
        if bias is not None:
            bias = checks.tensor(
                "bias", bias, checks.FLOATS, shape=(self.experts, self.n)
            ).float()  # fmt: skip
            self._struct.bias = bias.data_ptr()
        self._keep = bias

    @staticmethod
    def fits(n: int, k: int) -> bool:
        """Whether the kernel takes matrices [n, k]."""
        return not n % PANEL and not k % BLOCK

    def __call__(self, x: Tensor, ends: Tensor) -> Tensor:
        """x [T, k], rows expert by expert, ends int32 [experts]: where each expert's end → [T, n]
        in x's dtype, one rounding from fp32 sums. x is bf16 or fp32, over plain panels their dtype.

        A row's bits depend on nothing but the row and its expert. Raises: TypeError, ValueError.
        """
        checks.inputs("x", x, self._inputs, self.k)
        checks.tensor("ends", ends, (torch.int32,), shape=(self.experts,))
        out = torch.empty((x.shape[0], self.n), dtype=x.dtype)
        code, stride = CODES[x.dtype], checks.row_stride(x)
        self._workspace.call(
            library().fader_experts,
            "experts",
            ctypes.addressof(self._struct),
            x.shape[0],
            ends.data_ptr(),
            x.data_ptr(),
            code,
            stride,
            out.data_ptr(),
            code,
            checks.row_stride(out),
        )
        if self._tape is not None:
            what = ctypes.addressof(self._struct)
            op = Op(kind=Kind.EXPERTS, dtype=code, out_dtype=code, what=what)
            op.x_stride, op.out_stride = stride, checks.row_stride(out)
            op.size[0] = x.shape[0]
            self._tape.note(op, x, y=ends, out=out, keep=self)
        return out
