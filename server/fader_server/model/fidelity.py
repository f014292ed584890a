"""How far a merged lane's logits are from the unmerged blend's, on a text. Knows no requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fader_adapters.changes import Changes
from fader_adapters.lane import MergedLane
from fader_server.model.probe import ProbeModel
from fader_server.model.views import BaseView, BlendView, LaneView

CHUNK_LOGITS = 1 << 15
"""Compared at a time."""
LEAST_KL = 0.02
"""Nats; what differs by less is not worth a refusal."""
LOST_SHARE = 0.15
"""Of the divergence between base and blend; a lane that loses more is refused."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Averages over the positions of the probe text; divergences in nats."""

    tokens: int
    kl: float
    """KL(blend ‖ lane)"""
    top1: float
    """Share of positions where both find the same token likeliest."""
    base_kl: float
    """KL(blend ‖ base): what the blend does at all."""
    base_top1: float

    @property
    def lost(self) -> float:
        """Share of what the blend does that the lane does not do; 0 when it does nothing."""
        return self.kl / self.base_kl if self.base_kl else 0.0

    @property
    def too_lossy(self) -> str:
        """Why the lane should not stand for the blend; empty when it may."""
        if self.kl <= LEAST_KL or self.lost <= LOST_SHARE:
            return ""
        return (
            f"in 4 bits the lane is {self.kl:.3g} nats from the blend on the probe text, "
            f"{self.lost:.0%} of what the blend changes; the limit is {LOST_SHARE:.0%}. "
            "Merge as bf16, or force it"
        )

    def document(self) -> dict[str, float]:
        """For reports."""
        return {
            "tokens": self.tokens,
            "kl": self.kl,
            "top1": self.top1,
            "base_kl": self.base_kl,
            "base_top1": self.base_top1,
            "lost": self.lost,
        }


def measure(
    probe: ProbeModel, tokens: Sequence[int], changes: Changes, lane: MergedLane
) -> Fidelity:
    """Compare lane and base with the blend at every position of `tokens`, at least one."""
    sums = torch.zeros(4, dtype=torch.float64)
    views = [BlendView(changes, probe.device), LaneView(lane), BaseView()]
    for blend, *others in probe.logits(tokens, views):
        step = max(1, CHUNK_LOGITS // blend.shape[1])
        for start in range(0, len(blend), step):
            rows = slice(start, start + step)
            expected = torch.log_softmax(blend[rows], -1)
            best = expected.argmax(-1)
            for i, other in enumerate(others):
                given = torch.log_softmax(other[rows], -1)
                sums[2 * i] += F.kl_div(given, expected, reduction="sum", log_target=True).cpu()
                sums[2 * i + 1] += (given.argmax(-1) == best).sum().cpu()
                probe.pause()
    kl, top1, base_kl, base_top1 = (sums / len(tokens)).tolist()
    return Fidelity(len(tokens), max(kl, 0.0), top1, max(base_kl, 0.0), base_top1)
