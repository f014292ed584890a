"""/v1/adapters: health reports for users; load, swap, pin and unload for administrators."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fader_adapters.errors import AdapterExists
from fader_adapters.report import health_facts
from fader_adapters.spec import ADAPTER_NAME, DIGEST, DIGEST_PREFIX, NESTED_NAME
from fader_server.api.adapter_ports import AdapterInfo, Loaded, LoadOrder
from fader_server.api.blends import AdapterRef
from fader_server.api.context import body_of, context_of, log_of, principal_of, visible_to
from fader_server.api.fields import Fields
from fader_server.errors import RequestInvalid

user_router = APIRouter()
admin_router = APIRouter()


@user_router.api_route("/v1/adapters", methods=["GET", "HEAD"])
async def list_adapters(request: Request) -> Response:
    """The health report of every adapter that the caller may use."""
    reports = [report(info, request) for info in visible_to(request).adapters()]
    return JSONResponse({"object": "list", "data": reports})


@user_router.api_route("/v1/adapters/{name:path}", methods=["GET", "HEAD"])
async def one_adapter(request: Request) -> Response:
    """One adapter's health report; `name@version` works too."""
    ref = AdapterRef.read(request.path_params["name"])
    if ref is None:
        raise RequestInvalid("the adapter's name is malformed", param="name")
    return JSONResponse(report(visible_to(request).get(ref), request))


@admin_router.put("/v1/adapters/{name:path}")
async def put_adapter(request: Request) -> Response:
    """Load an adapter under a new name (201), or swap the name to a new version (200)."""
    order = read_order(_name(request), await body_of(request))
    loaded = await load(request, order)
    status = 201 if loaded.replaced is None else 200
    return JSONResponse(report(loaded.info, request), status)


@admin_router.patch("/v1/adapters/{name:path}")
async def patch_adapter(request: Request) -> Response:
    """Pin or unpin."""
    fields = Fields(await body_of(request))
    fields.unknown({"pin"}, strict=True)
    if fields.raw("pin") is None:
        fields.refuse("pin", "is required: true or false")
    pinned = fields.boolean("pin")
    fields.finish()
    adapters = context_of(request).adapters
    info = adapters.pin(_name(request), pinned=pinned)
    await adapters.saved()
    return JSONResponse(report(info, request))


@admin_router.delete("/v1/adapters/{name:path}")
async def delete_adapter(request: Request) -> Response:
    """The name is gone at once; the memory follows when the last lease ends."""
    name = _name(request)
    await unload(request, name)
    body = {"object": "adapter", "name": name, "deleted": True}
    return JSONResponse({**body, "recipes": _recipes_with(name, request)})


def read_order(name: str, body: dict[str, Any]) -> LoadOrder:
    """The body of a PUT. Raises RequestInvalid."""
    fields = Fields(body)
    fields.unknown({"source", "revision", "sha256", "if_version", "pin"}, strict=True)
    order = LoadOrder(
        name=name,
        source=fields.string("source", required=True, longest=4096),
        revision=fields.string("revision", longest=256) or None,
        sha256=fields.string("sha256", longest=64) or None,
        if_version=fields.string("if_version", longest=64) if "if_version" in body else None,
        pin=None if fields.raw("pin") is None else fields.boolean("pin"),
    )
    if order.sha256 and not DIGEST.fullmatch(order.sha256):
        fields.refuse("sha256", "must be 64 lower-case hexadecimal digits")
    if order.if_version and not DIGEST_PREFIX.fullmatch(order.if_version):
        fields.refuse("if_version", "must be 12 to 64 lower-case hexadecimal digits, or empty")
    fields.finish()
    return order


async def load(request: Request, order: LoadOrder) -> Loaded:
    """Load, logged."""
    context = context_of(request)
    if order.name == context.base.name:
        raise AdapterExists("the base has this name; choose another for the adapter")
    log_of(request).extra["adapter"] = order.name
    loaded = await context.adapters.load(order)
    log_of(request).extra["version"] = loaded.info.version
    return loaded


async def unload(request: Request, name: str) -> None:
    """Unload, logged and written down. Raises AdapterNotFound."""
    adapters = context_of(request).adapters
    version = adapters.get(AdapterRef(name)).version
    adapters.unload(name)
    log_of(request).extra.update(adapter=name, version=version)
    await adapters.saved()


def report(info: AdapterInfo, request: Request) -> dict[str, Any]:
    """The health report; where it came from is shown to administrators only."""
    body: dict[str, Any] = {
        **({} if info.health is None else health_facts(info.health)),
        "object": "adapter",
        "name": info.name,
        "version": info.version,
        "base": context_of(request).base.name,
        "rank": info.rank,
        "scales": list(info.scales),
        "modules": info.modules,
        "targets": list(info.targets),
        "bytes": info.bytes,
        "tier": info.tier,
        "leases": info.leases,
        "pinned": info.pinned,
        "retired": list(info.retired),
        "created": info.created,
    }
    tokens, tokenizer = body.get("invocation_tokens"), context_of(request).tokenizer
    body["invocation_text"] = tokens and tokenizer.decode(tokens, special=True)
    if principal_of(request).role == "admin":
        body["source"] = info.source
        body["revision"] = info.revision
    return body


def _recipes_with(name: str, request: Request) -> list[str]:
    """Recipes that have the adapter in them, and miss it now."""
    recipes = context_of(request).recipes.list()
    return [recipe.name for recipe in recipes if name in {t.ref.name for t in recipe.terms}]


def _name(request: Request) -> str:
    name = request.path_params["name"]
    if not (ADAPTER_NAME.fullmatch(name) or NESTED_NAME.fullmatch(name)):
        raise RequestInvalid(
            "an adapter's name has letters, digits and . _ - only, 128 at most, or is a Hub id",
            param="name",
        )
    return name
