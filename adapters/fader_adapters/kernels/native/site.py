"""A site: y = (x·Wᵀ)∘(1 + Σ γ·gain) + bias + Σ γ·s·((x·Aᵀ)·B + biasB) for the linears that share
x. Knows tables and panels, no models."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, SiteStruct, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.panels import Nf4Panels
from fader_adapters.kernels.native.plain import PlainPanels
from fader_adapters.kernels.native.screen import Screen
from fader_adapters.kernels.native.step import StepPlan
from fader_adapters.kernels.native.workspace import Workspace

PLAIN = 1
"""FADER_PLAIN of csrc/fader.h."""


@dataclass(frozen=True, slots=True)
class SiteTables:
    """Where each slot keeps its matrices for one site of `members` linears.

    arena: bf16 or fp32 [elements].
    a_off, b_off: int64 [slots, members], element offsets of A [r, k] and of B rank-major
    [r, n_member]; -1 = the adapter leaves that member alone.
    gain_off, bias_off: the same to vectors [n_member], -1 = none; None: nobody has any.
    rank int32, scale fp32: [slots, members]. cols: (n0, n1) of each member in y, ascending.
    The tensors may be rewritten in place between steps.
    """

    arena: Tensor
    a_off: Tensor
    b_off: Tensor
    rank: Tensor
    scale: Tensor
    cols: Sequence[tuple[int, int]]
    gain_off: Tensor | None = None
    bias_off: Tensor | None = None

    def __post_init__(self) -> None:
        checks.tensor("arena", self.arena, checks.FLOATS, shape=(None,))
        shape = (
            self.a_off.shape[0] if isinstance(self.a_off, Tensor) and self.a_off.ndim else None,
            len(self.cols),
        )
        for name, dtype in (
            ("a_off", torch.int64),
            ("b_off", torch.int64),
            ("rank", torch.int32),
            ("scale", torch.float32),
            ("gain_off", torch.int64),
            ("bias_off", torch.int64),
        ):
            if getattr(self, name) is None and name in ("gain_off", "bias_off"):
                continue
            table = checks.rows(name, getattr(self, name), (dtype,), shape=shape)
            if checks.row_stride(table) != checks.row_stride(self.a_off):
                raise ValueError(f"{name} must have the row stride of a_off, got {table.stride()}")
        if not self.cols:
            raise ValueError("cols must name at least one member")
        last = 0
        for start, end in self.cols:
            if not last <= start < end:
                raise ValueError(f"cols must be ascending and disjoint, got {list(self.cols)}")
            last = end


class Site:
    """One site, its pointers taken once. Call it with rows and the step's plan.

    workspace: scratch shared by the sites of one thread; by default the site owns one.
    """

    def __init__(
        self,
        base: Nf4Panels | PlainPanels | None,
        tables: SiteTables | None = None,
        *,
        bias: Tensor | None = None,
        shape: tuple[int, int] | None = None,
        workspace: Workspace | None = None,
        tape: Tape | None = None,
    ) -> None:
        """base: the weights, or None for a delta alone (then `shape` = (n, k)); bias fp32 or bf16
        [n], without a base what `out` already holds; tables may follow by `bind`.

        Raises: TypeError, ValueError.
        """
        if base is None and shape is None:
            raise ValueError("base or shape must be given")
        self.n, self.k = (base.n, base.k) if base is not None else shape or (0, 0)
        self._function = library().fader_site
        self._workspace = workspace or Workspace()
        self._tape = tape
        self._struct = SiteStruct(n=self.n, k=self.k)
        self._ref = ctypes.addressof(self._struct)
        if bias is not None:
            bias = checks.tensor("bias", bias, checks.FLOATS, shape=(self.n,)).float()
            self._struct.bias = bias.data_ptr()
        if base is not None:
            self._struct.panels = base.panels.data_ptr()
            if isinstance(base, Nf4Panels):
                self._struct.scales = base.scales.data_ptr()
            else:
                self._struct.weights = PLAIN
        self._inputs = (base.dtype,) if isinstance(base, PlainPanels) else checks.FLOATS
        self._keep = (base, bias)
        self.has_base, self.has_tables = base is not None, False
        if tables is not None:
            self.bind(tables)

    @property
    def address(self) -> int:
        """What recorded calls name it by."""
        return self._ref

    def leave_out(self, screen: Screen) -> None:
        """From now on what `screen`, of this site's own plain weights, lets be left out."""
        assert isinstance(self._keep[0], PlainPanels)
        self._struct.screen = screen.address
        self._screen = screen

    def bind(self, tables: SiteTables) -> None:
        """Read deltas from `tables` from now on; the site's own address stays. Raises:
        ValueError."""
        if tables.cols[-1][1] > self.n:
            raise ValueError(f"cols must end at or before n = {self.n}, got {list(tables.cols)}")
        cols = torch.tensor(tables.cols, dtype=torch.int32)
        s = self._struct
        s.arena, s.arena_count = tables.arena.data_ptr(), tables.arena.numel()
        s.arena_dtype = CODES[tables.arena.dtype]
        s.a_off, s.b_off = tables.a_off.data_ptr(), tables.b_off.data_ptr()
        s.rank, s.scale = tables.rank.data_ptr(), tables.scale.data_ptr()
        s.gain_off = None if tables.gain_off is None else tables.gain_off.data_ptr()
        s.bias_off = None if tables.bias_off is None else tables.bias_off.data_ptr()
        s.cols, s.members = cols.data_ptr(), len(tables.cols)
        s.table_stride, s.slots = checks.row_stride(tables.a_off), tables.a_off.shape[0]
        self._tables = (tables, cols)
        self.has_tables = True

    def __call__(
        self, x: Tensor, plan: StepPlan | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """y [T, n] in `out` (bf16 or fp32; default x's dtype), one rounding from fp32 sums.

        x: bf16 or fp32, over plain panels their dtype, [T, k], rows may be strided. Without a base
        `out` (fp32) is required and added to.
        A row's bits depend on nothing but the row, its terms and the weights. Raises: TypeError,
        ValueError.
        """
        checks.inputs("x", x, self._inputs, self.k)
        tokens = x.shape[0]
        dtype = x.dtype if out is None else out.dtype
        if out is not None and dtype not in checks.FLOATS:
            raise TypeError(f"out must be torch.float32 or torch.bfloat16, got {dtype}")
        if not self.has_base and (out is None or dtype != torch.float32):
            raise TypeError("out must be a torch.float32 tensor to add a delta to")
        out = checks.output("out", out, (tokens, self.n), dtype)
        blob = None
        if plan is not None:
            if plan.tokens != tokens:
                raise ValueError(f"plan must be for the {tokens} rows of x, got {plan.tokens}")
            if plan.active and not self.has_tables:
                raise ValueError("plan names adapters, but this site has no tables")
            blob = plan.pointer
        self._workspace.call(
            self._function,
            "site",
            self._ref,
            blob,
            tokens,
            x.data_ptr(),
            CODES[x.dtype],
            checks.row_stride(x),
            out.data_ptr(),
            CODES[dtype],
            checks.row_stride(out),
        )
        if self._tape is not None:
            op = Op(kind=Kind.SITE, dtype=CODES[x.dtype], out_dtype=CODES[dtype], what=self._ref)
            op.x_stride, op.out_stride = checks.row_stride(x), checks.row_stride(out)
            op.size[0] = tokens
            self._tape.note(op, x, out=out, keep=self)
        return out


class Lookup(Site):
    """An embedding's delta in place: y += A[:, ids]ᵀ·B and what else a site adds."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        workspace: Workspace | None = None,
        tape: Tape | None = None,
    ) -> None:
        """shape: (width, vocabulary)"""
        super().__init__(None, shape=shape, workspace=workspace, tape=tape)
        self._function = library().fader_lookup

    def add(self, y: Tensor, ids: Tensor, plan: StepPlan | None) -> None:
        """y bf16 or fp32 [T, width], ids int64 [T]. Raises: TypeError, ValueError."""
        checks.inputs("y", y, checks.FLOATS, self.n)
        checks.tensor("ids", ids, (torch.int64,), shape=(y.shape[0],))
        if plan is not None and (
            plan.tokens != y.shape[0] or (plan.active and not self.has_tables)
        ):
            raise ValueError(f"plan must be for the {y.shape[0]} rows of y, and tables be bound")
        stride, code = checks.row_stride(y), CODES[y.dtype]
        if plan is not None:
            self._workspace.call(
                self._function,
                "lookup",
                self._ref,
                plan.pointer,
                y.shape[0],
                ids.data_ptr(),
                y.data_ptr(),
                code,
                stride,
            )
        if self._tape is not None:
            op = Op(kind=Kind.LOOKUP, out_dtype=code, what=self._ref)
            op.out_stride = stride
            op.size[0] = y.shape[0]
            self._tape.note(op, ids, out=y, keep=self)


def gemm(
    x: Tensor,
    panels: Nf4Panels | PlainPanels,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x·Wᵀ + bias: x bf16 or fp32 [M, k] -> `out` [M, n], by default fp32. Raises: TypeError,
    ValueError.

    bf16 rows use bf16 codes with fp32 sums and absmax where the machine multiplies bf16, else
    exact fp32.
    """
    checks.rows("x", x, checks.FLOATS, shape=(None, panels.k))
    if out is None:
        out = torch.empty((x.shape[0], panels.n), dtype=torch.float32)
    return Site(panels, bias=bias)(x, out=out)


def delta(y: Tensor, x: Tensor, tables: SiteTables, plan: StepPlan) -> Tensor:
    """y += y∘Σ γ·gain + Σ γ·s·((x·Aᵀ)·B + biasB) in place: y fp32 [T, n], x bf16 or fp32 [T, k].
    Raises: TypeError, ValueError."""
    checks.rows("y", y, (torch.float32,), shape=(None, None))
    checks.rows("x", x, checks.FLOATS, shape=(y.shape[0], None))
    return Site(None, tables, shape=(y.shape[1], x.shape[1]))(x, plan, out=y)
