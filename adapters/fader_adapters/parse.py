"""From an adapter's bytes to checked weights and facts. Knows no store, no device, no paths."""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fader_adapters.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge
from fader_adapters.header import TensorInfo, read_header
from fader_adapters.limits import Limits
from fader_adapters.lora_config import LoraConfig, read_config
from fader_adapters.pattern_nodes import PatternUnsafe
from fader_adapters.report import AdapterReport, ModuleReport
from fader_adapters.source import RawAdapter
from fader_adapters.spec import AdapterSpec, BaseSpec, Digest, LinearSpec, RankScale, lay_out
from fader_adapters.targets import ALL_LINEAR
from fader_adapters.tensor_names import Mapping, Pair, map_to_base, pair_factors

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Factors:
    """A [rank, in] and Bᵀ [rank, out] of one linear, contiguous, in the arena's dtype."""

    a: torch.Tensor
    bt: torch.Tensor


@dataclass(frozen=True, slots=True)
class ParsedAdapter:
    """A checked adapter, ready to be written into an extent."""

    spec: AdapterSpec
    report: AdapterReport
    dtype: torch.dtype
    factors: tuple[Factors, ...]
    """In the order of spec.deltas."""

    @property
    def nbytes(self) -> int:
        return self.spec.numel * self.dtype.itemsize

    def write(self, flat: torch.Tensor) -> None:
        """Fill `flat` [spec.numel] of `dtype` completely; the gaps of alignment become 0."""
        assert flat.shape == (self.spec.numel,)
        assert flat.dtype == self.dtype
        cursor = 0
        for delta, factors in zip(self.spec.deltas, self.factors, strict=True):
            for offset, matrix in ((delta.a_offset, factors.a), (delta.b_offset, factors.bt)):
                flat[cursor:offset].zero_()
                cursor = offset + matrix.numel()
                flat[offset:cursor].copy_(matrix.view(-1))
        flat[cursor:].zero_()


@dataclass(frozen=True, slots=True)
class _Module:
    """One adapted linear, checked as far as names, shapes and config go."""

    path: str
    """In the adapter's own model."""
    linear: int
    pair: Pair
    rank: int
    alpha: float
    scale: float


def read_adapter(
    raw: RawAdapter, base: BaseSpec, *, dtype: torch.dtype, limits: Limits | None = None
) -> ParsedAdapter:
    """Check everything about an adapter and cast its weights to `dtype`.

    The tensors decide which modules are adapted; the config must agree with them. Shapes and ranks
    are checked from the header, before any weight is touched. Raises AdapterInvalid (malformed, not
    implemented exactly, partial, not finite, no effect), AdapterMismatch (another base) and
    AdapterTooLarge (a limit).
    """
    limits = limits or Limits()
    config = read_config(raw.config, limits)
    pairs = pair_factors(read_header(raw.weights, limits))
    mapping = map_to_base(pairs, base)
    _check_targets(config, pairs, mapping, base)
    modules = sorted(
        (_module(path, pair, mapping, base, config, limits) for path, pair in pairs.items()),
        key=lambda module: module.linear,
    )
    factors = tuple(_factors(raw.weights, module.pair, dtype) for module in modules)
    if not any(bool(f.a.any()) and bool(f.bt.any()) for f in factors):
        raise AdapterInvalid("every delta is zero: the adapter would answer as the base does")
    reports = tuple(
        _report(module, f, base, limits) for module, f in zip(modules, factors, strict=True)
    )
    spec = lay_out(
        base,
        _version(raw.weights, config, modules),
        (RankScale(module.linear, module.rank, module.scale) for module in modules),
    )
    report = AdapterReport(
        modules=reports,
        total=len(base.linears),
        peft_type="LORA",
        rslora=config.rslora,
        source_dtypes=tuple(sorted({i.dtype for p in pairs.values() for i in (p.a, p.b)})),
        base_name=config.base_name,
    )
    return ParsedAdapter(spec, report, dtype, factors)


