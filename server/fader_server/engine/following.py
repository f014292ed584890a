"""The step after one whose tokens nobody has seen yet. Integers only."""

from fader_server.core import Plan, PlanRow, Sequence
from fader_server.engine.blocks import BlockManager
from fader_server.engine.limits import Limits
from fader_server.engine.roster import Roster


def following(plan: Plan, *, roster: Roster, blocks: BlockManager, limits: Limits) -> Plan | None:
    """Every row of `plan`, which is under way, one token on; None where another step may be due.

    One is when a row is still in its prompt, ends with this step by its length, finds no block or
    has a guide, which must know a token before the next, and when somebody else runs; whether
    somebody might be admitted is the caller's to know. A row that ends by a stop token is not known
    to: what it computes then is thrown away, and its blocks are given to nobody before that.
    """
    rows = plan.rows
    if len(rows) != len(roster.running):
        return None
    if not all(_goes_on(row, limits) and roster.in_place(row.sequence) for row in rows):
        return None
    for row in rows:
        sequence = row.sequence
        full = row.start + 1 == len(sequence.blocks) * blocks.block_size
        if full and not blocks.grow(sequence):
            return None
    return one_on(plan)


def one_on(plan: Plan) -> Plan:
    """The plan of decode rows whose every row stands one token further."""
    rows = tuple(PlanRow(row.sequence, row.start + 1, 1, True) for row in plan.rows)
    return Plan(rows, plan.terms)


def _goes_on(row: PlanRow, limits: Limits) -> bool:
    sequence: Sequence = row.sequence
    return (
        sequence.decoding
        and sequence.request.guide is None
        and sequence.output_len + 1 < sequence.request.params.max_tokens
        and len(sequence.tokens) + 1 < limits.max_model_len
    )
