"""/v1/merge: make, watch and drop the merged lane. Administrators only."""

from collections.abc import Sequence
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fader_server.api.adapter_ports import LeasedTerm
from fader_server.api.context import body_of, context_of, log_of
from fader_server.api.fields import Fields
from fader_server.api.merge_ports import (
    LaneInfo,
    MergeForm,
    MergeJob,
    MergeOrder,
    MergeRounding,
    MergeStatus,
    Merging,
)
from fader_server.api.resolve import lease_target, read_target
from fader_server.errors import RequestInvalid

admin_router = APIRouter()
_FORMS = ("nf4", "bf16")
_ROUNDINGS = ("keep", "plain")


@admin_router.post("/v1/merge")
async def start(request: Request) -> Response:
    """Begin to merge a blend in the background (202); 200 when that lane is open already."""
    context, merging = context_of(request), _merging(request)
    fields = Fields(await body_of(request))
    fields.unknown({"adapters", "recipe", "dtype", "rounding", "force"}, strict=True)
    form = _one_of(fields, "dtype", _FORMS, context.config.merge_dtype)
    rounding = _one_of(fields, "rounding", _ROUNDINGS, "keep")
    order = MergeOrder(
        cast("MergeForm", form), cast("MergeRounding", rounding), fields.boolean("force")
    )
    find = context.recipes.find
    target = read_target(fields, max_terms=context.limits.max_terms, recipes=find)
    fields.finish()
    if target is None:
        raise RequestInvalid(
            "adapters is required: a list of names with weights, or recipe, a name",
            param="adapters",
            code="blend_invalid",
        )
    status = await merging.start(order, await lease_target(target, context.adapters))
    log_of(request).extra["merge"] = "started" if status.busy else "there already"
    return JSONResponse(document(status), 202 if status.busy else 200)


@admin_router.api_route("/v1/merge", methods=["GET", "HEAD"])
async def show(request: Request) -> Response:
    """The lane, the merge under way or what became of the last one, and the loss report."""
    return JSONResponse(document(_merging(request).status()))


@admin_router.delete("/v1/merge")
async def drop(request: Request) -> Response:
    """End the merge under way, else close the lane: its memory goes with its last request."""
    return JSONResponse(document(await _merging(request).drop()))


def document(status: MergeStatus) -> dict[str, Any]:
    """As the API shows it. `state`: the job's stage while one is told of, else ready or none."""
    job, lane = status.job, status.lane
    state = job.stage if job is not None else "none" if lane is None else "ready"
    return {
        "object": "merge",
        "state": state,
        "lane": None if lane is None else _lane(lane),
        "job": None if job is None else _job(job),
        "requests": status.requests,
        "leaving_bytes": status.leaving_bytes,
    }


def _lane(lane: LaneInfo) -> dict[str, Any]:
    return {
        "adapters": _terms(lane.terms),
        "digest": lane.digest,
        "key": lane.key,
        "dtype": lane.form,
        "bytes": lane.bytes,
        "seconds": round(lane.seconds, 3),
        "created": lane.created,
        "report": lane.report,
    }


def _job(job: MergeJob) -> dict[str, Any]:
    return {
        "adapters": _terms(job.terms),
        "digest": job.digest,
        "dtype": job.form,
        "stage": job.stage,
        "progress": round(job.progress, 4),
        "bytes": job.bytes,
        "reason": job.reason or None,
        "report": job.report,
    }


def _terms(terms: Sequence[LeasedTerm]) -> list[dict[str, Any]]:
    return [{"name": t.name, "version": t.version, "weight": t.weight} for t in terms]


def _one_of(fields: Fields, name: str, allowed: tuple[str, ...], default: str) -> str:
    given = fields.string(name, longest=16) or default
    if given not in allowed:
        fields.refuse(name, f"must be one of {', '.join(allowed)}")
    return given


def _merging(request: Request) -> Merging:
    merging = context_of(request).merging
    assert merging is not None, "the routes are there only where it is"
    return merging
