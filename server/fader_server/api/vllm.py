"""vLLM's side routes: load and unload adapters, tokenise and detokenise, word for word where they
agree. What vLLM takes from a request and Fader does not (templates, their variables) is refused."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from fader_adapters.errors import (
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    SourceForbidden,
    SourceNotFound,
)
from fader_adapters.spec import ADAPTER_NAME
from fader_server.api.adapter_ports import LoadOrder
from fader_server.api.admin import load, unload
from fader_server.api.choosing import is_token_ids
from fader_server.api.context import body_of, context_of, visible_to
from fader_server.api.errors import describe
from fader_server.api.fields import Fields
from fader_server.api.known import CHAT_FIELDS, COMPLETION_FIELDS
from fader_server.api.messages import plain, read_messages
from fader_server.api.ports import Tokenizer
from fader_server.api.resolve import resolve
from fader_server.api.schemas import read_continues, read_effort
from fader_server.api.tools import read_tools
from fader_server.errors import ModelNotFound, RequestInvalid

_LOAD_FIELDS = frozenset(("lora_name", "lora_path", "load_inplace", "is_3d_lora_weight"))
_UNLOAD_FIELDS = frozenset(("lora_name", "lora_int_id"))
_TOKENIZE_FIELDS = frozenset(("add_special_tokens", "return_token_strs"))
_PROMPT_FIELDS = COMPLETION_FIELDS | _TOKENIZE_FIELDS
_MESSAGES_FIELDS = CHAT_FIELDS | _TOKENIZE_FIELDS | {"mm_processor_kwargs"}
"""The body of a generation may be counted as it is."""
_DETOKENIZE_FIELDS = frozenset(("model", "tokens"))
user_router = APIRouter()
admin_router = APIRouter()


@admin_router.post("/v1/load_lora_adapter")
async def load_lora_adapter(request: Request) -> Response:
    """Load under a free name, or in place with `load_inplace`."""
    body = await body_of(request)
    refusal = _check_fields(body, _LOAD_FIELDS)
    if refusal is not None:
        return refusal
    name, path = body.get("lora_name"), body.get("lora_path")
    if not (isinstance(name, str) and name and isinstance(path, str) and path):
        return _refuse(400, "Both 'lora_name' and 'lora_path' must be provided.")
    if name == context_of(request).base.name:
        return _refuse(
            400, f"The lora adapter '{_shown(name)}' conflicts with a served base model."
        )
    if context_of(request).recipes.find(name) is not None:
        return _refuse(400, f"The lora adapter '{name}' conflicts with a served recipe.")
    if not ADAPTER_NAME.fullmatch(name):
        return _refuse(400, "'lora_name' has letters, digits and . _ - only, 128 at most.")
    order = LoadOrder(name, path, replace=body.get("load_inplace") is True)
    try:
        await load(request, order)
    except AdapterExists:
        return _refuse(
            400,
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter "
            "in place, set 'load_inplace' to True.",
        )
    except (SourceNotFound, SourceForbidden):
        return _refuse(404, f"No adapter found for '{name}'.")
    except AdapterError as error:
        problem = describe(error)
        return _refuse(
            problem.status,
            problem.error["message"],
            code=problem.error["code"],
            retry=problem.headers.get("x-should-retry", "false"),
        )
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@admin_router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(request: Request) -> Response:
    """Forget a name."""
    body = await body_of(request)
    refusal = _check_fields(body, _UNLOAD_FIELDS)
    if refusal is not None:
        return refusal
    name = body.get("lora_name")
    if not isinstance(name, str) or not name:
        return _refuse(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    try:
        await unload(request, name)
    except AdapterNotFound:
        return _refuse(404, f"The lora adapter '{_shown(name)}' cannot be found.")
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_fields(body: dict[str, Any], known: frozenset[str]) -> Response | None:
    """Refuse what looks like a field of ours and is none, and switches that are no switches."""
    fields = Fields(body)
    fields.unknown(known)
    fields.boolean("load_inplace")
    fields.only("is_3d_lora_weight", lambda value: value is False, "is not supported")
    try:
        fields.finish()
    except RequestInvalid as error:
        return _refuse(400, str(error))
    return None


def _shown(name: str) -> str:
    return name if ADAPTER_NAME.fullmatch(name) else "…"


def _refuse(
    status: int, message: str, *, code: str | None = None, retry: str = "false"
) -> Response:
    kinds = {400: "InvalidUserInput", 404: "NotFoundError"}
    error = {
        "message": message,
        "type": kinds.get(status, "InternalServerError"),
        "param": None,
        "code": code,
    }
    return JSONResponse({"error": error}, status, {"x-should-retry": retry})


@user_router.post("/tokenize")
async def tokenize(request: Request) -> Response:
    """Tokens of a prompt or of chat messages."""
    context, body = context_of(request), await body_of(request)
    fields = Fields(body)
    read = _of_messages if fields.raw("messages") is not None else _of_prompt
    encoded = read(fields, context.tokenizer)
    strings = fields.boolean("return_token_strs")
    fields.finish()
    context.metrics.ignored(fields.ignored)
    _check_model(request, body)

    def encode() -> dict[str, Any]:
        tokens, tokenizer = encoded(), context.tokenizer
        texts = [tokenizer.token_text(token) for token in tokens] if strings else None
        return {
            "count": len(tokens),
            "max_model_len": context.base.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }

    return JSONResponse(await run_in_threadpool(encode))


def _of_prompt(fields: Fields, tokenizer: Tokenizer) -> Callable[[], list[int]]:
    """What makes the ids, on a thread; problems are noted in `fields`."""
    fields.unknown(_PROMPT_FIELDS)
    if fields.raw("prompt") is None:
        fields.refuse("prompt", "is required, or messages")
    prompt = fields.string("prompt")
    special = fields.boolean("add_special_tokens", default=True)
    return lambda: tokenizer.encode_prompt(prompt, special=special)


def _of_messages(fields: Fields, tokenizer: Tokenizer) -> Callable[[], list[int]]:
    """The same of a chat."""
    fields.unknown(_MESSAGES_FIELDS)
    messages = read_messages(fields)
    use = read_tools(fields)
    continues = read_continues(fields, messages)
    if continues and use:
        fields.refuse("continue_final_message", "cannot stand beside tools")
    effort = read_effort(fields)
    special = fields.boolean("add_special_tokens")
    speaks = fields.boolean("add_generation_prompt", default=True)
    for name in ("chat_template", "chat_template_kwargs", "mm_processor_kwargs"):
        fields.only(name, lambda v: v == {}, "may not come from a request")
    return lambda: tokenizer.encode_chat(
        plain(messages),
        use.tools if use else (),
        effort,
        special=special,
        speaks=speaks,
        continues=continues,
    )


@user_router.post("/detokenize")
async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    context, body = context_of(request), await body_of(request)
    fields = Fields(body)
    fields.unknown(_DETOKENIZE_FIELDS)
    fields.finish()
    context.metrics.ignored(fields.ignored)
    tokens = body.get("tokens")
    vocab_size = context.limits.vocab_size
    if not isinstance(tokens, list) or not is_token_ids(tokens, vocab_size):
        raise RequestInvalid(
            f"tokens must be a list of ids from 0 to {vocab_size - 1}", param="tokens"
        )
    _check_model(request, body)
    text = await run_in_threadpool(context.tokenizer.decode, tokens, special=True)
    return JSONResponse({"prompt": text})


@user_router.api_route("/tokenizer_info", methods=["GET", "HEAD"])
async def tokenizer_info(request: Request) -> Response:
    """What clients with a tokenizer here ask first, lm-eval's among them."""
    return JSONResponse(dict(context_of(request).tokenizer.told))


def _check_model(request: Request, body: dict[str, Any]) -> None:
    """vLLM lets `model` be absent here; when it is given it must exist."""
    model = body.get("model")
    if model is None:
        return
    if not isinstance(model, str):
        raise RequestInvalid("model must be text", param="model")
    base, visible = context_of(request).base.name, visible_to(request)
    try:
        found = resolve(model, None, base=base, recipes=visible.find)
        for term in found.terms:
            visible.within(found.recipe).get(term.ref)
    except AdapterNotFound:
        raise ModelNotFound("The requested model does not exist.") from None
