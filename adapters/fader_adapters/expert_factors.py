"""The matrices of a stack of experts, from the tensors of one parameter or of the experts' modules.

Knows tensors of one stack at a time; no files, names or configs.
"""

from collections.abc import Sequence

import torch

from fader_adapters.factors import Factors, Linear, Part, product_norm, side_by_side


def of_stack(
    a: torch.Tensor,
    b: torch.Tensor,
    experts: int,
    scale: float,
    dtype: torch.dtype,
    *,
    turned: bool = False,
) -> Linear:
    """From PEFT's tensors of one parameter, cast to `dtype`.

    a  [experts · rank, in]   expert by expert
    b  [out, rank · experts]  rank by rank, each of all experts
    turned  a has the width of the output and b the rows of the input
    """
    rank = a.shape[0] // experts
    first = a.to(dtype).view(experts, rank, -1)
    second = b.to(dtype).view(-1, rank, experts).permute(2, 1, 0)
    return _linear(second, first, scale) if turned else _linear(first, second, scale)


def of_experts(
    parts: Sequence[Sequence[Part]], shape: tuple[int, int], dtype: torch.dtype
) -> Linear:
    """From what each expert's modules add, cast to `dtype`. shape: (out, in) of one expert.

    Experts of a smaller rank get rows of 0, those without a module nothing else.
    """
    out, width = shape
    scales = {part.scale for own in parts for part in own}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(sum(part.a.shape[0] for part in own) for own in parts)
    a = torch.zeros(len(parts), rank, width, dtype=dtype)
    bt = torch.zeros(len(parts), rank, out, dtype=dtype)
    for expert, own in enumerate(parts):
        if own:
            whole = side_by_side(own, out)
            used = whole.a.shape[0]
            a[expert, :used] = whole.a.to(dtype)
            bt[expert, :used] = (whole.b * (whole.scale / scale)).to(dtype).t()
    return _linear(a, bt, scale)


def _linear(a: torch.Tensor, bt: torch.Tensor, scale: float) -> Linear:
    factors = Factors(a.contiguous(), bt.contiguous())
    return Linear(factors, scale, scale * product_norm(factors.a, factors.bt))
