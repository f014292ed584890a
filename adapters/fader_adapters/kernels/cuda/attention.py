"""Paged attention over one layer's caches on a CUDA device. Knows blocks, positions and heads; no
models, no scheduling.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fader_adapters.kernels.cuda import attention_configs as configs
from fader_adapters.kernels.cuda.attention_kernels import (
    decode_kernel,
    reduce_kernel,
    write_kernel,
)
from fader_adapters.kernels.cuda.attention_prefill import prefill_kernel
from fader_adapters.kernels.cuda.attention_step import AttentionStep
from fader_adapters.kernels.cuda.machines import Arch, Capability, arch_of, roomy

_LOG2E = math.log2(math.e)


class Scratch:
    """Partial sums of the decode splits, one allocation shared by all layers of a stream.

    Grows on demand outside of graph capture, so reserve the largest use before the first capture:
    a captured graph keeps the address.
    """

    def __init__(self, device: torch.device) -> None:
        self._floats = torch.empty(0, dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        return self._floats.nbytes

    def reserve(self, *, rows: int, heads: int, dim: int, splits: int) -> None:
        """Room for the partial sums of `rows` rows. Raises: RuntimeError while capturing."""
        need = rows * heads * splits * (dim + 2)
        if need <= self._floats.numel():
            return
        if self._floats.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"expected attention scratch of {need} floats before the capture, "
                f"got {self._floats.numel()}; reserve it first"
            )
        self._floats = self._floats.new_empty(need)

    def planes(self, *, rows: int, heads: int, dim: int, splits: int) -> tuple[Tensor, Tensor]:
        """Flat fp32 (values, statistics) for decode_kernel; their contents are undefined."""
        self.reserve(rows=rows, heads=heads, dim=dim, splits=splits)
        count = rows * heads * splits
        return self._floats[: count * dim], self._floats[count * dim : count * (dim + 2)]


class PagedAttention:
    """Causal attention of packed rows against a paged cache, decode and prefill chunks alike.

    k_cache, v_cache: [blocks, block_size, kv_heads, dim] contiguous, both of one floating dtype;
    dim 16..256, a multiple of 16; at most 64 query heads a KV head.
    window: a query sees its last `window` positions (0 = all).
    softcap: cap·tanh(score/cap) (0 = none).
    sinks: [heads], one more score of each query head, neither capped nor behind a window, that
    takes its part of the softmax and has no value; read here, once (None = no such score).
    arch: row of the configuration table, 80 or 90; None: the device's own.
    A row's bits depend on its own queries, keys and context: rows of one token always run in the
    decode kernel and all others in the prefill kernel, whatever else the step holds.
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
        scratch: Scratch | None = None,
        arch: Arch | None = None,
    ) -> None:
        """Raises: ValueError."""
        _check_cache(k_cache, v_cache)
        _, page, kv_heads, dim = k_cache.shape
        if heads < 1 or heads % kv_heads or heads // kv_heads > configs.MAX_GROUP:
            raise ValueError(
                f"heads must be a multiple of the {kv_heads} KV heads, at most "
                f"{configs.MAX_GROUP} for each, got {heads}"
            )
        if window < 0 or softcap < 0:
            raise ValueError(f"window and softcap must not be negative, got {window} and {softcap}")
        if sinks is not None and sinks.shape != (heads,):
            raise ValueError(f"sinks must be [{heads}], one of each head, got {list(sinks.shape)}")
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self._k, self._v = k_cache, v_cache
        self._window = window or configs.NO_WINDOW
        # the kernels' softmax counts in powers of two
        scaled = scale / softcap if softcap else scale * _LOG2E
        self._scores = (self._window, scaled, softcap * _LOG2E)
        self._sinks = None if sinks is None else sinks.float() * _LOG2E
        self._scratch = scratch or Scratch(k_cache.device)
        capability = _capability(k_cache.device)
        arch = arch or arch_of(capability)
        shape, capped = (kv_heads, heads // kv_heads, dim), bool(softcap)
        self._decode_tiles = configs.decode_config(arch, dim)
        self._decode_constants = configs.decode_constants(arch, *shape, page, capped)
        self._prefill_tiles = configs.prefill_config(arch, dim, capped, roomy=roomy(capability))
        self._prefill_constants = configs.prefill_constants(
            self._prefill_tiles, *shape, page, capped
        )
        self._reduce_constants = configs.reduce_constants(*shape)

    def splits(self, context: int) -> int:
        """Splits of a decode row with up to `context` keys, at most."""
        seen = min(context, self._window)
        return configs.most_splits(seen, dim=self.dim, kv_heads=self.kv_heads)

    def reserve(self, *, rows: int, context: int) -> None:
        """Scratch for up to `rows` rows of up to `context` keys, once, before a capture."""
        splits = self.splits(context)
        self._scratch.reserve(rows=rows, heads=self.heads, dim=self.dim, splits=splits)

    def __call__(self, q: Tensor, step: AttentionStep, *, out: Tensor | None = None) -> Tensor:
        """out [T, heads, dim] in q's dtype; tokens outside of every row are left as they are.

        q [T, heads, dim] of the caches' dtype, T at most step.tokens, dim adjacent, else strided.
        Query i of a row with n stands at context - n + i. Blocks past a row's context are never
        read. Allocates `out` if not given, and scratch beyond what was reserved.
        Raises: ValueError.
        """
        if q.shape[1:] != (self.heads, self.dim) or q.dtype != self._k.dtype or q.stride(2) != 1:
            raise ValueError(
                f"q must be [T, {self.heads}, {self.dim}] in {self._k.dtype} with adjacent values, "
                f"got {list(q.shape)} in {q.dtype} with strides {q.stride()}"
            )
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        elif out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
            raise ValueError(f"out must be contiguous {list(q.shape)}, got {list(out.shape)}")
        if step.decodes and step.rows:
            self._decode(q, step, out)
        if step.prefills and step.rows:
            self._prefill(q, step, out)
        return out

    def _decode(self, q: Tensor, step: AttentionStep, out: Tensor) -> None:
        splits = self.splits(step.context)
        planes, stats = self._scratch.planes(
            rows=step.rows, heads=self.heads, dim=self.dim, splits=splits
        )
        rows, table = (step.cu_tokens, step.contexts), step.block_tables
        strides = (table.stride(0), q.stride(0), q.stride(1))
        tiles = self._decode_tiles
        share = -(-configs.DECODE_PROGRAMS // (step.rows * self.kv_heads))
        _launch(
            decode_kernel,
            (step.rows, self.kv_heads, min(splits, share)),
            (
                q,
                self._k,
                self._v,
                self._sinks,
                out,
                planes,
                stats,
                *rows,
                table,
                *strides,
                *self._scores,
                splits,
            ),
            self._decode_constants,
            tiles.warps,
            tiles.stages,
        )
        if splits > 1:
            _launch(
                reduce_kernel,
                (step.rows, self.heads),
                (out, planes, stats, self._sinks, *rows, self._window, splits),
                self._reduce_constants,
                configs.REDUCE_WARPS,
                1,
            )

    def _prefill(self, q: Tensor, step: AttentionStep, out: Tensor) -> None:
        tiles = self._prefill_tiles
        queries = tiles.block_m // (self.heads // self.kv_heads)
        rows, table = (step.cu_tokens, step.contexts), step.block_tables
        strides = (table.stride(0), step.rows, q.stride(0), q.stride(1))
        _launch(
            prefill_kernel,
            (step.tokens // queries + step.rows, self.kv_heads),
            (q, self._k, self._v, self._sinks, out, *rows, table, *strides, *self._scores),
            self._prefill_constants,
            tiles.warps,
            tiles.stages,
        )


def write_cache(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k and v [T, kv_heads, dim] at places slots [T] (int64 or int32); < 0 skips a token.

    Tokens and heads may be strided, a head's values are adjacent. Caches as in PagedAttention.
    A slot past the caches' end is not noticed. Allocates nothing.
    Raises: ValueError.
    """
    _check_cache(k_cache, v_cache)
    shape = (slots.shape[0], *k_cache.shape[2:])
    for name, given in (("k", k), ("v", v)):
        if given.shape != shape or given.dtype != k_cache.dtype or given.stride(2) != 1:
            raise ValueError(
                f"{name} must be {list(shape)} in {k_cache.dtype} with adjacent values, "
                f"got {list(given.shape)} in {given.dtype} with strides {given.stride()}"
            )
    if slots.dtype not in (torch.int32, torch.int64) or not slots.is_contiguous():
        raise ValueError(f"slots must be contiguous integers, got {slots.dtype}")
    tokens, kv_heads, dim = shape
    if not tokens:
        return
    _launch(
        write_kernel,
        (tokens, -(-kv_heads * dim // configs.WRITE_BLOCK)),
        (k, v, slots, k_cache, v_cache, *k.stride()[:2], *v.stride()[:2]),
        {"KV_HEADS": kv_heads, "DIM": dim, "BLOCK": configs.WRITE_BLOCK},
        configs.WRITE_WARPS,
        1,
    )


def _launch(
    kernel: Any,  # noqa: ANN401  # a Triton kernel: typed differently under the interpreter
    grid: tuple[int, ...],
    arguments: tuple[Tensor | int | float | None, ...],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> None:
    kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def _capability(device: torch.device) -> Capability:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    if k_cache.ndim != 4 or not k_cache.numel() or k_cache.shape != v_cache.shape:
        raise ValueError(
            "k_cache and v_cache must be [blocks, block_size, kv_heads, dim], "
            f"got {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    dim = k_cache.shape[3]
    if dim % 16 or not 16 <= dim <= configs.MAX_DIM:
        raise ValueError(f"k_cache must have a head size of 16 to 256 in steps of 16, got {dim}")
    if k_cache.dtype != v_cache.dtype or not k_cache.dtype.is_floating_point:
        raise ValueError(
            f"the caches must have one floating dtype, got {k_cache.dtype} and {v_cache.dtype}"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache must be contiguous")
