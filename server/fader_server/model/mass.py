"""Distributions as exact integers, so that no order of summation and no neighbour can show.

A token's mass is exp(x - max x) in units of 2^-44. Integer sums are associative: totals and edges
are the same bits on any device, thread count or batch. Knows nothing of requests.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fader_server.model.passage import to_device

ONE = 2**44
"""Mass of the likeliest token; one 2^-44 as likely weighs nothing. V < 2^19 never overflows."""

_HEAD = 512
"""Tokens looked at before a CPU sorts a whole vocabulary: a full sort costs ten times as much."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Truncation of each row, on the host. Arrays [R]."""

    top_k: np.ndarray
    """int64; 0 or at least V keeps every token."""
    top_p: np.ndarray
    """float64 in [0, 1]."""
    min_p: np.ndarray
    """float64 in [0, 1]."""

    def of(self, rows: np.ndarray) -> "Limits":
        """Those of some rows."""
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def truncates(limits: Limits, vocab: int) -> np.ndarray:
    """Whether some tokens of a row of `vocab` may not be drawn, [R] bool."""
    bounded = (limits.top_k > 0) & (limits.top_k < vocab)
    return bounded | (limits.top_p < 1.0) | (limits.min_p > 0.0)


def masses(shifted: Tensor) -> Tensor:
    """floor(ONE · exp(shifted)). shifted: [R, V] float32, each row's maximum 0; overwritten."""
    assert shifted.shape[-1] < 2**19
    return shifted.exp_().mul_(ONE).long()


def log_total(mass: Tensor) -> Tensor:
    """Log of the sum of exp(x - max x) per row. mass: [R, V] int64. Returns [R] float64, ≥ 0."""
    return (mass.sum(-1).double() / ONE).log()


Search = Callable[[Tensor, Tensor], Tensor]
"""The largest e of each row of masses [R, V] int64 for which what weighs at least e weighs at least
need [R] int64 together; [R] int64."""


def edges(mass: Tensor, limits: Limits, search: Search | None = None) -> Tensor:
    """The least mass each row keeps under top-k, then top-p of what is left, then min-p.

    mass: [R, V] int64, adjacent. search: how the end of a nucleus is found that no top-k bounds;
    None: by sorting. Returns [R, 1] int64, at least 1. Tokens tied at an edge all stay, as in
    transformers' top-k; transformers' top-p drops some of the tied by sort order.
    """
    vocab = mass.shape[-1]
    least = _column(limits.min_p * ONE, mass).ceil().long().clamp_(min=1)
    bounded = (limits.top_k > 0) & (limits.top_k < vocab)
    nucleus = limits.top_p < 1.0
    if not (bounded.any() or nucleus.any()):
        return least
    widest = int(limits.top_k[bounded].max()) if bounded.any() else 1
    if search is not None and (nucleus & ~bounded).any():
        return torch.maximum(_searched_edges(mass, limits, widest, search), least)
    if mass.device.type == "cpu":
        head = min(vocab, max(widest, _HEAD))
    else:  # under a top-k the nucleus lies among what that leaves
        head = vocab if (nucleus & ~bounded).any() else widest
    edge, covered = _sorted_edges(mass, limits, head)
    # Only a CPU takes the short head for a nucleus, and there asking costs no synchronisation.
    if head < vocab and nucleus.any() and not bool(covered.all()):
        rest = (~covered).nonzero()[:, 0]
        at = rest.numpy()
        edge[rest] = _sorted_edges(mass[rest], limits.of(at), vocab)[0]
    return torch.maximum(edge, least)


def _sorted_edges(mass: Tensor, limits: Limits, head: int) -> tuple[Tensor, Tensor]:
    """Edges [R, 1] from the `head` largest masses, and whether they sufficed [R]."""
    vocab = mass.shape[-1]
    values = mass.topk(head).values if head < vocab else _descending(mass)  # [R, head]
    edge_k, _, need = _wanted(mass, limits, values)
    reached = (values.cumsum(-1) < need).sum(-1, keepdim=True)  # index of the token that reaches it
    whole = _column(limits.top_p >= 1.0, mass)
    edge_p = torch.where(whole, 1, values.gather(-1, reached.clamp(max=head - 1)))
    return torch.maximum(edge_k, edge_p), (whole | (reached < head))[:, 0]


def _searched_edges(mass: Tensor, limits: Limits, widest: int, search: Search) -> Tensor:
    """The same [R, 1], of the `widest` largest masses and a search through all."""
    edge_k, kept, need = _wanted(mass, limits, mass.topk(widest).values)
    edge_p = search(kept, need[:, 0].clamp(min=1))[:, None]
    whole = _column(limits.top_p >= 1.0, mass)
    return torch.maximum(edge_k, torch.where(whole, 1, edge_p))


def _wanted(mass: Tensor, limits: Limits, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By the largest masses [R, n]: the edge of top-k [R, 1], the masses it keeps, others being 0,
    and how much of them top-p wants together [R, 1]."""
    unbounded = (limits.top_k <= 0) | (limits.top_k >= mass.shape[-1])
    last = _column(np.where(unbounded, 1, limits.top_k) - 1, mass)
    edge_k = torch.where(_column(unbounded, mass), 1, values.gather(-1, last))
    kept = mass if unbounded.all() else mass.masked_fill(mass < edge_k, 0)
    total = kept.sum(-1, keepdim=True)
    return edge_k, kept, (_column(limits.top_p, mass) * total.double()).ceil().long()


def _descending(mass: Tensor) -> Tensor:
    if mass.device.type == "cpu":  # NumPy sorts values alone, with SIMD: half the time of torch
        values = np.negative(mass.numpy())
        values.sort(axis=-1)
        return torch.from_numpy(np.negative(values, out=values))
    return mass.sort(dim=-1, descending=True).values


def likeliest(x: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of each row, equal values by lowest id. x: [R, V] float32.

    Keys are unique (value, then id), so that no top-k algorithm has a tie to break its own way.
    """
    vocab = x.shape[-1]
    bits = (x + 0.0).view(torch.int32)  # + 0.0: -0.0 and 0.0 are equal
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # sorts as the floats do
    key = ordered.long().bitwise_left_shift_(32)
    key += torch.arange(vocab - 1, -1, -1, device=x.device)
    best = key.topk(min(count, vocab)).values
    return vocab - 1 - (best & 0xFFFFFFFF)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return to_device(np.ascontiguousarray(values), like.device)[:, None]
