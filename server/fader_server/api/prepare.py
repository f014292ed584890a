"""From a checked call to engine requests: tokens, room in the context, sampling parameters.

Pure but for the tokenizer. Takes no lease, submits nothing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fader_server.api.adapter_ports import Lease
from fader_server.api.messages import plain
from fader_server.api.ports import Echo, Tokenizer
from fader_server.api.schemas import Call, Prompt
from fader_server.core import Guide, Request, SamplingParams
from fader_server.errors import ContextTooLong, RequestInvalid
from fader_server.phases import phases_of
from fader_server.text.restriction import Restriction

Tokens = tuple[int, ...]
MOST_SCORES = 1 << 20
"""Logprobs of prompts' tokens in one answer, of the likeliest ones each as well: 30 MB of JSON."""


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt."""

    tokens: Tokens
    echo: Echo | None
    """Where it is part of the answer."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The texts of a call as tokens."""

    prompts: list[Read]
    restriction: Restriction | None
    """What is forbidden of tokens, if anything is."""
    prediction: Tokens
    """What each answer may be like."""


class Preparer:
    """Knows the base's tokenizer and the longest sequence the engine takes."""

    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._longest = max_model_len

    def read(self, call: Call) -> Reading:
        """Takes its time, on any thread. Raises RequestInvalid, ContextTooLong."""
        choosing, restriction = call.choosing, None
        if choosing.permitted or choosing.banned:
            restriction = self._tokenizer.restriction(choosing.permitted, choosing.banned)
        return Reading(self._read_prompts(call), restriction, self._foretold(call.prediction))

    def _foretold(self, text: str) -> Tokens:
        """Nothing of what no answer has room for."""
        if not text:
            return ()
        try:
            return tuple(self._tokenizer.encode_prompt(text, special=False))
        except ContextTooLong:
            return ()

    def _read_prompts(self, call: Call) -> list[Read]:
        if not call.chat:
            return [self._read(prompt, echo=call.echo) for prompt in call.prompts]
        tools = () if call.tools is None else call.tools.tools
        tokens = self._tokenizer.encode_chat(
            plain(call.messages), tools, call.effort, speaks=call.speaks, continues=call.continues
        )
        return [Read(tuple(tokens), None)]

    def _read(self, prompt: Prompt, *, echo: bool) -> Read:
        text = isinstance(prompt, str)
        tokens = tuple(self._tokenizer.encode_prompt(prompt)) if text else prompt
        fits = len(tokens) <= self._longest
        return Read(tokens, self._tokenizer.echo(tokens) if echo and fits else None)

    def requests(
        self, call: Call, reading: Reading, lease: Lease, *, id: str, tenant: str
    ) -> list[Request]:
        """One request for each choice, prompts outer, n inner. Raises ContextTooLong,
        RequestInvalid."""
        prompts = [prompt.tokens for prompt in reading.prompts]
        self._check_scores(call, prompts)
        salt = f"{tenant}/{call.cache_salt}"
        requests: list[Request] = []
        for prompt in prompts:
            room = self._output_room(call, len(prompt))
            phases = phases_of(prompt, lease.blend, lease.adapters)
            for k in range(call.n):
                params = self._params(call, room, k)
                name = f"{id}-{len(requests)}"
                requests.append(
                    Request(
                        *(name, prompt, params, lease.blend, lease.adapters, salt, tenant),
                        phases=phases,
                        prediction=reading.prediction,
                    )
                )
        return requests

    def guided(self, request: Request, guide: Guide) -> Request:
        """With a guide, which says where the output may end: the model's stop tokens count."""
        stop_ids = request.params.stop_token_ids | self._tokenizer.eos_ids
        params = replace(request.params, stop_token_ids=stop_ids)
        return replace(request, params=params, guide=guide)

    def _check_scores(self, call: Call, prompts: Sequence[Tokens]) -> None:
        if not call.echo or call.logprobs is None:
            return
        count = sum(map(len, prompts)) * call.n * (1 + call.logprobs)
        if count > MOST_SCORES:
            raise RequestInvalid(
                f"the prompts' tokens times n times (logprobs + 1) must be at most {MOST_SCORES}, "
                f"got {count}; send several requests",
                param="logprobs",
            )

    def _output_room(self, call: Call, prompt: int) -> int:
        param = "messages" if call.chat else "prompt"
        if call.max_tokens is None:
            if prompt >= self._longest:
                raise self._too_long(f"{prompt} tokens in the {param}", param)
            return min(self._longest - prompt, call.longest)
        if prompt + call.max_tokens > self._longest:
            what = f"{prompt} tokens in the {param} and {call.max_tokens} in the completion"
            raise self._too_long(what, param if prompt >= self._longest else "max_tokens")
        return call.max_tokens

    def _too_long(self, what: str, param: str) -> ContextTooLong:
        return ContextTooLong.of(self._longest, f"you requested {what}", param=param)

    def _params(self, call: Call, room: int, k: int) -> SamplingParams:
        choosing = call.choosing
        stop_ids = frozenset(choosing.stop_token_ids)
        if not choosing.ignore_eos:
            stop_ids |= self._tokenizer.eos_ids
        return SamplingParams(
            temperature=choosing.temperature,
            top_k=choosing.top_k,
            top_p=choosing.top_p,
            min_p=choosing.min_p,
            repetition_penalty=choosing.repetition_penalty,
            presence_penalty=choosing.presence_penalty,
            frequency_penalty=choosing.frequency_penalty,
            logit_bias=choosing.logit_bias,
            seed=choice_seed(choosing.seed, k),
            logprobs=call.logprobs,
            prompt_logprobs=call.logprobs if call.echo else None,
            max_tokens=room,
            min_tokens=choosing.min_tokens,
            stop_token_ids=stop_ids,
        )


def choice_seed(seed: int, k: int) -> int:
    """The seed of the k-th choice, 0 to 2⁶³ − 1: the call's own for the first, then derived."""
    if k == 0:
        return seed % (1 << 63)
    state = hashlib.blake2b(f"{seed}/{k}".encode(), digest_size=8)
    return int.from_bytes(state.digest(), "little") >> 1
