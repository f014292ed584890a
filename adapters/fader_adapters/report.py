"""What was found in an adapter's files, for people and health reports. Plain facts."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One adapted linear."""

    path: str
    """In the base."""
    rank: int
    alpha: float
    scale: float
    delta_norm: float
    """Frobenius norm of what is added to W: scale · B·A, for DoRA all of it."""


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What was found in an adapter's files."""

    modules: tuple[ModuleReport, ...]
    """In base order."""
    total: int
    """Linears of the base."""
    peft_type: str
    rslora: bool
    source_dtypes: tuple[str, ...]
    """As safetensors spells them, sorted."""
    base_name: str | None
    """What the adapter says it was trained on."""
    kinds: tuple[str, ...] = ()
    """What it has beside A and B: "dora", "lora_bias"."""

    @property
    def matched(self) -> int:
        return len(self.modules)

    @property
    def targets(self) -> tuple[str, ...]:
        """Last path components, sorted."""
        return tuple(sorted({module.path.rpartition(".")[2] for module in self.modules}))

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({module.rank for module in self.modules}))

    @property
    def alphas(self) -> tuple[float, ...]:
        return tuple(sorted({module.alpha for module in self.modules}))

    @property
    def scales(self) -> tuple[float, ...]:
        return tuple(sorted({module.scale for module in self.modules}))

    @property
    def delta_norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.hypot(*(module.delta_norm for module in self.modules))
