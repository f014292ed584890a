"""Low-rank factors as an adapter directory that PEFT and Fader load. Knows PEFT's format."""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fader_adapters.errors import AdapterTooLarge, BlendInvalid, DeltaEmpty, TargetTaken
from fader_adapters.limits import Limits
from fader_adapters.source import CONFIG_FILE, WEIGHTS_FILE
from fader_adapters.weightspace import disk

_NUMBER = re.compile(r"\.\d+(?:\.|$)", re.ASCII)
"""Where a path enters a stack of layers."""


@dataclass(frozen=True, slots=True)
class SiteResult:
    """One linear of the adapter, its delta B·A exactly (scale 1)."""

    path: str
    a: torch.Tensor
    """[rank, in]"""
    b: torch.Tensor
    """[out, rank]"""
    norm: float
    """‖Δ‖ of what was to be kept."""
    error: float
    """‖Δ − B·A‖."""
    method: str
    singular: tuple[float, ...] = ()
    """The singular values that were kept, where there was a decomposition."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def document(self) -> dict[str, Any]:
        """For reports."""
        return {
            "path": self.path,
            "rank": self.rank,
            "method": self.method,
            "delta_norm": self.norm,
            "error_norm": self.error,
            "relative_error": self.error / self.norm,
            "singular_values": list(self.singular),
        }


def check_rank(rank: int) -> None:
    """Raises BlendInvalid below 1, AdapterTooLarge above what Fader serves."""
    if rank < 1:
        raise BlendInvalid(f"the rank is {rank}, expected at least 1")
    if rank > Limits().rank:
        raise AdapterTooLarge(f"the rank is {rank}, Fader serves at most {Limits().rank}")


def check_target(out: Path) -> None:
    """Raises TargetTaken unless `out` is new, or holds at most what a killed run began."""
    if not out.exists():
        return
    if not out.is_dir() or any(not entry.name.endswith(disk.PART) for entry in out.iterdir()):
        raise TargetTaken(f"{out} is not an empty directory; name a new one")


def overall(sites: Sequence[SiteResult]) -> dict[str, Any]:
    """All linears together."""
    norm = math.hypot(*(site.norm for site in sites))
    error = math.hypot(*(site.error for site in sites))
    return {
        "linears": len(sites),
        "delta_norm": norm,
        "error_norm": error,
        "relative_error": error / norm,
    }


def write_adapter(
    out: Path,
    sites: Sequence[SiteResult],
    *,
    others: Collection[str] | None,
    base_name: str | None,
    fan_in_fan_out: bool,
    report: tuple[str, dict[str, Any]],
) -> None:
    """Write weights, report and, last, the configuration. Raises DeltaEmpty, TargetTaken.

    others  paths of the base's linears that the adapter leaves alone; None: not known
    report  file name and content
    """
    if not sites:
        raise DeltaEmpty("no linear has a delta: the adapter would answer as the base does")
    with disk.sole_writer(out):
        check_target(out)
        names = {
            f"base_model.model.{site.path}.lora_{factor}.weight": matrix
            for site in sites
            for factor, matrix in (("A", site.a), ("B", site.b))
        }
        writer = disk.ShardWriter(out / WEIGHTS_FILE, list(names))
        try:
            for name, matrix in names.items():
                writer.add(name, [matrix], dtype=matrix.dtype, shape=tuple(matrix.shape))
            writer.finish()
        finally:
            writer.close()
        disk.write_json(out / report[0], report[1])
        config = _config(sites, others, base_name=base_name, fan_in_fan_out=fan_in_fan_out)
        disk.write_json(out / CONFIG_FILE, config)


def _config(
    sites: Sequence[SiteResult],
    others: Collection[str] | None,
    *,
    base_name: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    ranks = [site.rank for site in sites]
    usual = max(set(ranks), key=lambda rank: (ranks.count(rank), rank))
    # Factors come with scale 1: α = r, everywhere.
    unusual = {site.path: site.rank for site in sites if site.rank != usual}
    return {
        "alpha_pattern": unusual,
        "auto_mapping": None,
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": usual,
        "rank_pattern": unusual,
        "target_modules": _targets([site.path for site in sites], others),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(paths: list[str], others: Collection[str] | None) -> list[str]:
    """Last names where they say exactly `paths`, else the paths themselves.

    Towers beside the text decoder may have what is no linear under a last name of theirs.
    """
    names = sorted({path.rpartition(".")[2] for path in paths})
    stacks = {parts[0] for path in paths if len(parts := _NUMBER.split(path, maxsplit=1)) > 1}
    shared = {path.rpartition(".")[2] for path in others or ()} & set(names)
    if others is None or shared or len(stacks) > 1:
        return sorted(paths)
    return names
