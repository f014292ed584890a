"""Which tokens of a step went to which experts. Integers; no weights, no adapters."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False, slots=True)
class Routing:
    """Pairs of a token and one of its experts, sorted by expert; of one expert in token order."""

    order: torch.Tensor
    """[pairs] int64: places in the router's choice [tokens, k], flattened."""
    token: torch.Tensor
    """[pairs] int64"""
    expert: torch.Tensor
    """[pairs] int64, ascending."""
    ends: torch.Tensor
    """[experts] int32: where each expert's pairs end."""
    experts: int
    chosen: int
    """Experts of a token: k."""

    @staticmethod
    def of(chosen: torch.Tensor, experts: int) -> "Routing":
        """chosen [tokens, k] int64: the router's choice."""
        expert, order = torch.sort(chosen.reshape(-1), stable=True)
        every = torch.arange(experts, device=chosen.device)
        ends = torch.searchsorted(expert, every, right=True).to(torch.int32)
        count = chosen.shape[1]
        return Routing(order, order // count, expert, ends, experts, count)
