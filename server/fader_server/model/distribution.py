"""What a sampler computes over whole rows of logits: the largest, draws, logprobs; by tensors on
any device, or by native kernels on a CPU. Knows no requests.

A row's result depends on its own logits and numbers only, bit for bit: sums are integers (mass.py),
draws are the maximum of what is elementwise (gumbel.py), and so is all else.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fader_adapters.kernels import native
from fader_server.model import gumbel
from fader_server.model.mass import Limits, Search, edges, likeliest, log_total, masses, truncates
from fader_server.model.passage import to_device

_CHUNK_ELEMENTS = 2**22
"""Logits that tensors are scored of at a time: about 100 MB of temporaries."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How the tokens of rows are drawn, on the host. Arrays [R]."""

    heat: np.ndarray
    """float32, above 0."""
    limits: Limits
    key: np.ndarray
    """int64: what each token's noise is of (see gumbel.py)."""


class Distributions(Protocol):
    """Over logits [M, V] of any float dtype, untouched; `rows` [R] int64 are on their device."""

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Maximum and its lowest index, [M] each; no finite maximum where a row holds NaN."""
        ...

    def draw(self, logits: Tensor, rows: Tensor, draws: Draws) -> Tensor:
        """A token of each of these rows, [R]; any one where the row's maximum is not finite."""
        ...

    def score(self, logits: Tensor, rows: Tensor, tokens: Tensor, top_n: int) -> Tensor:
        """[R, 1 + 2n] float64, n = min(top_n, V): logprobs of tokens [R], ids of the n likeliest,
        equal ones by lowest id, and their logprobs. NaN in rows whose maximum is not finite."""
        ...


class TorchDistributions:
    """By tensors, on any device, without waiting for it."""

    search: Search | None = None
    """How the end of a nucleus is found; None: by sorting."""

    def winners(self, x: Tensor, heat: Tensor, keys: Tensor) -> Tensor:
        """As gumbel.winners."""
        return gumbel.winners(x, heat, keys)

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.device.type != "cpu" or logits.dtype != torch.float32:
            best, tokens = logits.max(-1)
            return best, tokens
        tokens = torch.from_numpy(logits.numpy().argmax(-1))  # numpy's is vectorised, not torch's
        return logits.gather(1, tokens.unsqueeze(1)).squeeze(1), tokens

    def draw(self, logits: Tensor, rows: Tensor, draws: Draws) -> Tensor:
        x = logits.index_select(0, rows).float()
        x.sub_(x.amax(-1, keepdim=True))
        heat = uploaded(draws.heat, x)[:, None]
        cut = truncates(draws.limits, x.shape[1]).nonzero()[0]
        if cut.size:
            index = uploaded(cut, x)
            kept = x.index_select(0, index)
            mass = masses(kept / heat.index_select(0, index))
            kept.masked_fill_(mass < edges(mass, draws.limits.of(cut), self.search), -torch.inf)
            x.index_copy_(0, index, kept)
        return self.winners(x, heat, uploaded(draws.key, x))

    def score(self, logits: Tensor, rows: Tensor, tokens: Tensor, top_n: int) -> Tensor:
        size = max(1, _CHUNK_ELEMENTS // logits.shape[1])
        parts = [
            _score(logits.index_select(0, some).float(), own, top_n)
            for some, own in zip(rows.split(size), tokens.split(size), strict=True)
        ]
        return torch.cat(parts)


def _score(x: Tensor, tokens: Tensor, top_n: int) -> Tensor:
    """As Distributions.score, of x [R, V] float32; ids below 2^53 survive float64."""
    best = x.amax(-1, keepdim=True)
    total = log_total(masses(x - best))[:, None]
    ids = likeliest(x, top_n) if top_n else tokens.new_empty((len(x), 0))
    values = (x.gather(-1, torch.cat([tokens[:, None], ids], -1)) - best).double() - total
    values = values.masked_fill(~best.isfinite(), torch.nan)
    return torch.cat([values[:, :1], ids.double(), values[:, 1:]], dim=-1)


class NativeDistributions:
    """By native kernels, a row a thread. One engine's: they share scratch."""

    def __init__(self) -> None:
        self._scratch = native.Workspace()

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return native.largest(_readable(logits), scratch=self._scratch)

    def draw(self, logits: Tensor, rows: Tensor, draws: Draws) -> Tensor:
        limits = draws.limits
        arrays = (draws.heat, limits.top_k, limits.top_p, limits.min_p, draws.key)
        given = native.Draws(*map(torch.from_numpy, arrays))
        return native.draw(_readable(logits), given, scratch=self._scratch, rows=rows)

    def score(self, logits: Tensor, rows: Tensor, tokens: Tensor, top_n: int) -> Tensor:
        return native.score(_readable(logits), tokens, top_n, scratch=self._scratch, rows=rows)


def _readable(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype == torch.float16 else logits


def uploaded(values: np.ndarray | list[int], like: Tensor) -> Tensor:
    """Where `like` lies, in order on its current stream."""
    return to_device(np.ascontiguousarray(values), like.device)
