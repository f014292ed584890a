"""The generation routes: a body in, an answer or a stream out. Decides nothing itself."""

import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from fader_server.api.answers import ById, Gathered, Head, Renderer, Told
from fader_server.api.choosing import Limits
from fader_server.api.context import (
    Context,
    context_of,
    log_of,
    principal_of,
    read_from,
    visible_to,
)
from fader_server.api.disconnect import while_connected
from fader_server.api.errors import ResponseNotKept, describe
from fader_server.api.generate import Generation
from fader_server.api.known import RESPONSE_NAMES
from fader_server.api.observe import CallRecord
from fader_server.api.render import ChatRenderer, CompletionRenderer
from fader_server.api.resolve import blend_header
from fader_server.api.responses.render import ResponseRenderer
from fader_server.api.responses.request import read_response
from fader_server.api.schemas import Call, read_chat, read_completion
from fader_server.api.sse import EventStream, outcome_of, start
from fader_server.errors import RequestInvalid, TenantBusy

router = APIRouter()
Reader = Callable[[dict[str, Any], Limits], Call]


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """OpenAI's completions, streamed or whole."""
    return await _generate(request, read_completion, "cmpl-")


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions, streamed or whole."""
    return await _generate(request, read_chat, "chatcmpl-")


@router.post("/v1/responses")
async def responses(request: Request) -> Response:
    """OpenAI's responses, streamed or whole; none is kept."""
    return await _generate(request, read_response, "resp_")


@router.api_route("/v1/responses/{id:path}", methods=["GET", "HEAD", "POST", "DELETE"])
async def kept_response(request: Request) -> Response:
    """What OpenAI does with a response that it keeps."""
    raise ResponseNotKept(
        "There is no such response: this server keeps none. POST /v1/responses answers at once."
    )


async def _generate(request: Request, read: Reader, prefix: str) -> Response:
    context = context_of(request)
    caller = principal_of(request)
    limits = replace(context.limits, max_tokens=caller.max_tokens)
    call = await read_from(request, lambda body: read(body, limits))
    context.metrics.ignored(call.ignored)
    record = context.record(request)
    log_of(request).extra.update(stream=call.stream, n=call.n)
    id = f"{prefix}{secrets.token_hex(12)}"
    try:
        work = _answer(context, request, call, id, record)
        answer = await while_connected(request.receive, work)
    except TenantBusy as error:
        record.end(outcome_of(error))
        answer = describe(error).response()
    except BaseException as error:
        record.end(outcome_of(error))
        if call.asked is not None and isinstance(error, RequestInvalid):
            error.param = RESPONSE_NAMES.get(error.param or "", error.param)
        raise
    answer.headers.update(context.generator.quotas.headers(caller.tenant))
    return answer


async def _answer(
    context: Context, request: Request, call: Call, id: str, record: CallRecord
) -> Response:
    tenant = principal_of(request).tenant
    generation = await context.generator.start(
        call, visible_to(request), id=id, tenant=tenant, record=record
    )
    renderer = _renderer(context, generation, id)
    headers = {"x-fader-blend": blend_header(generation.lease)}
    if call.stream:
        started = await start(generation, context.pace)
        headers |= _lane(record)
        return EventStream(started, renderer, headers=headers, record=record, pace=context.pace)
    try:
        whole = await _collect(generation, renderer)
    finally:
        generation.close()
    record.end("ok")
    body = renderer.whole(whole, generation.usage)
    return Response(body, 200, headers | _lane(record), media_type="application/json")


def _lane(record: CallRecord) -> dict[str, str]:
    """Nothing before a choice has begun: a stream that has to wait says it in its log line only."""
    return {} if record.lane is None else {"x-fader-lane": record.lane}


async def _collect(generation: Generation, renderer: Renderer) -> list[Gathered]:
    choices: defaultdict[int, Gathered] = defaultdict(Gathered)
    async for batch in generation.deltas():
        for delta in batch:
            renderer.gather(choices[delta.index], delta)
    return [choices[index] for index in sorted(choices)]


def _renderer(context: Context, generation: Generation, id: str) -> Renderer:
    call = generation.call
    head = Head(id, int(time.time()), call.model, context.fingerprint(generation.lease))
    prompts = generation.prompts if call.return_ids else None
    must = call.tools is not None and call.tools.must
    told = Told(call.logprobs is not None, call.include_usage, prompts, calls_alone=must)
    names = ById(context.tokenizer) if call.names_by_id else context.tokenizer
    if call.asked is not None:
        return ResponseRenderer(head, names, told, call.asked)
    kind = ChatRenderer if call.chat else CompletionRenderer
    return kind(head, names, told)