def _check_targets(
    config: LoraConfig, pairs: dict[str, Pair], mapping: Mapping, base: BaseSpec
) -> None:
    """target_modules and the tensors must mean the same linears of the base."""
    targets = config.targets
    theirs = {mapping.their_path(linear.path): linear for linear in base.linears}
    stranger = targets.unmatched(theirs)
    if stranger is not None:
        raise AdapterMismatch(
            f"target_modules names {stranger[:160]!r}, the base has no such linear; "
            "the adapter was made for another base"
        )
    try:
        for path in pairs:
            if not targets.select(path):
                raise AdapterInvalid(
                    f"the file has tensors for {path[:160]!r}, target_modules does not select it"
                )
        for path, linear in theirs.items():
            # "all-linear" leaves out the output head, which is outside the layers.
            optional = targets.include == ALL_LINEAR and linear.layer is None
            if path not in pairs and not optional and targets.select(path):
                raise AdapterInvalid(
                    f"target_modules selects {path[:160]!r}, the file has no tensors for it: "
                    "a partial adapter"
                )
    except PatternUnsafe as error:
        raise AdapterInvalid(
            f"adapter_config.json: target_modules or exclude_modules cannot be evaluated safely: "
            f"{error}; list the module names instead"
        ) from None


def _module(
    path: str,
    pair: Pair,
    mapping: Mapping,
    base: BaseSpec,
    config: LoraConfig,
    limits: Limits,
) -> _Module:
    index = mapping.linear_of[path]
    linear = base.linears[index]
    for info in (pair.a, pair.b):
        if len(info.shape) != 2:
            raise AdapterInvalid(f"tensor {info.name!r} has shape {info.shape}, expected a matrix")
    rank = pair.a.shape[0]
    if rank > limits.rank:
        raise AdapterTooLarge(f"{path!r} has rank {rank}, the limit is {limits.rank}")
    declared = config.rank_of(path)
    if rank != declared or pair.b.shape[1] != declared:
        raise AdapterInvalid(
            f"{path!r}: the config declares rank {declared}, the tensors have A {pair.a.shape} and "
            f"B {pair.b.shape}; expected A [{declared}, in] and B [out, {declared}]"
        )
    _check_dimensions(pair, linear)
    alpha = config.alpha_of(path)
    return _Module(path, index, pair, rank, alpha, config.scale(rank, alpha))


def _check_dimensions(pair: Pair, linear: LinearSpec) -> None:
    if (pair.a.shape[1], pair.b.shape[0]) != (linear.in_features, linear.out_features):
        raise AdapterMismatch(
            f"{linear.path!r} of the base maps {linear.in_features} to {linear.out_features} "
            f"features, the adapter {pair.a.shape[1]} to {pair.b.shape[0]}: another base"
        )


def _factors(weights: bytes, pair: Pair, dtype: torch.dtype) -> Factors:
    return Factors(
        _tensor(weights, pair.a).to(dtype).contiguous(),
        _tensor(weights, pair.b).to(dtype).t().contiguous(),
    )


def _tensor(weights: bytes, info: TensorInfo) -> torch.Tensor:
    private = bytearray(memoryview(weights)[info.start : info.end])
    return torch.frombuffer(private, dtype=_DTYPES[info.dtype]).view(info.shape)


def _report(module: _Module, factors: Factors, base: BaseSpec, limits: Limits) -> ModuleReport:
    for name, matrix in (("lora_A", factors.a), ("lora_B", factors.bt)):
        if not bool(matrix.isfinite().all()):
            raise AdapterInvalid(
                f"{name} of {module.path!r} has NaN or infinite values as {matrix.dtype}"
            )
    norm = module.scale * _product_norm(factors)
    if not norm <= limits.delta_norm:
        raise AdapterInvalid(
            f"the delta of {module.path!r} has norm {norm:.3g}, the limit is {limits.delta_norm:g}"
        )
    path = base.linears[module.linear].path
    return ModuleReport(path, module.rank, module.alpha, module.scale, norm)


def _product_norm(factors: Factors) -> float:
    """‖B·A‖ from two [rank, rank] Gram matrices, never the product itself."""
    a, bt = factors.a.float(), factors.bt.float()
    square = torch.sum((a @ a.t()) * (bt @ bt.t()), dtype=torch.float64).item()
    return math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.inf


def _version(weights: bytes, config: LoraConfig, modules: Iterable[_Module]) -> Digest:
    """sha256 of what the config decides, then the weights file, each with its length before it."""
    effective = json.dumps(
        {
            "format": "fader-adapter-1",
            "rslora": config.rslora,
            "modules": sorted([m.path, m.rank, m.alpha] for m in modules),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    state = hashlib.sha256()
    for part in (effective, weights):
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return Digest(state.hexdigest())
