"""A base and a blend to a checkpoint of their sum, shard by shard, one linear in memory at a time.

Knows tensors and shards; the files around them are in `surroundings`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fader_adapters.errors import AdapterError, TargetTaken
from fader_adapters.kernels import nf4
from fader_adapters.weightspace import disk, quantised, surroundings
from fader_adapters.weightspace.base import MODEL_CONFIG, Base, densely, open_base
from fader_adapters.weightspace.loss import LinearLoss, joined, measure, overall
from fader_adapters.weightspace.manifest import Finished, Inputs, open_manifest
from fader_adapters.weightspace.merged_experts import rows_of, write_experts
from fader_adapters.weightspace.plan import Form, Piece, Shard, nests, plan, unties
from fader_adapters.weightspace.progress import Progress, silent
from fader_adapters.weightspace.terms import Ingredient, Mixture, mix, read_raw

SHARD_BYTES = 2 << 30
REPORT_FILE = "merge_report.json"


@dataclass(frozen=True, slots=True)
class Merged:
    """A finished merge."""

    directory: Path
    shards: int
    kept: int
    """Shards that an earlier, interrupted run had finished."""
    report: dict[str, Any]
    """What is in merge_report.json."""


@dataclass(frozen=True)
class _Job:
    base: Base
    mixture: Mixture
    form: Form


def merge(
    base: Path,
    blend: Sequence[Ingredient],
    out: Path,
    *,
    form: Form,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Merged:
    """Write W + Σ γᵢ·ΔWᵢ as a checkpoint that transformers loads; ΔW = s·B·A, or all of DoRA's.

    base   a model directory, unquantised or in bitsandbytes' NF4; never written
    out    new or empty, or left by an interrupted run with the same inputs, which goes on
    form   bf16: everything in bf16; nf4: linears in NF4, the rest as in the base
    What lora_bias adds goes into the linear's own bias. A tied base whose head or embedding is
    adapted comes out untied, with both tables.
    The sum is formed in fp32 and rounded once. Raises AdapterError (which kinds: see errors.py) and
    OSError; an interrupted run leaves no file that could be taken for a whole checkpoint.
    """
    if out.resolve() == base.resolve():
        raise TargetTaken(f"{out} is the base itself; name a new directory")
    job = _open(base, blend, form)
    adapted = job.mixture.linears()
    shards = plan(job.base, adapted, form, shard_bytes=shard_bytes, biased=job.mixture.biased())
    inputs = Inputs(_identity(job.base, progress), job.mixture.blend.digest, form, shard_bytes)
    with disk.sole_writer(out):
        manifest = open_manifest(out, inputs)
        total = sum(piece.nbytes for shard in shards for piece in shard.pieces)
        done = kept = 0
        for shard in shards:
            if manifest.holds(out, shard.name):
                kept += 1
            else:
                manifest.shards[shard.name] = _write(
                    job, shard, out, partial(_told, progress, done, total)
                )
                manifest.save(out)
            done += sum(piece.nbytes for piece in shard.pieces)
            progress("merging", done, total)
        report = _report(job, [manifest.shards[shard.name] for shard in shards])
        disk.write_json(out / REPORT_FILE, report)
        surroundings.write(job.base, out, form, shards, untied=unties(job.base, adapted))
    return Merged(out, len(shards), kept, report)


def _open(directory: Path, blend: Sequence[Ingredient], form: Form) -> _Job:
    base = open_base(directory)
    gammas = [item.gamma for item in blend]
    mixture = mix(read_raw(blend), gammas, base.spec, weights=base)
    return _Job(base, mixture, form)


def _identity(base: Base, progress: Progress) -> str:
    """sha256 over the names and contents of the base's configuration and weight files."""
    state = hashlib.sha256()
    files = [base.directory / MODEL_CONFIG, *base.checkpoint.files]
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        progress("reading the base", done, total)
        written = disk.hash_file(file)
        state.update(f"{file.name}\0{written.nbytes}\0{written.sha256}\0".encode())
        done += written.nbytes
    progress("reading the base", done, total)
    return state.hexdigest()


def _told(progress: Progress, before: int, total: int, nbytes: int) -> None:
    progress("merging", before + nbytes, total)


