"""A blend to one adapter: side by side where the rank allows, else SVD of the low-rank product."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fader_adapters.errors import AdapterError, AdapterInvalid, AdapterMismatch, DeltaEmpty
from fader_adapters.header import read_header
from fader_adapters.limits import Limits
from fader_adapters.lora_config import read_config
from fader_adapters.source import RawAdapter
from fader_adapters.spec import BaseSpec, Digest, LinearSpec, layer_of
from fader_adapters.tensor_names import sort_tensors
from fader_adapters.weightspace import svd
from fader_adapters.weightspace.peft_files import (
    SiteResult,
    check_rank,
    check_target,
    overall,
    write_adapter,
)
from fader_adapters.weightspace.progress import Progress, silent
from fader_adapters.weightspace.terms import Ingredient, Mixture, mix, read_raw

REPORT_FILE = "compress_report.json"


_NO_LINEAR = {"embedding": "is an adapted embedding", "experts": "are adapted experts"}
_OF_THE_BASE = {
    "dora": "use_dora = true scales rows of the base",
    "trainable_tokens": "trainable_token_indices replaces rows of the base",
    "modules_to_save": "modules_to_save replaces whole weights of the base",
}
"""What no sum of low-rank products says, however much is known of the base."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A finished compression."""

    directory: Path
    report: dict[str, Any]
    """What is in compress_report.json."""


def compress(
    blend: Sequence[Ingredient],
    out: Path,
    *,
    rank: int,
    base: BaseSpec | None = None,
    progress: Progress = silent,
) -> Compressed:
    """Write one adapter of at most `rank` a linear that does what the blend does, or nearly.

    base  what the adapters must fit; None: each other
    A linear whose ranks sum to at most `rank` is exact (up to fp32); elsewhere the error is the
    tail of the product's singular values. ΔW is never formed. Raises AdapterError, OSError.
    """
    check_rank(rank)
    check_target(out)
    raws = read_raw(blend)
    for raw in raws:
        with _told_of(raw):
            _check_kinds(raw)
    known = base
    spec = base or _common_base(raws)
    mixture = mix(raws, [item.gamma for item in blend], spec)
    touched = mixture.linears()
    if mixture.biased():
        path = spec.linears[mixture.biased()[0]].path
        raise AdapterInvalid(f"{path!r} has lora_bias, expected adapters of weights alone")
    for index in touched:
        told = _NO_LINEAR.get(spec.linears[index].role)
        if told:
            raise AdapterInvalid(f"{spec.linears[index].path!r} {told}, expected linears alone")
    sites: list[SiteResult] = []
    for count, index in enumerate(touched):
        progress("compressing", count, len(touched))
        site = _site(mixture, spec, index, rank)
        if site is not None:
            sites.append(site)
    progress("compressing", len(touched), len(touched))
    if not sites:
        raise DeltaEmpty("the adapters cancel each other everywhere: nothing is left to write")
    report = {
        "blend": mixture.facts(),
        "digest": mixture.blend.digest,
        "rank": rank,
        "overall": overall(sites),
        "linears": [site.document() for site in sites],
    }
    adapted = {site.path for site in sites}
    others = [item.path for item in spec.linears if item.path not in adapted]
    configs = [json.loads(raw.config) for raw in raws]
    write_adapter(
        out,
        sites,
        others=None if known is None else others,
        base_name=_agreed([config.get("base_model_name_or_path") for config in configs]),
        fan_in_fan_out=bool(_agreed([config.get("fan_in_fan_out") for config in configs])),
        report=(REPORT_FILE, report),
    )
    return Compressed(out, report)


def _site(mixture: Mixture, spec: BaseSpec, index: int, rank: int) -> SiteResult | None:
    total = mixture.sum(index)
    if total is None:
        return None
    path = spec.linears[index].path
    if total.rank <= rank:
        return SiteResult(path, total.a, total.b.contiguous(), total.norm, 0.0, "concatenated")
    low = svd.truncate_product(total.b, total.a, rank)
    return SiteResult(path, low.a, low.b, low.norm, low.error, "svd", low.singular)


@contextmanager
def _told_of(raw: RawAdapter) -> Iterator[None]:
    """An error inside says whose it is."""
    try:
        yield
    except AdapterError as error:
        error.args = (f"{raw.origin}: {error}",)
        raise


def _check_kinds(raw: RawAdapter) -> None:
    """Raises AdapterInvalid for an adapter that does something with the base's own weights."""
    for kind in read_config(raw.config, Limits()).kinds:
        if kind in _OF_THE_BASE:
            raise AdapterInvalid(
                f"adapter_config.json: {_OF_THE_BASE[kind]}, which one low-rank adapter cannot; "
                "expected plain LoRA, or merge the blend into its base instead"
            )


def _common_base(raws: Sequence[RawAdapter]) -> BaseSpec:
    """The linears that the adapters' own tensors speak of. Raises AdapterError."""
    shapes: dict[str, tuple[int, int]] = {}
    embeddings: set[str] = set()
    for raw in raws:
        with _told_of(raw):
            if read_config(raw.config, Limits()).targets.parameters:
                raise AdapterInvalid("it adapts parameters of experts, expected linears alone")
            modules = sort_tensors(read_header(raw.weights, Limits())).modules
        embeddings |= {path for path, tensors in modules.items() if tensors.embedding}
        for path, tensors in modules.items():
            shape = (tensors.a.shape[-1], tensors.b.shape[0])
            if shapes.setdefault(path, shape) != shape:
                raise AdapterMismatch(
                    f"{raw.origin}: {path!r} maps {shape[0]} to {shape[1]} features, in another "
                    f"adapter {shapes[path][0]} to {shapes[path][1]}: made for different bases"
                )
    _check_one_tree(shapes)
    linears = tuple(
        LinearSpec(
            path, *shape, layer_of(path), role="embedding" if path in embeddings else "linear"
        )
        for path, shape in sorted(shapes.items(), key=_order)
    )
    return BaseSpec(linears, Digest("0" * 64), "unknown")


def _check_one_tree(paths: dict[str, tuple[int, int]]) -> None:
    """Adapters of one base that were saved under different wrappers must not stand side by side."""
    ends: dict[str, str] = {}
    for path in paths:
        match = re.search(r"(?:^|\.)([a-z_]+\.\d+\..+)$", path)
        end = match[1] if match else path
        if ends.setdefault(end, path) != path:
            raise AdapterMismatch(
                f"{path!r} and {ends[end]!r} look like one linear under two names; "
                "name the model with --base"
            )


def _order(item: tuple[str, tuple[int, int]]) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", item[0])]


def _agreed(values: Sequence[Any]) -> Any:  # noqa: ANN401 - of somebody's JSON
    return values[0] if all(value == values[0] for value in values) else None
