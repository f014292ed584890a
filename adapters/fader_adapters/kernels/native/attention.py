"""Paged attention over one layer's caches. Knows blocks, positions and heads; no models, no
scheduling."""

import ctypes

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, AttentionStruct, check, library
from fader_adapters.kernels.native.ops import Kind, Op, Tape
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.native.workspace import Workspace

_INTS = (torch.int32,)
LARGEST = 512
"""Of a head's sizes."""


def fits(size: int) -> bool:
    """Whether heads of keys or values may be of this size."""
    return size % 16 == 0 and 16 <= size <= LARGEST


class PagedAttention:
    """Causal attention of packed rows against a paged cache, decode and prefill chunks alike.

    k_cache, v_cache: [blocks, block_size, kv_heads, dim], both bf16 or both fp32; dims 16..512,
    multiples of 16, those of keys and values apart.
    window: a query sees its last `window` positions (0 = all).
    softcap: cap·tanh(score/cap) (0 = none).
    sinks: [heads], one more score of each query head, neither capped nor behind a window, that
    takes its part of the softmax and has no value; read here, once (None = no such score).
    """

    def __init__(
        self,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        workspace: Workspace | None = None,
        tape: Tape | None = None,
    ) -> None:
        """Raises: TypeError, ValueError."""
        checks.tensor("k_cache", k_cache, checks.FLOATS, shape=(None,) * 4)
        checks.tensor("v_cache", v_cache, (k_cache.dtype,), shape=(*k_cache.shape[:3], None))
        blocks, block_size, kv_heads, dim = k_cache.shape
        value_dim = v_cache.shape[3]
        for name, size in (("k_cache", dim), ("v_cache", value_dim)):
            if not fits(size):
                raise ValueError(
                    f"{name} must have a head size of 16 to {LARGEST} in steps of 16, got {size}"
                )
        if not blocks or not block_size or not kv_heads:
            raise ValueError(f"k_cache must not be empty, got {list(k_cache.shape)}")
        if checks.positive("heads", heads) % kv_heads:
            raise ValueError(f"heads must be a multiple of the {kv_heads} KV heads, got {heads}")
        if window < 0 or softcap < 0:
            raise ValueError(f"window and softcap must not be negative, got {window} and {softcap}")
        self._sinks = None
        if sinks is not None:
            checks.tensor("sinks", sinks, checks.FLOATS, shape=(heads,))
            # no torch operator: somebody may be recording those
            self._sinks = (ctypes.c_float * heads)(*sinks.tolist())
        self.heads, self.kv_heads, self.dtype = heads, kv_heads, k_cache.dtype
        self.dim, self.value_dim = dim, value_dim
        self._struct = AttentionStruct(
            k_cache=k_cache.data_ptr(),
            v_cache=v_cache.data_ptr(),
            sinks=None if self._sinks is None else ctypes.addressof(self._sinks),
            blocks=blocks,
            block_size=block_size,
            kv_heads=kv_heads,
            heads=heads,
            dim=dim,
            value_dim=value_dim,
            window=window,
            scale=scale,
            softcap=softcap,
            dtype=CODES[k_cache.dtype],
        )
        self._ref = ctypes.addressof(self._struct)
        self._keep = (k_cache, v_cache)
        self._workspace = workspace or Workspace()
        self._tape = tape
        self._function, self._write = library().fader_attention, library().fader_write_kv

    def __call__(
        self,
        q: Tensor,
        *,
        q_start: Tensor,
        context: Tensor,
        block_tables: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """out [T, heads, the values' dim] in q's dtype.

        q [T, heads, dim] contiguous, of the caches' dtype; q_start int32 [R+1]: rows' first
        queries, ending at T;
        context int32 [R]: positions of a row including its queries'; block_tables int32 [R,
        columns].
        Query i of a row with n stands at context - n + i. Positions past a row's context are
        never read.
        Raises: TypeError, ValueError (shapes, a block number out of range, context shorter than
        the queries).
        """
        shape = (None, self.heads, self.dim)
        checks.tensor("q", q, (self.dtype,), shape=shape)
        checks.tensor("q_start", q_start, _INTS, shape=(None,))
        rows = q_start.shape[0] - 1
        checks.tensor("context", context, _INTS, shape=(rows,))
        checks.tensor("block_tables", block_tables, _INTS, shape=(rows, None))
        given = (q.shape[0], self.heads, self.value_dim)
        out = (
            q.new_empty(given)
            if out is None
            else checks.tensor("out", out, (self.dtype,), shape=given)
        )
        self._struct.max_blocks = max(block_tables.shape[1], 1) if rows > 0 else 1
        self._workspace.call(
            self._function,
            "paged_attention",
            self._ref,
            q.shape[0],
            rows,
            q.data_ptr(),
            q_start.data_ptr(),
            context.data_ptr(),
            block_tables.data_ptr(),
            out.data_ptr(),
        )
        if self._tape is not None:
            self._tape.note(Op(kind=Kind.ATTEND, what=self._ref), q, out=out, keep=self)
        return out

    def write(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Store k, v [T, kv_heads, their dim] (tokens may be strided) at token slots int64 [T]; -1
        skips one.

        Raises: TypeError, ValueError (shapes, a slot out of range).
        """
        for name, value, size in (("k", k, self.dim), ("v", v, self.value_dim)):
            checks.rows(name, value, (self.dtype,), shape=(None, self.kv_heads, size))
            if value.shape[0] and self.kv_heads > 1 and value.stride(1) != size:
                raise ValueError(
                    f"{name} must have its heads side by side, got strides {value.stride()}"
                )
        if len(k) != len(v):
            raise ValueError(f"v must have the {len(k)} tokens of k, got {len(v)}")
        checks.tensor("slots", slots, (torch.int64,), shape=(k.shape[0],))
        code = self._write(
            self._ref,
            k.shape[0],
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            slots.data_ptr(),
            threads(),
        )
        check(code, "write")
        if self._tape is not None:
            op = Op(kind=Kind.WRITE_KV, what=self._ref)
            op.x_stride, op.y_stride = k.stride(0), v.stride(0)
            self._tape.note(op, k, y=v, keep=self)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_start: Tensor,
    context: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """One call of `PagedAttention` for tests and notebooks; heads are q's."""
    checks.tensor("q", q, checks.FLOATS, shape=(None, None, None))
    layer = PagedAttention(
        k_cache,
        v_cache,
        heads=q.shape[1],
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    return layer(q, q_start=q_start, context=context, block_tables=block_tables)
