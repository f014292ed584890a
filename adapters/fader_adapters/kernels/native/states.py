"""States that sequences leave behind beside keys and values: convolutions over tokens and gated
recurrences, each row from slot to slot. Knows slots and rows; no models, no requests."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import (
    CODES,
    ConvStruct,
    RowsStruct,
    ScanStruct,
    SelectiveStruct,
    check,
    library,
)
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.threads import threads

LANE = 16
MOST_KEYS = 256


@dataclass(frozen=True, eq=False, slots=True)
class StateRows:
    """Rows of a step and the slots of their states.

    start      int32 [R+1]: rows' first tokens, ending at T
    came_from  int32 [R]: the slot each goes on from; -1: a sequence begins
    to         int32 [R]: the slot each leaves its state in, another one and nobody else's
    """

    start: Tensor
    came_from: Tensor
    to: Tensor

    def struct(self) -> RowsStruct:
        """Their addresses, checked. Raises: TypeError, ValueError."""
        ints = (torch.int32,)
        checks.tensor("start", self.start, ints, shape=(None,))
        rows = (self.start.shape[0] - 1,)
        checks.tensor("came_from", self.came_from, ints, shape=rows)
        checks.tensor("to", self.to, ints, shape=rows)
        return RowsStruct(self.start.data_ptr(), self.came_from.data_ptr(), self.to.data_ptr())


class Slotted:
    """What keeps states [slots, …], and is told to the library with their place and number."""

    states: Tensor
    _struct: ConvStruct | ScanStruct | SelectiveStruct

    def grow(self, slots: int) -> None:
        """Have so many slots; those there were keep what they hold, recorded calls stay good."""
        grown = self.states.new_empty(slots, *self.states.shape[1:])
        grown[: len(self.states)] = self.states
        self.states = grown
        self._struct.states, self._struct.slots = grown.data_ptr(), slots


class Convolution(Slotted):
    """A causal depthwise convolution over a sequence's tokens."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        slots: int,
        silu: bool,
        tape: Tape | None = None,
    ) -> None:
        """weight [channels, taps] and bias [channels] are copied; states are of the weight's dtype.
        Raises: TypeError, ValueError."""
        checks.tensor("weight", weight, checks.FLOATS, shape=(None, None))
        self.channels, self.taps = weight.shape
        if not self.fits(self.channels, self.taps):
            raise ValueError(f"channels must be a multiple of {LANE}, got {list(weight.shape)}")
        self.states = torch.empty(
            (checks.positive("slots", slots), self.taps - 1, self.channels), dtype=weight.dtype
        )
        own = weight.t().float().contiguous()
        other = None
        if bias is not None:
            other = checks.tensor("bias", bias, checks.FLOATS, shape=(self.channels,)).float()
        self._keep = own, other
        self._struct = ConvStruct(
            states=self.states.data_ptr(), weight=own.data_ptr(), slots=slots,
            bias=None if other is None else other.data_ptr(),
            channels=self.channels, taps=self.taps, dtype=CODES[weight.dtype], silu=silu,
        )  # fmt: skip
        self._tape = tape

    @staticmethod
    def fits(channels: int, taps: int) -> bool:
        """Whether the kernel takes such a weight."""
        return channels % LANE == 0 and taps > 1

    def __call__(self, x: Tensor, rows: StateRows) -> Tensor:
        """x [T, channels] of the weight's dtype, rows may be strided → [T, channels]: the sum over
        the last tokens of a sequence in fp32, rounded, then SiLU of that where it was asked for.

        Raises: TypeError, ValueError (shapes, a slot out of range).
        """
        checks.inputs("x", x, (self.states.dtype,), self.channels)
        out = torch.empty(x.shape, dtype=x.dtype)
        stride, what, given = checks.row_stride(x), ctypes.addressof(self._struct), rows.struct()
        code = library().fader_conv(
            what,
            x.shape[0],
            rows.start.shape[0] - 1,
            ctypes.addressof(given),
            x.data_ptr(),
            stride,
            out.data_ptr(),
            threads(),
        )
        check(code, "convolution")
        if self._tape is not None:
            op = Op(kind=Kind.CONV, what=what, x_stride=stride)
            op.size[0] = x.shape[0]
            self._tape.note(op, x, out=out, keep=self)
        return out


