"""Which pairs a program of the experts' deltas multiplies together, and by which entries: those of
one expert that share a list. Knows no weights."""
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from fader_adapters.kernels.cuda import tiles

LANES = tl.constexpr(tiles.LANES)
"""Pairs of a program, and coefficients of an entry; a tile's row i has lane i mod 16 of those."""

SCAN = tl.constexpr(32)
"""Entries that are looked at in one load."""


@triton.jit
def worn_by(
    pair: tl.tensor,
    inside: tl.tensor,
    lists: tl.tuple,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:  # noqa: ANN401
    """Of one pair or several: its row of z, in rows of 16, at the first entry of its list; its lane
    of the coefficients; begin and end of the list, begin −1 where the token has none or an empty
    one; its expert. lists: order, expert, place, first, last, cell, chosen, places, cells."""
    order, expert, place, first, last, cell, chosen, places, cells = lists
    choice = tl.load(order + pair, mask=inside, other=0).to(tl.int32)
    token = choice // chosen
    at = tl.load(place + token, mask=inside & (token < places), other=0) - 1
    worn = at >= 0
    at = tl.where(worn, at, 0)
    tile = at // TILE
    row = at - tile * TILE
    here = tl.load(cell + tile, mask=worn, other=0)
    to = ((choice - token * chosen).to(tl.int64) * SPLITS * cells + here) * TILE + row
    begin = tl.load(first + tile, mask=worn, other=0)
    end = tl.load(last + tile, mask=worn, other=0)
    begin = tl.where(begin < end, begin, -1)
    which = tl.load(expert + pair, mask=worn, other=0)
    return to, row % LANES, begin, end, which


@triton.jit
def led_by(
    leader: tl.tensor,
    inside: tl.tensor,
    start_before: tl.tensor,
    own_before: tl.tensor,
    lists: tl.tuple,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:  # noqa: ANN401
    """Of the group that a pair leads: lane, begin and end of the list, begin −1 where there is none
    or where the pair before it led the same group; the expert; begin and expert for the next pair.

    Read anew, not found among the lanes: the compiler sees that all threads take one way.
    """
    _to, row, start, stop, own = worn_by(leader, inside, lists, SPLITS, TILE)
    if TILE > LANES:
        if (start == start_before) & (own == own_before):
            start = -1
        else:
            start_before, own_before = start, own
    return row, start, stop, own, start_before, own_before


@triton.jit
def led(
    pair: tl.tensor,
    inside: tl.tensor,
    row: tl.tensor,
    start: tl.tensor,
    own: tl.tensor,
    lists: tl.tuple,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:  # noqa: ANN401
    """Of a program's pairs: their rows of z, as `worn_by` tells; which are of the leader's group,
    of one expert and one list. Rows of one token share lists, with coefficients of their own: there
    the lane is the group's, too."""
    to, lane, begin, _end, which = worn_by(pair, inside, lists, SPLITS, TILE)
    mine = inside & (begin == start) & (which == own)
    if TILE == LANES:
        mine = mine & (lane == row)
    return to, mine


@triton.jit
def used_of(
    gamma: tl.tensor, left: tl.tensor, base: tl.tensor, end: tl.tensor, lane: tl.tensor
) -> Any:  # noqa: ANN401
    """One bit for each entry from `base` on: whether a row uses it and it has ranks."""
    scan = tl.arange(0, SCAN)
    entry = base + scan
    listed = entry < end
    ranks = tl.load(left + entry, mask=listed, other=0)
    weight = tl.load(gamma + entry * LANES + lane, mask=listed, other=0.0)
    used = (weight != 0) & (ranks > 0)
    return tl.sum(tl.where(used, tl.full((SCAN,), 1, tl.int64) << scan, 0))


@triton.jit
def lowest_of(bits: tl.tensor) -> Any:  # noqa: ANN401
    """The place of the lowest bit that is set: the exponent of its value as a float."""
    alone = (bits & -bits).to(tl.float32)
    return (alone.to(tl.int32, bitcast=True) >> 23) - 127
