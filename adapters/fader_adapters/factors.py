"""The matrices of one adapted linear, put together from the modules that share it, DoRA folded in.

Knows tensors of one linear at a time; no files, names or configs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Part:
    """What one module adds to rows start..stop of a linear: scale · (B·(A·x) + bias)."""

    start: int
    stop: int
    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[stop − start, rank]"""
    scale: float
    magnitude: torch.Tensor | None = None
    """DoRA's [stop − start]: what the norms of the rows become."""
    bias: torch.Tensor | None = None
    """[stop − start]"""
    keeps: torch.Tensor | None = None
    """Booleans [stop − start]: rows that keep their norm beside a magnitude; None: no row."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A [rank, in] and Bᵀ [rank, out] of one linear, gain and bias [out]; all in one dtype. Of a
    stack of experts A and Bᵀ have their number as the first dimension, and there are no vectors."""

    a: torch.Tensor
    bt: torch.Tensor
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def named(self) -> Iterable[tuple[str, torch.Tensor]]:
        """By the names of the tensors they came from."""
        pairs = (
            ("lora_A", self.a),
            ("lora_B", self.bt),
            ("lora_magnitude_vector", self.gain),
            ("the bias of lora_B", self.bias),
        )
        return [(name, tensor) for name, tensor in pairs if tensor is not None]

    @property
    def idle(self) -> bool:
        """Whether nothing is changed by it."""
        product = bool(self.a.any()) and bool(self.bt.any())
        return not product and not any(
            bool(vector.any()) for vector in (self.gain, self.bias) if vector is not None
        )


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear's factors with the scale that multiplies B·A and bias, and its ‖ΔW‖."""

    factors: Factors
    scale: float
    norm: float

    @property
    def idle(self) -> bool:
        """Whether nothing is changed by it, be it for a product or a scale that vanishes."""
        bias = self.factors.bias
        vanishes = self.norm == 0.0 and (bias is None or self.scale == 0.0 or not bool(bias.any()))
        return vanishes or self.factors.idle


def put_together(
    parts: Sequence[Part],
    rows: int,
    dtype: torch.dtype,
    panels: Iterable[torch.Tensor] | None,
) -> Linear:
    """The factors of a linear of `rows` outputs, cast to `dtype`.

    panels  W in fp32 by rows, wanted when a part has a magnitude
    """
    if len(parts) == 1 and (parts[0].start, parts[0].stop) == (0, rows):
        whole = parts[0]
    else:
        whole = side_by_side(parts, rows)
    if whole.magnitude is None:
        a, bt = whole.a.to(dtype).contiguous(), whole.b.to(dtype).t().contiguous()
        factors = Factors(a, bt, None, None if whole.bias is None else whole.bias.to(dtype))
        return Linear(factors, whole.scale, whole.scale * product_norm(a, bt))
    assert panels is not None
    return _with_magnitude(whole, dtype, panels)


def product_norm(a: torch.Tensor, bt: torch.Tensor) -> float:
    """‖B·A‖ from two [rank, rank] Gram matrices, never the product itself; of all of a stack.

    Of the largest elements' size, so that squares of tiny weights do not vanish.
    """
    largest = [float(matrix.abs().max()) for matrix in (a, bt)]
    if not all(map(math.isfinite, largest)):
        return math.inf
    if not all(largest):
        return 0.0
    a, bt = a.float() / largest[0], bt.float() / largest[1]
    square = torch.sum((a @ a.mT) * (bt @ bt.mT), dtype=torch.float64).item()
    return largest[0] * largest[1] * math.sqrt(max(square, 0.0))


def side_by_side(parts: Sequence[Part], rows: int) -> Part:
    """One part over all rows: the ranks side by side, each B in its own rows, 0 elsewhere."""
    scales = {part.scale for part in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ranks = [part.a.shape[0] for part in parts]
    b = torch.zeros(rows, sum(ranks))
    bias = magnitude = keeps = None
    if any(part.bias is not None for part in parts):
        bias = torch.zeros(rows)
    if any(part.magnitude is not None for part in parts):
        magnitude, keeps = torch.zeros(rows), torch.ones(rows, dtype=torch.bool)
    at = 0
    for part, rank in zip(parts, ranks, strict=True):
        span = slice(part.start, part.stop)
        factor = part.scale / scale
        b[span, at : at + rank] = part.b.float() * factor
        if bias is not None and part.bias is not None:
            bias[span] = part.bias.float() * factor
        if magnitude is not None and keeps is not None and part.magnitude is not None:
            magnitude[span], keeps[span] = part.magnitude.float(), False
        at += rank
    a = torch.cat([part.a.float() for part in parts])
    return Part(0, rows, a, b, scale, magnitude, bias, keeps)


def _with_magnitude(part: Part, dtype: torch.dtype, panels: Iterable[torch.Tensor]) -> Linear:
    """B' = diag(g)·B and gain = g − 1 with g = magnitude / ‖W + scale·B·A‖ of each row."""
    assert part.magnitude is not None
    a, b, magnitude = part.a.float(), part.b.float(), part.magnitude.float()
    keeps = torch.zeros(len(magnitude), dtype=torch.bool) if part.keeps is None else part.keeps
    g = torch.ones(b.shape[0])
    square, at = 0.0, 0
    for panel in panels:  # on the base's device
        span = slice(at, at := at + panel.shape[0])
        a, b = a.to(panel.device), b.to(panel.device)
        changed = panel + (b[span] * part.scale) @ a
        norms = torch.linalg.vector_norm(changed, dim=1).cpu()
        g[span] = torch.where(keeps[span], 1.0, magnitude[span] / norms.clamp_min(_TINY))
        changed.mul_(g[span, None].to(panel.device)).sub_(panel)
        square += float(torch.sum(changed * changed, dtype=torch.float64))
    assert at == b.shape[0]
    a, b = a.cpu(), b.cpu()
    factors = Factors(
        a.to(dtype).contiguous(),
        (b * g[:, None]).to(dtype).t().contiguous(),
        (g - 1.0).to(dtype),
        None if part.bias is None else (part.bias.float() * g).to(dtype),
    )
    return Linear(factors, part.scale, math.sqrt(square) if math.isfinite(square) else math.inf)
