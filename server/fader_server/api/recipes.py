"""/v1/recipes: named blends for administrators, written by compare-and-swap."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fader_adapters.spec import DIGEST_PREFIX
from fader_server.api.blends import NamedTerm, read_blend
from fader_server.api.context import Context, body_of, context_of, log_of
from fader_server.api.fields import Fields
from fader_server.api.named_blends import Recipe
from fader_server.api.resolve import version_of
from fader_server.errors import RequestInvalid

admin_router = APIRouter()


@admin_router.api_route("/v1/recipes", methods=["GET", "HEAD"])
async def list_recipes(request: Request) -> Response:
    """Every recipe."""
    context = context_of(request)
    found = [report(recipe, context) for recipe in context.recipes.list()]
    return JSONResponse({"object": "list", "data": found})


@admin_router.api_route("/v1/recipes/{name:path}", methods=["GET", "HEAD"])
async def one_recipe(request: Request) -> Response:
    """One recipe, with the versions that a request would use now and what is missing."""
    context = context_of(request)
    return JSONResponse(report(context.recipes.get(request.path_params["name"]), context))


@admin_router.put("/v1/recipes/{name:path}")
async def put_recipe(request: Request) -> Response:
    """Write a recipe: 201 under a new name, 200 in place of another."""
    context, name = context_of(request), request.path_params["name"]
    terms, if_digest = _read(await body_of(request), context.limits.max_terms)
    written = await context.recipes.put(name, terms, if_digest=if_digest)
    log_of(request).extra.update(recipe=name, digest=written.recipe.digest)
    return JSONResponse(report(written.recipe, context), 201 if written.created else 200)


@admin_router.delete("/v1/recipes/{name:path}")
async def delete_recipe(request: Request) -> Response:
    """The name is gone at once; running requests finish on their versions."""
    context, name = context_of(request), request.path_params["name"]
    unknown = request.query_params.keys() - {"if_digest"}
    if_digest = request.query_params.get("if_digest")
    if unknown or (if_digest is not None and not DIGEST_PREFIX.fullmatch(if_digest)):
        raise RequestInvalid("the query takes if_digest=12 or more digits, only", param="if_digest")
    await context.recipes.delete(name, if_digest=if_digest)
    log_of(request).extra["recipe"] = name
    return JSONResponse({"object": "recipe", "name": name, "deleted": True})


def _read(body: dict[str, Any], max_terms: int) -> tuple[tuple[NamedTerm, ...], str | None]:
    """The body of a PUT. Raises RequestInvalid."""
    fields = Fields(body)
    fields.unknown({"adapters", "if_digest"}, strict=True)
    if fields.raw("adapters") is None:
        fields.refuse("adapters", 'is required: a list of {"name", "weight"}')
    if_digest = fields.string("if_digest", longest=64) if "if_digest" in body else None
    if if_digest and not DIGEST_PREFIX.fullmatch(if_digest):
        fields.refuse("if_digest", "must be 12 to 64 lower-case hexadecimal digits, or empty")
    fields.finish()
    return read_blend(fields, max_terms) or (), if_digest


def report(recipe: Recipe, context: Context) -> dict[str, Any]:
    """The recipe as it was written, and what it means now."""
    return {
        "object": "recipe",
        "name": recipe.name,
        "digest": recipe.digest,
        "base": context.base.name,
        **lineage(recipe, context),
        "created": recipe.created,
    }


def lineage(recipe: Recipe, context: Context) -> dict[str, Any]:
    """`adapters`: `name` and `weight` as a PUT takes them, `version` as a request would use it now,
    or null; `missing`: the names without one."""
    terms = [
        {
            "name": str(term.ref),
            "weight": term.weight,
            "version": version_of(term.ref, context.adapters),
        }
        for term in recipe.terms
    ]
    return {"adapters": terms, "missing": [t["name"] for t in terms if t["version"] is None]}
