"""Tiles and lists: every row meets exactly its own terms, in its own order."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fader_adapters.kernels.cuda.step_layout import HEADER, Capacity, StepLayout
from fader_adapters.kernels.cuda.tiles import (
    LANES,
    Phase,
    StepTiles,
    TileBuilder,
    TileShape,
    merge,
)
from fader_adapters.spec import RowTerms, StepTerms

CHUNKS = (1, 4, 0, 2, 1, 16, 3, 1)
BUILDER = TileBuilder(TileShape(16, 2, 1 << 20), TileShape(64, 4, 1 << 20))
PIECES = TileBuilder(TileShape(16, 2, 12), TileShape(64, 4, 16))
"""With tiles that are alone in a piece, and lists too long for a tile of sixteen rows."""
builders = st.sampled_from([BUILDER, PIECES])

slots = st.integers(0, len(CHUNKS) - 1)
blends = st.lists(
    st.tuples(slots, st.floats(-2, 2, width=32).filter(bool)), max_size=4, unique_by=lambda t: t[0]
).map(tuple)
sorted_blends = blends.map(lambda terms: tuple(sorted(terms)))
row_counts = st.one_of(st.just(1), st.just(1), st.just(1), st.integers(0, 150))


def steps(terms):
    return st.lists(st.builds(RowTerms, row_counts, terms), max_size=40).map(
        lambda rows: StepTerms(tuple(rows))
    )


def told(step: StepTiles) -> dict[int, list[tuple[int, int, float]]]:
    """What each token that is told to add something is: (slot, chunk, γ) in list order."""
    found: dict[int, list[tuple[int, int, float]]] = {}
    for phase in (step.decode, step.prefill):
        for tile in range(phase.tiles):
            for i, token in enumerate(phase.tokens[tile].tolist()):
                if token < 0:
                    continue
                assert token not in found
                found[token] = [
                    (int(step.slot[e]), int(step.chunk[e]), float(step.gamma[e, i % LANES]))
                    for e in range(phase.first[tile], phase.last[tile])
                    if step.gamma[e, i % LANES] != 0
                ]
    return {token: entries for token, entries in found.items() if entries}


def wanted(terms: StepTerms) -> dict[int, list[tuple[int, int, float]]]:
    found = {}
    token = 0
    for row in terms.rows:
        entries = [
            (slot, chunk, float(np.float32(gamma)))
            for slot, gamma in row.terms
            for chunk in range(CHUNKS[slot])
        ]
        for at in range(token, token + row.tokens):
            if entries:
                found[at] = entries
        token += row.tokens
    return found


@given(steps(blends))
def test_every_row_meets_its_own_terms_in_its_own_order(terms):
    step = BUILDER.build(terms, CHUNKS)
    assert told(step) == wanted(terms)
    assert step.tokens == sum(row.tokens for row in terms.rows)


def test_the_check_notices_a_foreign_coefficient():
    terms = StepTerms((RowTerms(1, ((0, 1.0),)), RowTerms(1, ((1, 1.0),))))
    step = BUILDER.build(terms, CHUNKS)
    step.gamma[0, 1] = 0.5
    assert told(step) != wanted(terms)


@given(steps(sorted_blends))
def test_terms_in_one_common_order_meet_in_a_plain_union(terms):
    step = BUILDER.build(terms, CHUNKS)
    for phase in (step.decode, step.prefill):
        for first, last in zip(phase.first, phase.last, strict=True):
            entries = list(zip(step.slot[first:last], step.chunk[first:last], strict=True))
            assert len(set(entries)) == len(entries)


@given(st.lists(st.lists(slots, max_size=5).map(tuple), max_size=6))
def test_a_merged_list_holds_every_order_and_nothing_else(orders):
    merged = merge(orders)
    for which, order in enumerate(orders):
        assert tuple(m.slot for m in merged if which in m.takers) == order
    assert all(m.takers for m in merged)


def test_orders_that_contradict_each_other_repeat_a_slot():
    assert [m.slot for m in merge([(0, 1), (1, 0)])] in ([0, 1, 0], [1, 0, 1])
    assert [m.slot for m in merge([(0, 1), (1, 2), (0, 2)])] == [0, 1, 2]


@given(steps(blends))
def test_cells_are_whole_groups_in_ascending_order(terms):
    step = BUILDER.build(terms, CHUNKS)
    for phase, shape in ((step.decode, BUILDER.decode), (step.prefill, BUILDER.prefill)):
        ends = [*phase.cell.tolist(), phase.cells][1:]
        for begin, end, first, last in zip(
            phase.cell.tolist(), ends, phase.first.tolist(), phase.last.tolist(), strict=True
        ):
            assert last >= first
            assert begin % shape.group == 0
            assert 0 <= end - begin - (last - first) < shape.group


def test_decode_rows_share_tiles_by_blend_and_prefill_tiles_stay_in_one_row():
    rows = [RowTerms(1, ((i % 2, 1.0),)) for i in range(32)] + [RowTerms(100, ((3, 1.0),))] * 2
    step = BUILDER.build(StepTerms(tuple(rows)), CHUNKS)
    assert step.decode.tiles == 2
    assert step.decode.tokens[0].tolist() == list(range(0, 32, 2))
    assert (step.decode.last - step.decode.first).tolist() == [1, 4]
    assert step.prefill.tiles == 4
    assert [tile[tile >= 0].tolist() for tile in step.prefill.tokens] == [
        list(range(32, 96)),
        list(range(96, 132)),
        list(range(132, 196)),
        list(range(196, 232)),
    ]
    assert step.prefill.first[0] == step.prefill.first[1] != step.prefill.first[2]


def test_rows_that_add_nothing_get_no_tile():
    step = BUILDER.build(StepTerms((RowTerms(1), RowTerms(7), RowTerms(1, ((2, 1.0),)))), CHUNKS)
    assert (step.entries, step.decode.tiles, step.prefill.tiles, step.tokens) == (0, 0, 0, 9)


single = st.builds(RowTerms, st.just(1), blends)


@given(st.lists(single, min_size=1, max_size=70).map(lambda rows: StepTerms(tuple(rows))))
def test_every_row_of_a_step_of_single_tokens_has_one_lane(terms):
    step = BUILDER.build(terms, CHUNKS)
    assert step.covers
    if not step.entries:
        assert not step.decode.tiles
        return
    lanes = step.decode.tokens[step.decode.tokens >= 0]
    assert sorted(lanes.tolist()) == list(range(len(terms.rows)))
    assert step.decode.tiles == -(-len(terms.rows) // LANES)
    lists = (step.decode.last - step.decode.first).tolist()
    used = sum(map(bool, lists))
    assert all(lists[:used]), "tiles without entries come last"


def test_padding_has_lanes_behind_the_rows_of_the_step():
    terms = StepTerms((RowTerms(1), RowTerms(1, ((0, 1.0),)), RowTerms(1)))
    step = BUILDER.build(terms, CHUNKS, padded=5)
    assert step.decode.tokens[0].tolist()[:6] == [1, 0, 2, -5, -6, -1]
    assert told(step) == wanted(terms)
    assert BUILDER.build(terms, CHUNKS).decode.tokens[0].tolist()[:4] == [1, 0, 2, -1]


@pytest.mark.parametrize("tokens", [0, 2, 70])
def test_beside_a_longer_row_those_without_terms_have_no_lane(tokens):
    rows = (RowTerms(1, ((0, 1.0),)), RowTerms(1), RowTerms(tokens))
    step = BUILDER.build(StepTerms(rows), CHUNKS)
    assert not step.covers
    assert step.decode.tokens[step.decode.tokens >= 0].tolist() == [0]


def read(block: np.ndarray, layout: StepLayout, step: StepTiles) -> StepTiles:
    """The step that a block holds; `step` gives the sizes only."""

    def piece(at, rows):
        tiles = int(block[at.header])
        arrays = [block[o : o + tiles] for o in (at.first, at.last, at.cell)]
        tokens = block[at.tokens : at.tokens + tiles * rows].reshape(tiles, rows)
        return Phase(tokens, *arrays, int(block[at.header + 1]), 0)

    def phase(places, of, rows):
        found, cells = [piece(at, rows) for at in places], 0
        for part in found:
            part.cell[:] += cells
            cells += part.cells
        assert sum(part.tiles for part in found) == of.tiles
        names = ("tokens", "first", "last", "cell")
        return Phase(*(np.concatenate([vars(p)[n] for p in found]) for n in names), cells, of.most)

    entries = step.entries
    return StepTiles(
        phase(layout.decode, step.decode, 16),
        phase(layout.prefill, step.prefill, 64),
        block[layout.slot : layout.slot + entries],
        block[layout.chunk : layout.chunk + entries],
        block[layout.gamma : layout.gamma + entries * LANES].view(np.float32).reshape(-1, LANES),
        step.tokens,
        step.covers,
    )


@given(steps(blends), builders)
def test_a_packed_step_reads_back(terms, builder):
    step = builder.build(terms, CHUNKS)
    layout = StepLayout(Capacity(1, 1, 4, 4, 4).grown(step), 64)
    block = np.full(layout.words, -77, np.int32)
    used = layout.pack(step, block)
    assert used <= layout.words
    assert (block[used:] == -77).all()
    again = read(block, layout, step)
    assert told(again) == wanted(terms)
    for mine, theirs in ((step.decode, again.decode), (step.prefill, again.prefill)):
        assert mine.cells == theirs.cells
        assert mine.cell.tolist() == theirs.cell.tolist()


@given(steps(blends), builders)
def test_every_token_finds_its_place_in_the_tiles(terms, builder):
    step = builder.build(terms, CHUNKS)
    tokens = step.tokens + 3
    layout = StepLayout(replace(Capacity(1, 1, 4, 4, 4).grown(step), tokens=tokens), 64)
    block = np.full(layout.words, -77, np.int32)
    layout.pack(step, block)
    tiled = set()
    for places, phase in ((layout.decode, step.decode), (layout.prefill, step.prefill)):
        for at, piece in zip(places, phase.pieces, strict=False):
            place = block[at.place : at.place + tokens]
            own = np.flatnonzero(place)
            assert (piece.tokens.reshape(-1)[place[own] - 1] == own).all()
            assert tiled.isdisjoint(own.tolist())
            tiled |= set(own.tolist())
    assert tiled == {t for p in (step.decode, step.prefill) for t in p.tokens.reshape(-1) if t >= 0}


def test_offsets_depend_on_the_capacity_alone_and_are_aligned():
    layout = StepLayout(Capacity(4, 7, 1000, 1004, 64, 30, 2, 3), 64)
    offsets = [layout.slot, layout.chunk, layout.gamma]
    headers = [at.header for at in (*layout.decode, *layout.prefill)]
    assert headers == [HEADER * place for place in range(5)]
    for at in (*layout.decode, *layout.prefill):
        offsets += [at.tokens, at.first, at.last, at.cell, at.place]
    assert all(offset % 32 == 0 for offset in offsets)
    assert min(offsets) >= headers[-1] + HEADER
    assert len(set(offsets)) == len(offsets)
    ends = {layout.decode[0].tokens: 64, layout.slot: 1000, layout.gamma: 16000}
    for begin, after in itertools.pairwise(sorted([*offsets, layout.words])):
        assert after - begin >= ends.get(begin, 4)


@pytest.mark.parametrize(
    "field", ["decode_tiles", "prefill_tiles", "entries", "decode_cells", "prefill_cells", "tokens"]
)
def test_a_step_beyond_any_capacity_is_noticed_and_grown_for(field):
    rows = (RowTerms(1, ((5, 1.0),)), RowTerms(70, ((1, 1.0),)))
    step = BUILDER.build(StepTerms(rows), CHUNKS)
    room = {"decode_tiles": 1, "prefill_tiles": 2, "entries": 20}
    exact = Capacity(**room, decode_cells=16, prefill_cells=8, tokens=71)
    assert exact.holds(step)
    short = Capacity(**{**vars(exact), field: vars(exact)[field] - 1})
    assert not short.holds(step)
    assert short.grown(step).holds(step)
    assert exact.grown(step) == exact


@given(steps(sorted_blends))
def test_pieces_hold_what_the_scratch_does_and_change_no_row(terms):
    step = PIECES.build(terms, CHUNKS)
    assert told(step) == wanted(terms)
    for phase in (step.decode, step.prefill):
        assert sum(piece.tiles for piece in phase.pieces) == phase.tiles
        tokens = [piece.tokens for piece in phase.pieces]
        assert np.array_equal(np.concatenate(tokens), phase.tokens)
        for piece in phase.pieces:
            assert piece.cells <= phase.most or piece.tiles == 1
            assert piece.cell.tolist()[:1] in ([], [0])
        sizes = [piece.cells for piece in phase.pieces]
        assert all(sum(pair) > phase.most for pair in itertools.pairwise(sizes))
    decode = step.decode
    lists = (decode.last - decode.first)[(decode.tokens >= 0).sum(axis=1) > 1]
    assert (lists <= decode.most).all()


def test_a_long_step_takes_no_more_scratch_than_a_piece_and_doubles_nothing_beyond():
    rows = (RowTerms(64 * 9, ((5, 1.0),)), RowTerms(64 * 2, ((1, 1.0),)))
    step = PIECES.build(StepTerms(rows), CHUNKS)
    assert [piece.cells for piece in step.prefill.pieces] == [16] * 9 + [8]
    grown = Capacity(1, 1, 4, 4, 12).grown(step)
    assert (grown.prefill_cells, grown.prefill_pieces) == (16, 10)
    assert grown.holds(step)
    assert not replace(grown, prefill_pieces=9).holds(step)
