"""The vocabulary: bases, adapters, blends as frozen facts. Never imports torch."""

import hashlib
import itertools
import math
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NewType, Protocol

from fader_adapters.errors import BlendInvalid

if TYPE_CHECKING:
    import torch

Digest = NewType("Digest", str)
"""A sha256 in lower-case hexadecimal, 64 characters."""

DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
"""What `fullmatch` of a whole digest must accept."""

DIGEST_PREFIX = re.compile(r"[0-9a-f]{12,64}", re.ASCII)
"""What `fullmatch` of a digest in a request must accept: it may be cut."""

EXTENT_ALIGN = 32
"""Every A and B starts at a multiple of this many elements inside an extent (64 bytes in bf16)."""

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
"""What `fullmatch` of an adapter's name must accept."""

NESTED_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}", re.ASCII
)
"""A Hub id, or a folder in a folder: the name of an adapter that is named by its source."""

URL_PREFIX = re.compile(r"([a-z][a-z0-9+]{0,31})://((?:[A-Za-z0-9_.=+@,:-]+/)+)", re.ASCII)
"""What `fullmatch` of an allowed URL prefix must accept; its first group is the protocol."""

LOCAL_PROTOCOLS = frozenset(("file", "local"))
"""Protocols that would go around the confinement of adapter roots."""

MAX_WEIGHT = 16.0
"""Largest magnitude of a blend's weight."""


PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linears whose rows are those of several others, one after the other."""


Role = Literal["linear", "head", "embedding", "experts", "router"]
"""What a target is to its model."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter version with its weight γ in a blend."""

    version: Digest
    gamma: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.gamma):
            raise BlendInvalid(f"an adapter weight must be a finite number, got {self.gamma}")


class Weighed(Protocol):
    """A term as whoever asks knows it."""

    @property
    def version(self) -> Digest: ...
    @property
    def weight(self) -> float: ...


def added_up(terms: Iterable[Weighed]) -> dict[Digest, float]:
    """γ of every version: the sum over all names that mean it, rounded once, in any order."""
    weights: dict[Digest, list[float]] = {}
    for term in terms:
        weights.setdefault(term.version, []).append(term.weight)
    return {version: math.fsum(parts) for version, parts in weights.items()}


@dataclass(frozen=True)
class Blend:
    """Terms sorted by version, without duplicates or zero weights; empty is the base.

    Build one with `Blend.of`. Two blends are equal exactly when their digests are.
    """

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "Blend":
        """Sort the terms and drop those with γ = 0. Raises BlendInvalid on a repeated version."""
        kept = sorted((t for t in terms if t.gamma != 0.0), key=lambda t: t.version)
        for before, after in itertools.pairwise(kept):
            if before.version == after.version:
                raise BlendInvalid(
                    f"adapter version {after.version[:12]} stands twice in a blend; add its weights"
                )
        return cls(tuple(kept))

    @cached_property
    def digest(self) -> Digest:
        """sha256 over (version, exact bits of γ) of every term, in order."""
        state = hashlib.sha256(b"fader-blend-1")
        for term in self.terms:
            state.update(bytes.fromhex(term.version))
            state.update(struct.pack("<d", term.gamma))
        return Digest(state.hexdigest())

    def __bool__(self) -> bool:
        return bool(self.terms)


BASE = Blend()
"""The blend without terms: the base itself."""


def layer_of(path: str) -> int | None:
    """Index of the layer that a module path names, None outside the layers."""
    found = re.search(r"\.(\d+)\.", path)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """One linear of the base that an adapter may target."""

    path: str
    """Dotted module path in the transformers model, e.g. `model.layers.0.self_attn.q_proj`."""
    in_features: int
    out_features: int
    layer: int | None
    """Index of the decoder layer, None outside the layers."""
    conv1d: bool = False
    """The checkpoint's weight is [in, out]: transformers' Conv1D (PEFT's fan_in_fan_out), and some
    stacks of experts."""
    role: Role = "linear"
    """The head gives logits. An embedding's W [out, in] is its table transposed, x is one-hot.
    Experts are a stack of linears of one shape, each for the tokens a router gives it; their path
    is that of the parameter."""
    multiplier: float = 1.0
    """What the module multiplies its output by; the scale of a delta holds it."""
    parts: tuple[int, ...] = ()
    """Rows of each linear that is packed into this one, in the order of PACKED."""
    experts: int = 1
    """Linears in the stack."""

    @property
    def weights(self) -> int:
        """Elements of W, all of a stack."""
        return self.in_features * self.out_features * self.experts

    @property
    def inside(self) -> bool:
        """A module that is a linear, and not the head: what "all-linear" means."""
        return self.role == "linear"


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """Linears that share one input; their outputs lie side by side."""

    linears: tuple[int, ...]
    """Indices into BaseSpec.linears."""
    in_features: int
    out_features: tuple[int, ...]
    """Per linear."""


