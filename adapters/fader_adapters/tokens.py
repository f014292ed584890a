"""Trained token rows (PEFT's trainable_token_indices) as deltas: rows − W[tokens], one-hot.

Knows tables by rows and tokens by number; no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fader_adapters.config_keys import shown
from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.factors import Part
from fader_adapters.header import TensorInfo
from fader_adapters.limits import Limits
from fader_adapters.places import Place
from fader_adapters.spec import BaseSpec, BaseWeights
from fader_adapters.views import View

WANTS_TABLE = (
    "adapter_config.json: trainable_token_indices replaces rows of the base's own table, which is "
    "not at hand here; name the base"
)
"""Why trained rows cannot be read without a base's weights."""


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of one table that an adapter replaces."""

    place: Place
    info: TensorInfo
    """[tokens, width]"""
    tokens: tuple[int, ...]


def check_tokens(
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, tuple[int, ...]],
    view: View,
    base: BaseSpec,
    limits: Limits,
) -> tuple[TokenRows, ...]:
    """The tables whose rows are trained; of a tied base the output head's too, as PEFT does.

    config  trainable_token_indices by name; "" stands for the embedding, whatever it is called
    Raises AdapterInvalid, AdapterMismatch, AdapterTooLarge.
    """
    found: dict[str, TokenRows] = {}
    for name, tokens in config.items():
        path = next((path for path in tensors if _is(name, path, view)), None)
        place = None if path is None else view.place(path)
        if place is None and _tied_elsewhere(name, config, base):
            continue
        told = f"trainable_token_indices names {(name or 'the embedding')[:80]!r}"
        if path is None or place is None:
            raise AdapterInvalid(f"adapter_config.json: {told}, the file has no token rows for it")
        if place.role not in ("embedding", "head"):
            raise AdapterInvalid(
                f"adapter_config.json: {told}, which is neither the base's embedding nor its "
                "output head: only these have rows of tokens"
            )
        found[path] = _rows(place, tensors[path], tokens, limits)
    for path, info in tensors.items():
        if path not in found:
            raise AdapterInvalid(
                f"tensor {info.name[:160]!r}: trainable_token_indices does not name its module"
            )
    if base.tied and not any(rows.place.role == "head" for rows in found.values()):
        heads = [place for place in view.places.values() if place.role == "head"]
        tied = [
            TokenRows(head, rows.info, rows.tokens) for rows in found.values() for head in heads
        ]
        return (*found.values(), *tied)
    return tuple(found.values())


def as_part(rows: TokenRows, values: torch.Tensor, weights: BaseWeights | None) -> Part:
    """The delta of one table, given the trained rows [tokens, width]."""
    if weights is None:
        raise AdapterInvalid(WANTS_TABLE)
    (span,) = rows.place.spans
    index = torch.tensor(rows.tokens)
    change = values.float() - _own(rows.place, index, weights)
    one_hot = torch.zeros(len(index), rows.place.table[0])
    one_hot[torch.arange(len(index)), index] = 1.0
    if rows.place.role == "embedding":
        return Part(0, span.stop, one_hot, change.t(), 1.0)
    return Part(0, span.stop, change, one_hot.t(), 1.0)


def _is(name: str, path: str, view: View) -> bool:
    if name:
        return path == name or path.endswith(f".{name}")
    place = view.place(path)
    return place is not None and place.role == "embedding"


def _tied_elsewhere(name: str, config: Mapping[str, tuple[int, ...]], base: BaseSpec) -> bool:
    """Whether PEFT saves the rows of this table under the one it is tied to."""
    return base.tied and any(
        other != name and tokens == config[name] for other, tokens in config.items()
    )


def _rows(place: Place, info: TensorInfo, tokens: tuple[int, ...], limits: Limits) -> TokenRows:
    if len(tokens) > limits.rank:
        raise AdapterTooLarge(
            f"trainable_token_indices has {len(tokens)} tokens, the limit is {limits.rank}"
        )
    vocabulary, width = place.table
    if max(tokens) >= vocabulary:
        raise AdapterMismatch(
            f"trainable_token_indices names token {shown(max(tokens))}, the base has "
            f"{vocabulary}: another base"
        )
    if info.shape != (len(tokens), width):
        raise AdapterMismatch(
            f"tensor {info.name[:160]!r} has shape {info.shape}, expected ({len(tokens)}, {width})"
        )
    return TokenRows(place, info, tokens)


def _own(place: Place, index: torch.Tensor, weights: BaseWeights) -> torch.Tensor:
    """The base's rows of these tokens, [tokens, width] in fp32, on the host."""
    (span,) = place.spans
    if place.role == "embedding":
        panels = weights.panels(span.linear)
        return torch.cat([panel[:, index.to(panel.device)].cpu() for panel in panels]).t()
    own = torch.empty(len(index), place.in_features)
    at = 0
    for panel in weights.panels(span.linear):
        here = (index >= at) & (index < at + len(panel))
        own[here] = panel[(index[here] - at).to(panel.device)].cpu()
        at += len(panel)
    return own
