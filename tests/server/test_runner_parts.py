"""Which rows of a step run in one forward, where longer ones must not be among those of one
token."""

from fader_adapters.spec import RowTerms, StepTerms
from fader_server.core import Plan, PlanRow, Request, SamplingParams, Sequence
from fader_server.model.runner import apart


def planned(*counts: int) -> Plan:
    """A step of rows of so many tokens; each has a term of its own."""
    request = Request("r", tuple(range(9)), SamplingParams())
    rows = tuple(PlanRow(Sequence(request, list(range(9))), 0, count, True) for count in counts)
    terms = tuple(RowTerms(n, ((i, 1.0),)) for i, n in enumerate(counts))
    return Plan(rows, StepTerms(terms))


def parts(plan: Plan, together: int) -> list[list[int]]:
    """Tokens of the rows of each forward; rows and terms are the plan's, in order."""
    found = list(apart(plan, together))
    assert [row for part in found for row in part.rows] == list(plan.rows)
    assert [row for part in found for row in part.terms.rows] == list(plan.terms.rows)
    return [[row.count for row in part.rows] for part in found]


def test_longer_rows_run_apart_and_so_many_of_one_token_at_a_time():
    plan = planned(*[1] * 5, 3, 4, 5, 1, 1)
    assert parts(plan, 64) == [[1] * 5, [3, 4, 5], [1, 1]]
    assert parts(plan, 5) == [[1] * 5, [3, 4, 5], [1, 1]]
    assert parts(plan, 2) == [[1, 1], [1, 1], [1], [3, 4, 5], [1, 1]]
    assert parts(planned(2, 2, 2), 1) == [[2, 2, 2]]
