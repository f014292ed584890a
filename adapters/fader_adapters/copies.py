"""Tensors of an adapter that must be what is there already: the base's own weights, or the pair of
another module. Knows modules that were checked.
"""

import torch

from fader_adapters.dtypes import DTYPES
from fader_adapters.errors import AdapterInvalid, AdapterMismatch
from fader_adapters.header import TensorInfo
from fader_adapters.modules import Checked, Module
from fader_adapters.saved import ENDS
from fader_adapters.spec import BaseWeights
from fader_adapters.tensor_names import Named


def tensor_of(weights: bytes, info: TensorInfo) -> torch.Tensor:
    """One tensor of a safetensors buffer, in memory of its own."""
    private = bytearray(memoryview(weights)[info.start : info.end])
    return torch.frombuffer(private, dtype=DTYPES[info.dtype]).view(info.shape)


def check_copies(
    data: bytes,
    named: Named,
    checked: Checked,
    dtype: torch.dtype,
    weights: BaseWeights | None,
    *,
    trusted: bool,
) -> tuple[str, ...]:
    """Every copy of the base's linears, and the tied pair, is what it must be. Returns the names
    of copies that were not compared. Raises AdapterInvalid, AdapterMismatch."""
    copied = [
        (named.copies[m.path], m)
        for m in checked.modules
        if m.path in named.copies and m.place.role not in ENDS
    ]
    for info, module in copied:
        _check_copy(data, info, module, dtype, weights, trusted=trusted)
    if checked.tied is not None:
        _check_tied(data, *checked.tied)
    return tuple(info.name for info, _ in copied if weights is None)


def _check_copy(
    data: bytes,
    info: TensorInfo,
    module: Module,
    dtype: torch.dtype,
    weights: BaseWeights | None,
    *,
    trusted: bool,
) -> None:
    """A linear's weight that was saved beside the adapter must be the base's own, rounded."""
    remedy = "save with save_embedding_layers=False"
    place, (span, *others) = module.place, module.place.spans
    copy = tensor_of(data, info)
    if others or copy.shape != (place.out_features, place.in_features):
        raise AdapterMismatch(
            f"tensor {info.name[:160]!r} has shape {info.shape}, {place.path!r} of the base another"
        )
    if weights is None and trusted:
        return
    if weights is None:
        raise AdapterInvalid(
            f"tensor {info.name[:160]!r} is a copy of the base's own weight, which is not at hand "
            f"here to compare it with; name the base, or {remedy}"
        )
    at = 0
    for panel in weights.panels(span.linear):
        rows = copy[at : at + panel.shape[0]]
        at += panel.shape[0]
        own = panel.cpu()
        if not (
            torch.equal(rows.to(dtype), own.to(dtype)) or torch.equal(rows, own.to(rows.dtype))
        ):
            raise AdapterMismatch(
                f"tensor {info.name[:160]!r} differs from the base's own weight: it was trained "
                f"or belongs to another base; where it was not trained, {remedy}"
            )


def _check_tied(data: bytes, embedding: Module, head: Module) -> None:
    """The head's pair must be the embedding's transposed: PEFT loads both into one place."""
    for mine, theirs in (
        (head.tensors.a, embedding.tensors.b),
        (head.tensors.b, embedding.tensors.a),
    ):
        if not torch.equal(tensor_of(data, mine).float(), tensor_of(data, theirs).t().float()):
            raise AdapterInvalid(
                "adapter_config.json: ensure_weight_tying = true, but tensor "
                f"{mine.name[:160]!r} is not {theirs.name[:160]!r} transposed; save the adapter as "
                "it was trained, or set it to false where the two were trained apart"
            )
