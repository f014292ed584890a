"""What of its logits a step asks of a screened output layer. Computes nothing."""

from contextlib import AbstractContextManager, nullcontext

from fader_adapters.kernels.native.screen import COLDEST, HOTTEST, MOST, Screen, Wanted
from fader_server.core import Plan, PlanRow
from fader_server.model.sampling_state import edits, row_key


def screening(screen: Screen | None, plan: Plan) -> AbstractContextManager[None]:
    """Around a forward of the plan: the output layer leaves out what nobody asks for."""
    if screen is None or any(row.wants_prompt_logprobs for row in plan.rows):
        return nullcontext()
    asked = [wanted(row) for row in plan.rows if row.samples]
    rows = [row for row in asked if row is not None]
    return screen.keeping(rows) if rows and len(rows) == len(asked) else nullcontext()


def wanted(row: PlanRow) -> Wanted | None:
    """Of the row's next logits; None: more than can be left out."""
    params = row.sequence.request.params
    if params.logprobs is not None or edits(row):
        return None
    heat = params.temperature
    if not heat:
        return Wanted()
    if params.top_k:
        return Wanted(params.top_k, heat) if params.top_k <= MOST else None
    if not COLDEST <= heat <= HOTTEST:
        return None
    return Wanted(heat=heat, key=row_key(row), min_p=params.min_p, top_p=params.top_p)
