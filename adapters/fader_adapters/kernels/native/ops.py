"""One native call as plain data: what a recorded step is made of. Knows fields, not addresses."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor

_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class Kind(IntEnum):
    """FADER_OP_* of csrc/fader.h."""

    SITE = 0
    NORM = 1
    WRITE_KV = 2
    ATTEND = 3
    GATHER = 4
    MAP = 5
    LOOKUP = 6
    EXPERTS = 7
    CONV = 8
    SCAN = 9
    GATED_NORM = 10
    SELECTIVE = 11


class Map(IntEnum):
    """FADER_MAP_* of csrc/fader.h."""

    COPY = 0
    NEG = 1
    ADD = 2
    SUB = 3
    MUL = 4
    SILU = 5
    GELU_TANH = 6
    SIGMOID = 7
    SOFTPLUS = 8
    EXP = 9
    LOG = 10
    GELU = 11
    TANH = 12


class Op(ctypes.Structure):
    """fader_op_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _I) for name in ("kind", "map", "dtype", "out_dtype")],
        *[(name, _P) for name in ("what", "x", "y", "z", "out", "bias")],
        *[(name, _L) for name in ("n", "k", "x_stride", "y_stride", "out_stride")],
        *[(name, _L * 4) for name in ("size", "x_step", "y_step", "out_step")],
        ("scalar", _F),
        ("pad", _I),
    ]


class Step(ctypes.Structure):
    """fader_step_t of csrc/fader.h, field for field."""

    _fields_ = [
        *[(name, _L) for name in ("tokens", "rows")],
        *[(name, _P) for name in ("plan", "q_start", "context", "block_tables")],
        ("max_blocks", _L),
        *[(name, _P) for name in ("slots", "state_from", "state_to")],
    ]


@dataclass(frozen=True, slots=True)
class Call:
    """One native call with the tensors it read and wrote.

    op holds everything but the addresses of x, y, z and out; keep holds what its other pointers
    need.
    """

    op: Op
    x: Tensor
    y: Tensor | None
    out: Tensor | None
    keep: object
    z: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self.x, self.y, self.z, self.out) if t is not None]


Whole = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Of a function, its arguments and keywords: what it returns."""


class Tape:
    """Where native calls tell what they did, while somebody records a step."""

    def __init__(self) -> None:
        self.listener: Callable[[Call], None] | None = None
        """Set while somebody records."""
        self.whole: Whole | None = None
        """Set while somebody records: runs a function and tells it as one call; what it returns."""

    @property
    def recording(self) -> bool:
        """Whether somebody records what runs now."""
        return self.listener is not None

    def run(self, function: Callable[..., None], *args: Tensor) -> None:
        """Run what changes its first argument and may read values: a record has it as one call,
        always run."""
        if self.whole is None:
            function(*args)
        else:
            self.whole(function, args, {})

    def note(
        self,
        op: Op,
        x: Tensor,
        *,
        y: Tensor | None = None,
        z: Tensor | None = None,
        out: Tensor | None = None,
        keep: object,
    ) -> None:
        """Remember a call, if anybody records."""
        if self.listener is not None:
            self.listener(Call(op, x, y, out, keep, z))
