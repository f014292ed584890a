"""Draws from whole vocabularies in Triton: where a nucleus ends, and which token a race wins.

A row's bits do not depend on other rows: sums are integers, the rest is elementwise and a maximum.
"""
# ruff: noqa: ANN001, ANN201

from typing import Any

import torch
import triton
import triton.language as tl

from fader_adapters.kernels.cuda import draws_configs as configs


@triton.jit(do_not_specialize=["level", "shift"])
def narrow_kernel(
    mass, need, starts, sums, vocab, level, shift, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """One digit, of 16, of each row's edge: the largest e with Σ mass[mass >= e] >= need.

    `starts` has the digits above, those of the level before and what it summed; a program adds up
    its part of the row over each of the 16 edges that go on from there. mass [rows, vocab], need
    [rows], starts [levels, rows], sums [levels, rows, PARTS, 16], all int64; grid (rows, PARTS)
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = level * tl.num_programs(0) + row
    digits = tl.arange(0, 16).to(tl.int64)
    start = tl.full((), 0, tl.int64)
    if level > 0:
        before = here - tl.num_programs(0)
        parts = tl.arange(0, PARTS)
        told = tl.load(sums + (before * PARTS + parts[:, None]) * 16 + digits[None, :])
        enough = (tl.sum(told, 0) >= tl.load(need + row)) & (digits > 0)
        start = tl.load(starts + before) + (tl.sum(enough.to(tl.int64), 0) << (shift + 4))
    if part == 0:
        tl.store(starts + here, start)
    edges = start + (digits << shift)
    chunk = tl.cdiv(vocab, PARTS)
    first = part * chunk
    last = tl.minimum(first + chunk, vocab)
    total = tl.zeros((BLOCK, 16), tl.int64)
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        some = tl.load(mass + row * vocab + at, mask=at < last, other=0)[:, None]
        total += tl.where(some >= edges[None, :], some, 0)
    tl.store(sums + (here * PARTS + part) * 16 + digits, tl.sum(total, 0))


@triton.jit
def race_kernel(
    x,
    heat,
    keys,
    best,
    place,
    vocab,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest x / heat + Gumbel noise of a part of a row, and its lowest place.

    The noise is -log(-log((h + 1/2) / 2^52)), h the upper 52 bits of output `token` of SplitMix64
    from the row's key. x [rows, vocab] fp32, heat [rows] fp32, keys [rows] int64, best [rows,
    PARTS] fp64, place [rows, PARTS] int64; grid (rows, PARTS)
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.load(keys + row)
    warmth = tl.load(heat + row).to(tl.float64)
    chunk = tl.cdiv(vocab, PARTS)
    first = part * chunk
    last = tl.minimum(first + chunk, vocab)
    most = tl.full((BLOCK,), -float("inf"), tl.float64)
    where = tl.full((BLOCK,), 0, tl.int64) + first
    for begin in range(first, last, BLOCK):
        at = begin + tl.arange(0, BLOCK).to(tl.int64)
        some = tl.load(x + row * vocab + at, mask=at < last, other=-float("inf"))
        z = (at + 1) * STEP + key
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * FIRST
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * SECOND
        z = z ^ ((z >> 31) & 0x1FFFFFFFF)
        u = (((z >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) + 0.5) * 2.220446049250313e-16
        sum_ = some.to(tl.float64) / warmth - tl.log(-tl.log(u))
        better = sum_ > most
        most = tl.where(better, sum_, most)
        where = tl.where(better, at, where)
    top = tl.max(most, 0)
    tl.store(best + row * PARTS + part, top)
    tl.store(place + row * PARTS + part, tl.min(tl.where(most == top, where, vocab - 1), 0))


_narrow: Any = narrow_kernel
_race: Any = race_kernel


def nucleus_edge(mass: torch.Tensor, need: torch.Tensor) -> torch.Tensor:
    """The largest e of each row for which what weighs at least e weighs `need` together.

    mass: [R, V] int64 in [0, 2^44], adjacent. need: [R] int64, from 1 to the row's sum.
    Returns [R] int64, a mass of the row.
    """
    rows, vocab = mass.shape
    assert mass.is_contiguous()
    shifts = range(configs.TOP_SHIFT, -1, -4)
    starts = mass.new_empty(len(shifts), rows)
    sums = mass.new_empty(len(shifts), rows, configs.PARTS, 16)
    for level, shift in enumerate(shifts):
        _narrow[(rows, configs.PARTS)](
            mass, need, starts, sums, vocab, level, shift,
            **configs.NARROW, num_warps=configs.WARPS, num_stages=1,
        )  # fmt: skip
    enough = sums[-1].sum(1)[:, 1:] >= need[:, None]
    return starts[-1] + enough.sum(-1)


def winners(x: torch.Tensor, heat: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The token of each row at which x / heat + noise is the largest (server's gumbel.py).

    x: [R, V] float32, adjacent, -inf for tokens left out. heat: [R] float32. keys: [R] int64.
    Returns [R] int64, inside the vocabulary whatever the row holds.
    """
    rows, vocab = x.shape
    assert x.is_contiguous()
    best = torch.empty(rows, configs.PARTS, dtype=torch.float64, device=x.device)
    place = torch.empty(rows, configs.PARTS, dtype=torch.int64, device=x.device)
    _race[(rows, configs.PARTS)](
        x, heat, keys, best, place, vocab,
        **configs.RACE, num_warps=configs.WARPS, num_stages=1,
    )  # fmt: skip
    return place.gather(1, best.argmax(1, keepdim=True))[:, 0]
