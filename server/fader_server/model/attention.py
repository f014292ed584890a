"""The attention function transformers' models call: writes the paged cache, reads it back.

Knows one packed step and its block tables; knows nothing of requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from fader_server.errors import ModelUnsupported
from fader_server.model.batch import Batch
from fader_server.model.kv_cache import KVCache, LayerCache, LayerShape

NAME = "fader_paged"
"""The implementation's name in transformers' registry."""

REHEARSAL = "fader_rehearsal"
"""The same function; masks are made, and say which window the model means a layer to have."""

IGNORED = frozenset(
    {
        "dropout",
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "cache_position",
        "is_causal",
        "position_embeddings",
        "layer_idx",
        "num_items_in_batch",
        "cache",
        "past_key_values",
        "deterministic",
        "logits_to_keep",
        "target_dtype",
    }
)
"""Keywords that models pass along and that change nothing here."""


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """How one layer attends: scores = q·k·scale, softcap·tanh(scores/softcap), causal window, and
    each head's sink. Equal where the sinks are one tensor: a layer's parameter."""

    scale: float
    window: int | None
    """Keys a query sees, itself included; None: all."""
    softcap: float | None
    sinks: torch.Tensor | None = None
    """[heads], of any floating dtype: a score that takes its part of the softmax, of no value."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionParams):
            return NotImplemented
        ours, theirs = ((p.scale, p.window, p.softcap) for p in (self, other))
        return ours == theirs and self.sinks is other.sinks

    def weights(self, products: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Of the values, in the dtype of `products` (q·k, [1 or rows, heads, queries, keys], where
        heads may be of two dimensions).

        distance: query position − key position, broadcast against them; negative: the future.
        """
        scores = products * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        allowed = distance >= 0
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        scores = scores.masked_fill(~allowed, float("-inf"))
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        sinks = self.sinks.to(scores.dtype).view(*scores.shape[1:-2], 1, 1)
        every = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        return torch.softmax(every, dim=-1)[..., :-1]


class PagedAttention(Protocol):
    """Attention over a paged cache on one kind of device."""

    def prepare(self, batch: Batch) -> object:
        """Metadata of one step, shared by its layers."""
        ...

    def write(
        self, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor
    ) -> None:
        """Store k and v [T, kv_heads, d] at their places; the tokens may be strided."""
        ...

    def attend(
        self, q: torch.Tensor, cache: LayerCache, params: AttentionParams, step: object
    ) -> torch.Tensor:
        """q [T, heads, head_dim] → [T, heads, value_dim]; a query sees the keys of its own row up
        to its own position. Never reads past a row's context; a row's bits depend on it alone.
        """
        ...


class StepAttention:
    """One step's attention, handed to every layer through the forward's keywords."""

    def __init__(self, backend: PagedAttention, cache: KVCache, batch: Batch) -> None:
        self._backend = backend
        self._cache = cache
        self._batch = batch
        self._step = backend.prepare(batch)

    def run(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        params: AttentionParams,
    ) -> torch.Tensor:
        """q [1, heads, T, d], k and v [1, kv_heads, T, d] → [1, T, heads, d]."""
        layer = self._cache[module]
        queries, keys, values = (given[0].transpose(0, 1) for given in (q, k, v))
        self._backend.write(keys, values, layer, self._batch.slots)
        return self._backend.attend(queries, layer, params, self._step).unsqueeze(0)


class Probe:
    """Stands in for a step while a base is checked: records every layer, attends densely."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        """`lengths`: tokens of the sequences that are packed one behind the other."""
        self.shapes: dict[nn.Module, LayerShape] = {}
        self.lengths = lengths

    def run(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        params: AttentionParams,
    ) -> torch.Tensor:
        if module in self.shapes:
            raise ModelUnsupported(f"{type(module).__name__} attends twice in one forward")
        if not getattr(module, "is_causal", True):
            raise ModelUnsupported(f"{type(module).__name__} is not causal")
        self.shapes[module] = LayerShape(k.shape[1], k.shape[3], v.shape[3])
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        qs, ks, vs = (torch.split(x.float(), list(self.lengths), dim=2) for x in (q, k, v))
        parts = zip(qs, ks, vs, strict=True)
        out = torch.cat([_attend(*part, params) for part in parts], dim=2)
        return out.to(q.dtype).transpose(1, 2).contiguous()


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: AttentionParams
) -> torch.Tensor:
    """One short sequence, [1, heads, n, d] each, in fp32."""
    place = torch.arange(q.shape[2], device=q.device)
    return params.weights(q @ k.transpose(-1, -2), place[:, None] - place) @ v


def fader_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    fader_step: StepAttention | Probe | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; the step arrives as the keyword `fader_step`.

    Raises ModelUnsupported for a keyword that would change the mathematics and is not known here,
    and in a rehearsal for a mask that is not the window that is told.
    """
    if fader_step is None:
        raise ModelUnsupported(f"{type(module).__name__} does not pass keywords to its attention")
    unknown = [
        name
        for name, given in others.items()
        if given is not None and given is not False and name not in IGNORED
    ]
    if isinstance(fader_step, Probe) and attention_mask is not None:
        _check_claim(module, attention_mask, sliding_window)
    elif attention_mask is not None:
        unknown.append("a mask of its own")
    if s_aux is not None and s_aux.shape != query.shape[1:2]:
        unknown.append(f"sinks of shape {list(s_aux.shape)}")
    if unknown:
        raise ModelUnsupported(
            f"{type(module).__name__} attends with {', '.join(unknown)}, unknown to Fader"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    params = AttentionParams(float(scale), sliding_window or None, softcap, s_aux)
    return fader_step.run(module, query, key, value, params), None


def _claim(*, local_size: int | None = None, use_vmap: bool = False, **_: object) -> torch.Tensor:
    """What a model asks of transformers' masks: the window, 0 for none, -1 for others.

    [1, 1, 1, 1], so that models may slice it.
    """
    return torch.full((1, 1, 1, 1), -1 if use_vmap else local_size or 0)


def _check_claim(module: nn.Module, claim: torch.Tensor, window: int | None) -> None:
    if claim.numel() != 1 or int(claim) < 0:
        raise ModelUnsupported(f"{type(module).__name__} attends with a mask of its own")
    if int(claim) != (window or 0):
        raise ModelUnsupported(
            f"{type(module).__name__} masks all but {int(claim) or 'no'} keys and tells its "
            f"attention a window of {window}; Fader goes by what the attention is told"
        )


def register() -> None:
    """Make the function known to transformers; no mask is built for it but in a rehearsal."""
    function: Callable[..., tuple[torch.Tensor, None]] = fader_attention
    AttentionInterface.register(NAME, function)
    AttentionInterface.register(REHEARSAL, function)
    AttentionMaskInterface.register(REHEARSAL, _claim)
