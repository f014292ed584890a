"""/v1/models: the base first, then adapters and recipes, as OpenAI's model cards with lineage."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fader_adapters.errors import AdapterNotFound
from fader_server.api.adapter_ports import AdapterInfo
from fader_server.api.context import Context, context_of, visible_to
from fader_server.api.named_blends import Recipe
from fader_server.api.recipes import lineage
from fader_server.api.resolve import resolve
from fader_server.errors import ModelNotFound

router = APIRouter()


@router.api_route("/v1/models", methods=["GET", "HEAD"])
async def list_models(request: Request) -> Response:
    """Every model that the caller may use."""
    context, visible = context_of(request), visible_to(request)
    cards = [_base_card(context), *(_card(context, info) for info in visible.adapters())]
    cards += [_recipe_card(context, recipe) for recipe in visible.recipes()]
    return JSONResponse({"object": "list", "data": cards})


@router.api_route("/v1/models/{id:path}", methods=["GET", "HEAD"])
async def one_model(request: Request) -> Response:
    """One model, by any spelling that a request may use."""
    context, visible = context_of(request), visible_to(request)
    given = request.path_params["id"]
    target = resolve(given, None, base=context.base.name, recipes=visible.find)
    if target.recipe is not None:
        return JSONResponse({**_recipe_card(context, target.recipe), "id": target.model})
    if not target.terms:
        return JSONResponse(_base_card(context))
    try:
        info = visible.get(target.terms[0].ref)
    except AdapterNotFound:
        raise ModelNotFound("The requested model does not exist.") from None
    return JSONResponse({**_card(context, info), "id": target.model})


def _base_card(context: Context) -> dict[str, Any]:
    return {
        "id": context.base.name,
        "object": "model",
        "created": context.base.created,
        "owned_by": "fader",
        "root": context.base.name,
        "parent": None,
        "max_model_len": context.base.max_model_len,
        "vocab_size": context.tokenizer.vocab_size,
        "permission": [],
    }


def _card(context: Context, info: AdapterInfo) -> dict[str, Any]:
    root = f"{info.name}@{info.version[:12]}"  # never a path of the host
    changes = {"id": info.name, "created": info.created, "root": root, "version": info.version}
    return {**_base_card(context), **changes, "parent": context.base.name}


def _recipe_card(context: Context, recipe: Recipe) -> dict[str, Any]:
    return {
        **_base_card(context),
        "id": recipe.name,
        "created": recipe.created,
        "root": f"{recipe.name}@{recipe.digest[:12]}",
        "parent": context.base.name,
        "digest": recipe.digest,
        **lineage(recipe, context),
    }