def _write(job: _Job, shard: Shard, out: Path, told: "partial[None]") -> Finished:
    losses: list[LinearLoss] = []
    writer = disk.ShardWriter(out / shard.name, shard.names)
    try:
        done = 0
        for piece in shard.pieces:
            loss = _write_piece(job, piece, writer)
            if loss is not None:
                losses.append(loss)
            done += piece.nbytes
            told(done)
        written = writer.finish()
    finally:
        writer.close()
    return Finished(written.sha256, written.nbytes, tuple(losses))


def _write_piece(job: _Job, piece: Piece, writer: disk.ShardWriter) -> LinearLoss | None:
    checkpoint = job.base.checkpoint
    if piece.fate in ("copy", "cast"):
        stored = checkpoint.tensors[piece.key]
        dtype = stored.dtype if piece.fate == "copy" else torch.bfloat16
        pieces = (part.to(dtype) for part in checkpoint.chunks(piece.key))
        writer.add(piece.key, pieces, dtype=dtype, shape=stored.shape)
        return None
    if piece.fate == "bias":
        assert piece.linear is not None
        stored, change = checkpoint.tensors[piece.key], job.mixture.bias(piece.linear)
        assert change is not None
        bias = checkpoint.read(piece.key).float() + change.view(stored.shape)
        quantised.require_finite(bias)
        dtype = torch.bfloat16 if job.form == "bf16" else stored.dtype
        writer.add(piece.key, [bias.to(dtype)], dtype=dtype, shape=stored.shape)
        return None
    if piece.linear is None:  # an NF4 weight that no adapter may target, such as an output head
        weight = nf4.dense(job.base.packed(piece.key).weight, torch.bfloat16)
        writer.add(piece.key, [weight], dtype=weight.dtype, shape=tuple(weight.shape))
        return None
    try:
        return _write_linear(job, piece, piece.linear, writer)
    except AdapterError as error:
        error.args = (f"{job.base.spec.linears[piece.linear].path}: {error}",)
        raise


def _write_linear(
    job: _Job, piece: Piece, index: int, writer: disk.ShardWriter
) -> LinearLoss | None:
    linear = job.base.spec.linears[index]
    if linear.role == "experts":
        return write_experts(job.base, job.mixture, job.form, piece, writer)
    stored = job.base.stored(linear)
    merged = densely(stored)
    if merged is stored:  # an fp32 base: keep W for the comparison
        merged = merged.clone()
    delta = job.mixture.sum(index)
    if delta is not None:
        delta.add_to(merged)
    quantised.require_finite(merged)
    dtype = stored.dtype
    served = before = rows_of(stored)
    if piece.fate == "nf4":
        nested = nests(job.base, piece.key)
        packed = quantised.quantise(merged, dtype=dtype, nested=nested)
        for name, part in packed.tensors(piece.key).items():
            writer.add(name, [part], dtype=part.dtype, shape=tuple(part.shape))
        after = rows_of(packed)
        if delta is not None and not isinstance(stored, quantised.Packed):
            served = rows_of(quantised.quantise(densely(stored), dtype=dtype, nested=nested))
    else:
        rounded = merged.to(torch.bfloat16 if job.form == "bf16" else dtype)
        laid = rounded.T.contiguous() if linear.conv1d else rounded
        writer.add(piece.key, [laid], dtype=laid.dtype, shape=tuple(laid.shape))
        after = rows_of(rounded)
    if delta is None:
        return None
    return measure(linear.path, delta.rank, merged, before=before, served=served, after=after)


def _report(job: _Job, shards: Sequence[Finished]) -> dict[str, Any]:
    by_path: dict[str, list[LinearLoss]] = {}
    for loss in (loss for shard in shards for loss in shard.losses):
        by_path.setdefault(loss.path, []).append(loss)
    order = job.base.spec.index_of
    losses = [joined(by_path[path]) for path in sorted(by_path, key=order.__getitem__)]
    return {
        "base": str(job.base.directory),
        "blend": job.mixture.facts(),
        "digest": job.mixture.blend.digest,
        "dtype": job.form,
        "overall": overall(losses),
        "linears": [loss.document() for loss in losses],
    }
