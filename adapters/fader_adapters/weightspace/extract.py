"""A full fine-tune to an adapter: truncated SVD of W* − W, linear by linear. Runs no model."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fader_adapters.errors import AdapterError, AdapterMismatch, DeltaEmpty
from fader_adapters.spec import LinearSpec
from fader_adapters.targets import ALL_LINEAR, Targets
from fader_adapters.weightspace import differences, svd
from fader_adapters.weightspace.base import Base, open_base
from fader_adapters.weightspace.differences import Difference
from fader_adapters.weightspace.peft_files import (
    SiteResult,
    check_rank,
    check_target,
    overall,
    write_adapter,
)
from fader_adapters.weightspace.progress import Progress, silent

REPORT_FILE = "extract_report.json"


@dataclass(frozen=True, slots=True)
class Extracted:
    """A finished extraction."""

    directory: Path
    report: dict[str, Any]
    """What is in extract_report.json."""
    lost: tuple[Difference, ...]
    """What the fine-tune changed and no adapter of linears can carry, or was not selected."""


def extract(
    finetune: Path,
    base: Path,
    out: Path,
    *,
    rank: int,
    targets: Targets | None = None,
    base_name: str | None = None,
    progress: Progress = silent,
) -> Extracted:
    """Write the adapter of at most `rank` that is nearest to what `finetune` changed in `base`.

    finetune, base  model directories of one architecture, each unquantised or in NF4
    targets         linears to look at; None: all of them. Those that did not change are skipped
    base_name       what the adapter is to say it belongs to; None: the base's path
    Raises AdapterMismatch (models of other shapes), DeltaEmpty (no selected linear changed),
    TargetTaken, CheckpointInvalid, and OSError.
    """
    check_rank(rank)
    check_target(out)
    tuned, original = open_base(finetune), open_base(base)
    _check_same(tuned, original)
    chosen = _select(original, targets or Targets(ALL_LINEAR))
    sites: list[SiteResult] = []
    for count, linear in enumerate(chosen):
        progress("decomposing", count, len(chosen))
        site = _site(tuned, original, linear, rank)
        if site is not None:
            sites.append(site)
    progress("decomposing", len(chosen), len(chosen))
    lost = tuple(differences.find(tuned, original, carried={linear.path for linear in chosen}))
    if not sites:
        raise DeltaEmpty(
            f"{finetune} equals the base in {len(chosen)} of {len(chosen)} selected linears: there "
            "is nothing to extract" + (f"; it differs in {lost[0].name!r}" if lost else "")
        )
    report = {
        "finetune": str(finetune),
        "base": str(base),
        "rank": rank,
        "overall": overall(sites),
        "unchanged": len(chosen) - len(sites),
        "not_carried": [item.document() for item in lost],
        "linears": [site.document() for site in sites],
    }
    adapted = {site.path for site in sites}
    write_adapter(
        out,
        sites,
        others=[item.path for item in original.spec.linears if item.path not in adapted],
        base_name=base_name or str(base),
        fan_in_fan_out=all(original.spec.linears[i].conv1d for i in _indices(original, adapted)),
        report=(REPORT_FILE, report),
    )
    return Extracted(out, report, lost)


def _check_same(tuned: Base, original: Base) -> None:
    if tuned.spec.model_type != original.spec.model_type:
        raise AdapterMismatch(
            f"{tuned.directory} is a {tuned.spec.model_type}, the base {original.directory} a "
            f"{original.spec.model_type}: not a fine-tune of it"
        )
    theirs, ours = ({item.path: item for item in b.inside} for b in (tuned, original))
    for path in [*ours, *theirs]:
        if theirs.get(path) != ours.get(path):
            raise AdapterMismatch(
                f"{path!r} is {_shape(theirs.get(path))} in {tuned.directory} and "
                f"{_shape(ours.get(path))} in the base {original.directory}: not a fine-tune of it"
            )


def _shape(linear: LinearSpec | None) -> str:
    return "absent" if linear is None else f"{linear.in_features} → {linear.out_features}"


def _select(base: Base, targets: Targets) -> list[LinearSpec]:
    strangers = targets.unmatched(linear.path for linear in base.inside)
    if strangers:
        raise AdapterMismatch(
            f"no linear of {base.directory} is called {strangers[0]!r}; there are "
            + ", ".join(sorted({item.path.rpartition(".")[2] for item in base.inside}))
        )
    chosen = [linear for linear in base.inside if targets.select(linear.path)]
    if not chosen:
        raise DeltaEmpty("the selection leaves no linear to look at")
    return chosen


def _indices(base: Base, paths: set[str]) -> list[int]:
    return [base.spec.index_of[path] for path in paths]


def _site(tuned: Base, original: Base, linear: LinearSpec, rank: int) -> SiteResult | None:
    try:
        delta = tuned.dense(linear).sub_(original.dense(linear))
    except AdapterError as error:
        error.args = (f"{linear.path}: {error}",)
        raise
    if not bool(delta.any()):
        return None
    if not bool(delta.isfinite().all()):
        raise AdapterMismatch(f"{linear.path!r}: the difference has NaN or infinite values")
    low = svd.truncate(delta, rank, seed=zlib.crc32(linear.path.encode()))
    return SiteResult(linear.path, low.a, low.b, low.norm, low.error, "svd", low.singular)
