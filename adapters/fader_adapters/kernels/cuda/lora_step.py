"""What a delta launch is told: one site, one step on the device. Launches nothing."""

from dataclasses import dataclass

import torch

from fader_adapters.kernels.cuda.expert_configs import ExpertConfigs
from fader_adapters.kernels.cuda.lora_buffers import PhaseBuffers, StepBuffers
from fader_adapters.kernels.cuda.lora_tables import Phase, SiteConfigs

MAX_MEMBERS = 4
"""Linears of one site."""


@dataclass(frozen=True, slots=True)
class DeltaSite:
    """One site's shape and its launch configurations."""

    linear: int
    """Index of the first member; the others follow it."""
    in_features: int
    widths: tuple[int, ...]
    """Output columns of each member."""
    configs: SiteConfigs

    @property
    def out_features(self) -> int:
        return sum(self.widths)


@dataclass(frozen=True, slots=True)
class StackSite:
    """The shape of one expert of a stack, or a router's, and its launch configurations."""

    linear: int
    in_features: int
    out_features: int
    configs: ExpertConfigs


@dataclass(frozen=True, slots=True)
class PhaseLaunch:
    """What one piece of a phase launches: its buffers and the extent of its grids."""

    phase: Phase
    buffers: PhaseBuffers
    tiles: int
    cells: int


@dataclass(frozen=True, slots=True)
class LoraStep:
    """One step's delta metadata on the device, valid until the next `prepare`."""

    tokens: int
    bucket: int | None
    """Rows bucket of a step that may be captured or replayed: grids and addresses depend on it
    alone. None for a step with prefill rows, or with more rows or entries than the fixed room."""
    launches: tuple[PhaseLaunch, ...]
    buffers: StepBuffers
    arena: torch.Tensor
    vectors: bool = False
    """Whether a row may use an adapter with a gain or a bias: one launch more a phase."""
    covers: bool = False
    """Whether every row is of one token and has a lane: `join` may write them all."""
    stacks: bool = False
    """Whether a row may use an adapter that changes a stack of experts or a router."""
    prompt: int | None = None
    """Tokens bucket of a step of prompts that may be captured or replayed, as `bucket` is of one of
    decode rows."""
    turn: int = 0
    """Of the buffers, when they were filled for this step."""

    @property
    def valid(self) -> bool:
        """Whether the buffers still hold it."""
        return self.turn == self.buffers.turn