@dataclass(frozen=True)
class BaseSpec:
    """What an adapter must fit: the base's linears in model order; their index is their place."""

    linears: tuple[LinearSpec, ...]
    fingerprint: Digest
    """sha256 over the model type and every linear's path and shape."""
    model_type: str
    name: str = ""
    """What the base was loaded from; shown, never compared."""
    tied: bool = False
    """The head's weight is the embedding's table."""
    weights: Digest | None = None
    """sha256 over what was read of the base; None: nobody hashed it."""
    left_out: frozenset[Role] = frozenset()
    """What the model has, too, and the kernels that serve it do not adapt."""
    read: frozenset[str] = frozenset()
    """Paths of linears whose weight the model reads by itself: LoRA on them has no effect."""

    @cached_property
    def identity(self) -> Digest:
        """sha256 over the fingerprint and the weights, as far as they are known."""
        return Digest(hashlib.sha256(f"{self.fingerprint} {self.weights}".encode()).hexdigest())

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {linear.path: i for i, linear in enumerate(self.linears)}


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """One adapted linear: W·x → (1 + gain) ∘ (W·x) + scale · (B·(A·x) + bias).

    A [rank, in], B [out, rank]; gain and bias are vectors [out], where there are any. DoRA's B is
    diag(g)·B and its gain is g − 1, g = magnitude / ‖W + scale·B·A‖ of each row. A stack of experts
    has A and B of each, one after the other, and no vectors.
    """

    linear: int
    """Index into BaseSpec.linears."""
    rank: int
    scale: float
    """α/r, or α/√r for rsLoRA, times the linear's multiplier; where parts of several scales share
    the linear just the multiplier, and B holds their scales."""
    a_offset: int
    """Elements from the start of the adapter's extent to A, row-major [(experts,) rank, in]."""
    b_offset: int
    """Elements from the start of the adapter's extent to B, rank-major [(experts,) rank, out]."""
    gain_offset: int | None = None
    """Elements from the start of the extent to the gain [out]; None: 0 everywhere."""
    bias_offset: int | None = None
    """Elements from the start of the extent to the bias of B [out]; None: 0 everywhere."""


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter version's shape: its linears, ranks, scales and their places in its extent."""

    version: Digest
    deltas: tuple[DeltaSpec, ...]
    """In the order of BaseSpec.linears."""
    numel: int
    """Elements of the extent; bytes are numel · element size of the arena."""
    invocation: tuple[int, ...] = ()
    """Activated LoRA: it applies from the start of the last occurrence of these tokens in a prompt,
    and nowhere without one. None: it always applies."""

    @cached_property
    def by_linear(self) -> dict[int, DeltaSpec]:
        return {delta.linear: delta for delta in self.deltas}


class BaseWeights(Protocol):
    """The base's own weights, for what only they decide. May be asked on any thread."""

    def panels(self, linear: int) -> "Iterator[torch.Tensor]":
        """W [out, in] of one linear in fp32, a few rows at a time, in order; never all at once. On
        the base's device. Of experts those of the first, then of the second, and so on."""
        ...


class AdapterData(Protocol):
    """One adapter version as the device needs it: its layout and its weights in host memory."""

    @property
    def spec(self) -> AdapterSpec: ...

    @property
    def flat(self) -> "torch.Tensor":
        """1-D tensor of spec.numel elements in the arena's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class Upload:
    """Bring one version into the device arena: copy `data.flat` to `offset`, publish `slot`."""

    data: AdapterData
    slot: int
    offset: int
    """Elements from the start of the arena."""


@dataclass(frozen=True, slots=True)
class RankScale:
    """Input of `lay_out`: rank and scale of one adapted linear, and which vectors it has."""

    linear: int
    rank: int
    scale: float
    gain: bool = False
    bias: bool = False


def lay_out(
    base: BaseSpec,
    version: Digest,
    parts: Iterable[RankScale],
    invocation: tuple[int, ...] = (),
) -> AdapterSpec:
    """Assign offsets: for each linear in base order A, B, gain, bias, each at EXTENT_ALIGN."""
    deltas: list[DeltaSpec] = []
    cursor = 0
    for part in sorted(parts, key=lambda p: p.linear):
        linear = base.linears[part.linear]
        starts: list[int | None] = []
        for size in (
            part.rank * linear.in_features * linear.experts,
            part.rank * linear.out_features * linear.experts,
            linear.out_features if part.gain else 0,
            linear.out_features if part.bias else 0,
        ):
            starts.append(cursor if size else None)
            cursor = _align(cursor + size)
        a_offset, b_offset, gain, bias = starts
        assert a_offset is not None
        assert b_offset is not None
        deltas.append(DeltaSpec(part.linear, part.rank, part.scale, a_offset, b_offset, gain, bias))
    return AdapterSpec(version, tuple(deltas), cursor, invocation)


def _align(elements: int) -> int:
    return -(-elements // EXTENT_ALIGN) * EXTENT_ALIGN


@dataclass(frozen=True, slots=True)
class RowTerms:
    """The delta work of one row of a step: token count and (slot, γ) pairs in digest order."""

    tokens: int
    terms: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepTerms:
    """The delta work of one step, rows in packed order; turned into device metadata once."""

    rows: tuple[RowTerms, ...] = ()

    @property
    def idle(self) -> bool:
        """True when no row has a term: the step costs nothing beyond the base."""
        return not any(row.terms for row in self.rows)
