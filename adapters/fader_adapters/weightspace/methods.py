"""Methods of quantisation that a config may name, other than bitsandbytes', and which tensors are
codes by them. Knows names, dtypes and shapes; reads no values.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fader_adapters.errors import BaseUnsupported, CheckpointInvalid
from fader_adapters.weightspace import compressed_tensors, packed_columns
from fader_adapters.weightspace.code_layout import (
    Coded,
    MicroscaledStack,
    ScaledWeight,
    beside,
    scales_beside,
    two_sizes,
)
from fader_adapters.weightspace.decoding import MX_BLOCK, Grid
from fader_adapters.weightspace.tensors import Checkpoint, Stored

_FP8 = torch.float8_e4m3fn
_SCALES = ("_scale_inv", "_scale")
"""What a key of FP8 ends in where it is that of its scales; the second by AutoFP8."""
READ = "MXFP4, FP8, GPTQ, AWQ and compressed-tensors' integers and FP8"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to publish weights."""

    told: str
    """What it is called, in a few words."""
    find: Callable[[Checkpoint], Iterator[Coded]]
    """The weights that a checkpoint holds so. Raises CheckpointInvalid, with the key."""
    beside: tuple[str, ...]
    """Ends of keys that mean nothing without a weight's codes."""


def method_of(facts: Mapping[str, Any]) -> Method:
    """The method that a `quantization_config` names. Raises BaseUnsupported where it is none of
    these, or in a form that is not read."""
    name = facts.get("quant_method")
    if name == "mxfp4":
        return Method("MXFP4", _microscaled, ("_blocks", "_scales"))
    if name == "fp8":
        if facts.get("fmt") not in (None, "e4m3"):
            raise BaseUnsupported(f"fp8 of the form {facts['fmt']!r}, expected e4m3")
        block = _block(facts.get("weight_block_size"))
        told = f"FP8 with a scale for every {block.rows}x{block.columns}" if block else "FP8"
        return Method(told, partial(_in_fp8, block=block), ("_scale_inv", ".weight_scale"))
    if name == "compressed-tensors":
        schemes = compressed_tensors.schemes_of(facts)
        told = ", ".join(sorted({scheme.told for scheme in schemes}))
        find = partial(compressed_tensors.find, schemes=schemes)
        return Method(f"compressed-tensors ({told})", find, compressed_tensors.BESIDE)
    if name in ("gptq", "awq"):
        form = packed_columns.gptq(facts) if name == "gptq" else packed_columns.awq(facts)
        return Method(form.told, partial(packed_columns.find, form=form), packed_columns.BESIDE)
    raise BaseUnsupported(str(name or "a method that its config does not name"))


def _block(size: Any) -> Grid | None:  # noqa: ANN401 - it is a stranger's JSON
    if size is None:
        return None
    sizes = two_sizes(size)
    if sizes is None:
        raise BaseUnsupported(f"fp8 with weight_block_size {size!r}, expected two sizes or null")
    return sizes


def _microscaled(files: Checkpoint) -> Iterator[Coded]:
    for key, stored in files.tensors.items():
        if not key.endswith("_blocks"):
            continue
        name = key.removesuffix("_blocks")
        scales = beside(files, key, f"{name}_scales")
        shape = stored.shape
        sound = len(shape) == 4 and shape[-1] == MX_BLOCK // 2 and stored.dtype == torch.uint8
        if not sound or scales.dtype != torch.uint8 or scales.shape != shape[:-1]:
            raise CheckpointInvalid(
                f"{key!r} is {stored.dtype} of shape {shape} with scales in {scales.dtype} of "
                f"shape {scales.shape}, expected uint8 [experts, out, blocks, {MX_BLOCK // 2}] and "
                "[experts, out, blocks]"
            )
        experts, out, blocks, _ = shape
        yield MicroscaledStack(name, key, scales.key, (experts, MX_BLOCK * blocks, out))


def _in_fp8(files: Checkpoint, *, block: Grid | None) -> Iterator[Coded]:
    for key, stored in files.tensors.items():
        if stored.dtype != _FP8:
            continue
        if len(stored.shape) not in (2, 3):
            raise CheckpointInvalid(f"{key!r} is FP8 of shape {stored.shape}, expected a matrix")
        names = [f"{key}{end}" for end in _SCALES]
        scales = next((name for name in names if name in files.tensors), names[0])
        grid = _grid(stored, scales, scales_beside(files, key, scales), block)
        module = key.removesuffix(".weight")
        of_activations = (
            f"{module}.activation_scale", f"{module}.input_scale", f"{key}_activation_scale",
        )  # fmt: skip
        dropped = tuple(part for part in of_activations if part in files.tensors)
        yield ScaledWeight(key, key, stored.shape, grid, scales, in_fp32=True, dropped=dropped)


def _grid(stored: Stored, scales: str, shape: tuple[int, ...], block: Grid | None) -> Grid:
    *experts, out, width = stored.shape
    whole = Grid(out, width)
    if block is not None and shape == (*experts, *block.shape(out, width)):
        return block
    if shape == (*experts,) or (block is None and shape == (*experts, 1, 1)):
        return whole
    if not experts and shape == (1,):
        return whole
    if block is None and shape == (*experts, out, 1):
        return Grid(1, width)
    expected = (block or whole).shape(out, width)
    raise CheckpointInvalid(
        f"{scales!r} is of shape {shape}, expected {(*experts, *expected)} for {stored.shape}"
    )
