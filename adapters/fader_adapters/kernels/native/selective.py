"""Selective scans: a state for each channel of a sequence, each row from slot to slot. Knows slots
and rows; no models, no requests."""

import ctypes

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, SelectiveStruct, check, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.states import LANE, MOST_KEYS, Slotted, StateRows
from fader_adapters.kernels.native.threads import threads


class SelectiveScan(Slotted):
    """h ← e^(step·decay)·h + step·x·B, y = Σ h·C for each channel, whose step a token decides."""

    def __init__(
        self,
        decay: Tensor,
        bias: Tensor | None,
        skip: Tensor | None,
        *,
        slots: int,
        softplus: bool,
        tape: Tape | None = None,
    ) -> None:
        """decay [channels, keys], bias and skip [channels] are copied; states are fp32. softplus:
        steps go through it. Raises: TypeError, ValueError."""
        checks.tensor("decay", decay, checks.FLOATS, shape=(None, None))
        self.channels, self.keys = decay.shape
        if not self.fits(self.channels, self.keys):
            raise ValueError(
                f"channels must be a multiple of {LANE}, keys at most {MOST_KEYS}, "
                f"got {list(decay.shape)}"
            )
        groups = self.channels // LANE
        self.states = torch.empty((checks.positive("slots", slots), groups, self.keys, LANE))
        own = decay.float().view(groups, LANE, self.keys).transpose(1, 2).contiguous()
        vectors = [
            None
            if vector is None
            else checks.tensor(name, vector, checks.FLOATS, shape=(self.channels,)).float()
            for name, vector in (("bias", bias), ("skip", skip))
        ]
        self._keep = own, vectors
        self._struct = SelectiveStruct(
            self.states.data_ptr(),
            own.data_ptr(),
            *(None if vector is None else vector.data_ptr() for vector in vectors),
            slots=slots, channels=self.channels, keys=self.keys, softplus=softplus,
        )  # fmt: skip
        self._tape = tape

    @staticmethod
    def fits(channels: int, keys: int) -> bool:
        """Whether the kernel takes such a decay."""
        return channels % LANE == 0 and 0 < keys <= MOST_KEYS

    def __call__(
        self, x: Tensor, steps: Tensor, rows: StateRows, *, gate: Tensor | None = None
    ) -> Tensor:
        """[T, channels] of x's dtype, rounded once: with step = dt + bias, softplus of that where
        it was asked for, both rounded, and h the channel's state [keys] in fp32,
        h ← e^(step·decay)·h + step·x·B; y = (h·C + skip·x), times SiLU(gate) if there is one.

        x, gate  [T, channels] of bf16 or fp32, both of one dtype, rows may be strided
        steps    [T, channels + 2·keys] of x's dtype: dt, then B, then C of a token
        Raises: TypeError, ValueError (shapes, a slot out of range).
        """
        checks.inputs("x", x, checks.FLOATS, self.channels)
        tokens = x.shape[0]
        checks.tensor("steps", steps, (x.dtype,), shape=(tokens, self.channels + 2 * self.keys))
        op = Op(kind=Kind.SELECTIVE, dtype=CODES[x.dtype], what=ctypes.addressof(self._struct))
        op.x_stride, op.size[0] = checks.row_stride(x), tokens
        if gate is not None:
            checks.rows("gate", gate, (x.dtype,), shape=(tokens, self.channels))
            op.y_stride = checks.row_stride(gate)
        out = torch.empty(x.shape, dtype=x.dtype)
        given = rows.struct()
        code = library().fader_selective(
            op.what,
            tokens,
            rows.start.shape[0] - 1,
            ctypes.addressof(given),
            x.data_ptr(),
            op.dtype,
            op.x_stride,
            steps.data_ptr(),
            None if gate is None else gate.data_ptr(),
            op.y_stride,
            out.data_ptr(),
            threads(),
        )
        check(code, "selective scan")
        if self._tape is not None:
            self._tape.note(op, x, y=steps, z=gate, out=out, keep=self)
        return out
