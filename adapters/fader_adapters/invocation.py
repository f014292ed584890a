"""Activated LoRA: the tokens from whose last occurrence in a prompt on an adapter applies.

What PEFT refuses beside them is refused here, and what it takes for two things. Reads no tensors.
"""

from collections.abc import Iterable
from typing import Any

from fader_adapters.config_keys import invalid, shown
from fader_adapters.errors import (
    AdapterInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    BlendInvalid,
)
from fader_adapters.limits import Limits
from fader_adapters.places import Place
from fader_adapters.spec import AdapterSpec, BaseSpec

KEY = "alora_invocation_tokens"
TASK = "CAUSAL_LM"
"""PEFT applies activated LoRA in models of this task alone."""
_NO_TOKENS = (
    "token numbers, or null for an ordinary LoRA: PEFT takes none for either, by the kind of weight"
)
_PLACES = frozenset({"linear", "head"})
"""What it can adapt: modules that are linears."""


def read_invocation(fields: dict[str, Any], limits: Limits) -> tuple[int, ...]:
    """The invocation tokens of a config; none: an ordinary LoRA.

    Raises AdapterInvalid, AdapterTooLarge.
    """
    tokens = fields.get(KEY)
    if tokens is None:
        return ()
    if tokens == []:
        raise invalid(KEY, tokens, _NO_TOKENS)
    if not isinstance(tokens, list) or not all(type(one) is int and one >= 0 for one in tokens):
        raise invalid(KEY, tokens, "a list of token numbers, 0 or more each")
    if len(tokens) > limits.invocation:
        raise AdapterTooLarge(
            f"adapter_config.json: {KEY} has {len(tokens)} tokens, the limit is {limits.invocation}"
        )
    if fields.get("task_type") != TASK:
        raise invalid("task_type", fields.get("task_type"), f'"{TASK}" beside {KEY}')
    for other, told in (
        ("use_dora", "PEFT has no DoRA that is activated"),
        ("trainable_token_indices", "trained tokens would change what comes before the invocation"),
        ("modules_to_save", "whole modules would change what comes before the invocation"),
    ):
        if fields.get(other):
            raise invalid(other, fields[other], f"null or false beside {KEY}: {told}")
    return tuple(tokens)


def check_invocation(
    tokens: tuple[int, ...], places: Iterable[Place], replaced: Iterable[Place], base: BaseSpec
) -> None:
    """Whether the base has such tokens, and the adapter only modules that can be activated.

    replaced: of tables that it holds and that differ from the base's.
    Raises AdapterInvalid, AdapterMismatch.
    """
    if not tokens:
        return
    for place in replaced:
        raise AdapterInvalid(
            f"adapter_config.json: {KEY} beside a copy of {place.path[:160]!r} that differs from "
            "the base's own: it would change what comes before the invocation"
        )
    for place in places:
        if place.role not in _PLACES:
            raise AdapterInvalid(
                f"adapter_config.json: {KEY} beside {place.path[:160]!r}, which is no linear: "
                "PEFT activates linears alone"
            )
    vocabulary = _vocabulary(base)
    if vocabulary is not None and max(tokens) >= vocabulary:
        raise AdapterMismatch(
            f"{KEY} names token {shown(max(tokens))}, the base has {vocabulary}: another base"
        )


def require_everywhere(specs: Iterable[AdapterSpec]) -> None:
    """Raises BlendInvalid for an adapter that applies to a part of a prompt: no weights hold it."""
    for spec in specs:
        if spec.invocation:
            raise BlendInvalid(
                f"adapter version {spec.version[:12]} is an activated LoRA ({KEY}): it applies "
                "from a place in each prompt on, which no weights can; serve it as an adapter"
            )


def _vocabulary(base: BaseSpec) -> int | None:
    """Rows of the base's table of tokens; None where it is not known."""
    sizes = {linear.role: linear for linear in base.linears}
    if "embedding" in sizes:
        return sizes["embedding"].in_features
    return sizes["head"].out_features if "head" in sizes else None