@dataclass(frozen=True, slots=True)
class ScanForm:
    """What a recurrence looks like: q, k [groups, keys] and v [heads, values] of a token."""

    groups: int
    heads: int
    keys: int
    values: int
    delta: bool
    """Write only what v differs by from what k finds."""
    unit: bool
    """q and k are brought to unit length, q also divided by √keys."""
    by_key: bool = False
    """The decay has a value for each key."""

    @property
    def decays(self) -> int:
        """Of a token."""
        return self.heads * (self.keys if self.by_key else 1)

    @property
    def fits(self) -> bool:
        """Whether the kernel takes it."""
        return (
            self.heads % self.groups == 0
            and self.keys % LANE == self.values % LANE == 0
            and 0 < self.keys <= MOST_KEYS
        )


class Scan(Slotted):
    """A gated recurrence over a sequence's tokens: S ← e^g·S + k·uᵀ, y = Sᵀ·q."""

    def __init__(
        self,
        form: ScanForm,
        *,
        slots: int,
        skip: Tensor | None = None,
        tape: Tape | None = None,
    ) -> None:
        """skip [heads]: y also has skip·v; copied. Raises: TypeError, ValueError."""
        if not form.fits:
            raise ValueError(
                f"keys and values must be multiples of {LANE}, keys at most {MOST_KEYS}, and "
                f"groups must divide the heads, got {form}"
            )
        self.form = form
        self.states = torch.empty(
            (checks.positive("slots", slots), form.heads, form.keys * form.values)
        )
        own = None
        if skip is not None:
            own = checks.tensor("skip", skip, checks.FLOATS, shape=(form.heads,)).float()
        self._keep = own
        self._struct = ScanStruct(
            states=self.states.data_ptr(), skip=None if own is None else own.data_ptr(),
            slots=slots, groups=form.groups, heads=form.heads, keys=form.keys, values=form.values,
            delta=form.delta, unit=form.unit, by_key=form.by_key,
        )  # fmt: skip
        self._tape = tape
        self._places: tuple[int, int, int] | None = None

    def __call__(
        self,
        x: Tensor,
        gates: Tensor,
        rows: StateRows,
        *,
        places: tuple[int, int, int],
        dtype: torch.dtype,
    ) -> Tensor:
        """[T, heads, values] of `dtype`, x's or fp32: with d = e^g and S the sequence's state,
        u = β·(v − (d·S)ᵀ·k), or β·v without `delta`; S ← d·S + k·uᵀ; y = Sᵀ·q (+ skip·v); in fp32.

        x       [T, width] of bf16 or fp32, rows may be strided: q, k and v begin at these `places`
                of a row, the same in every call
        gates   fp32 [T, decays + heads]: g of every head, then β of every head
        Raises: TypeError, ValueError (shapes, a slot out of range).
        """
        form = self.form
        checks.rows("x", x, checks.FLOATS, shape=(None, None))
        checks.tensor(
            "gates", gates, (torch.float32,), shape=(x.shape[0], form.decays + form.heads)
        )
        widths = (form.groups * form.keys,) * 2 + (form.heads * form.values,)
        if min(places) < 0 or max(map(sum, zip(places, widths, strict=True))) > x.shape[1]:
            raise ValueError(f"q, k and v must lie within {x.shape[1]} elements, got {places}")
        if self._places is None:
            self._places = places
            self._struct.q, self._struct.k, self._struct.v = places
        elif self._places != places:
            raise ValueError(f"places must be {self._places} in every call, got {places}")
        out = torch.empty((x.shape[0], form.heads, form.values), dtype=dtype)
        stride, what, given = checks.row_stride(x), ctypes.addressof(self._struct), rows.struct()
        code = library().fader_scan(
            what,
            x.shape[0],
            rows.start.shape[0] - 1,
            ctypes.addressof(given),
            x.data_ptr(),
            CODES[x.dtype],
            stride,
            gates.data_ptr(),
            out.data_ptr(),
            CODES[dtype],
            threads(),
        )
        check(code, "scan")
        if self._tape is not None:
            op = Op(kind=Kind.SCAN, dtype=CODES[x.dtype], out_dtype=CODES[dtype], what=what)
            op.x_stride = stride
            op.size[0] = x.shape[0]
            self._tape.note(op, x, y=gates, out=out, keep=self)
        return out
