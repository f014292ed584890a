"""From an adapter's bytes to checked weights and facts. Knows no store, no device, no paths."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fader_adapters.copies import check_copies
from fader_adapters.errors import AdapterInvalid
from fader_adapters.factors import Factors, Linear
from fader_adapters.hashing import absorb
from fader_adapters.header import read_header
from fader_adapters.invocation import check_invocation
from fader_adapters.limits import Limits
from fader_adapters.linears import linears_of
from fader_adapters.lora_config import LoraConfig, read_config
from fader_adapters.mlx import check_folded
from fader_adapters.modules import NOTHING, Checked, Module, check_modules
from fader_adapters.pauses import Pause, never
from fader_adapters.replaced import read_tables
from fader_adapters.report import AdapterReport, ModuleReport
from fader_adapters.source import RawAdapter
from fader_adapters.spec import (
    AdapterSpec,
    BaseSpec,
    BaseWeights,
    Digest,
    RankScale,
    lay_out,
)
from fader_adapters.tensor_names import Named, sort_tensors


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

    def write(self, flat: torch.Tensor, pause: Pause = never) -> None:
        """Fill `flat` [spec.numel] of `dtype` completely; the gaps of alignment become 0."""
        assert flat.shape == (self.spec.numel,)
        assert flat.dtype == self.dtype
        cursor = 0
        for delta, factors in zip(self.spec.deltas, self.factors, strict=True):
            for offset, matrix in (
                (delta.a_offset, factors.a),
                (delta.b_offset, factors.bt),
                (delta.gain_offset, factors.gain),
                (delta.bias_offset, factors.bias),
            ):
                if offset is None or matrix is None:
                    continue
                flat[cursor:offset].zero_()
                cursor = offset + matrix.numel()
                flat[offset:cursor].copy_(matrix.view(-1))
            pause()
        flat[cursor:].zero_()


def read_adapter(
    raw: RawAdapter,
    base: BaseSpec,
    *,
    dtype: torch.dtype,
    limits: Limits | None = None,
    weights: BaseWeights | None = None,
    trust_copies: bool = False,
    pause: Pause = never,
) -> ParsedAdapter:
    """Check everything about an adapter and cast its weights to `dtype`.

    weights  the base's own, which DoRA is folded with; without them such an adapter is refused
    trust_copies  of the base's own weights beside the adapter, where `weights` are not at hand to
             compare them with; the report names them
    pause  called between the pieces of the work; see `pauses`
    The tensors decide which modules are adapted; the config must agree with them. Shapes and ranks
    are checked from the header, before any weight is touched. Raises AdapterInvalid (malformed, not
    implemented exactly, partial, not finite, no effect), AdapterMismatch (another base) and
    AdapterTooLarge (a limit).
    """
    limits = (limits or Limits()).over(base)
    config = read_config(raw.config, limits)
    if config.mlx:
        check_folded(base)
    pause()
    named = _named(raw.weights, limits, pause)
    checked = check_modules(named, config, base, limits, pause)
    untold = check_copies(raw.weights, named, checked, dtype, weights, trusted=trust_copies)
    tables = read_tables(
        raw.weights, checked.saved, base, dtype, weights, pause, trusted=trust_copies
    )
    places = [module.place for module in checked.modules]
    changed = [table.place for table in tables.replaced.values()]
    check_invocation(config.invocation, places, changed, base)
    linears = linears_of(raw.weights, checked, tables.replaced, base, dtype, weights, pause)
    reports = _reports(linears, checked, base, limits, pause)
    spec = lay_out(
        base,
        _version(raw.weights, config, checked, pause),
        (_shape(index, linear, base) for index, linear in linears.items()),
        config.invocation,
    )
    report = AdapterReport(
        modules=reports,
        total=len(base.linears),
        peft_type="LORA",
        rslora=config.rslora,
        source_dtypes=named.dtypes,
        base_name=config.base_name,
        kinds=config.kinds,
        invocation=config.invocation,
        unmatched=checked.unmatched,
        copies=tables.unchanged,
        copies_not_compared=(*untold, *tables.not_compared),
    )
    factors = tuple(linear.factors for linear in linears.values())
    return ParsedAdapter(spec, report, dtype, factors)


def _named(weights: bytes, limits: Limits, pause: Pause) -> Named:
    header = read_header(weights, limits)
    pause()
    named = sort_tensors(header)
    pause()
    return named


def _shape(index: int, linear: Linear, base: BaseSpec) -> RankScale:
    factors = linear.factors
    return RankScale(
        index,
        factors.rank,
        linear.scale * base.linears[index].multiplier,
        gain=factors.gain is not None,
        bias=factors.bias is not None,
    )


def _reports(
    linears: Mapping[int, Linear], checked: Checked, base: BaseSpec, limits: Limits, pause: Pause
) -> tuple[ModuleReport, ...]:
    by_linear = checked.by_linear
    reports: list[ModuleReport] = []
    for index, linear in linears.items():
        own = by_linear.get(index, NOTHING)
        reports.append(_report(index, linear, own.modules, base, limits))
        pause()
    return tuple(reports)


def _report(
    index: int, linear: Linear, own: Sequence[Module], base: BaseSpec, limits: Limits
) -> ModuleReport:
    path = base.linears[index].path
    theirs = own[0].path if own else path
    sound = math.isfinite(linear.norm) and linear.factors.gain is None
    for name, tensor in linear.factors.named:
        if sound and tensor.dim() > 1:
            continue  # the norm of the product would not be finite
        if not bool(tensor.isfinite().all()):
            raise AdapterInvalid(
                f"{name} of {theirs!r} has NaN or infinite values as {tensor.dtype}"
            )
    if not linear.norm <= limits.delta_norm:
        raise AdapterInvalid(
            f"the delta of {theirs!r} has norm {linear.norm:.3g}, "
            f"the limit is {limits.delta_norm:g}"
        )
    if not own:  # trained rows, one rank a token, or a whole table
        return ModuleReport(path, linear.factors.rank, 1.0, linear.scale, linear.norm)
    rank, alpha = max(m.rank for m in own), max(m.alpha for m in own)
    return ModuleReport(path, rank, alpha, max(m.scale for m in own), linear.norm)


def _version(weights: bytes, config: LoraConfig, checked: Checked, pause: Pause) -> Digest:
    """sha256 of what the config decides, then the weights file, each with its length before it."""
    modules = checked.modules
    trained = sorted(table.place.path for table in checked.saved if table.trained)
    effective = json.dumps(
        {
            "format": "fader-adapter-1",
            "rslora": config.rslora,
            "modules": sorted([m.path, m.rank, m.alpha] for m in modules),
            **dict.fromkeys(config.kinds, True),
            **(
                {"turned": other_way}
                if (other_way := [m.path for m in modules if m.turned])
                else {}
            ),
            **({"tokens": config.tokens} if config.tokens else {}),
            **({"saved": trained} if trained else {}),
            **({"invocation": config.invocation} if config.invocation else {}),
        },
        sort_keys=True,
        separators=(",", ":"),
    ).encode()
    state = hashlib.sha256()
    for part in (effective, weights):
        state.update(len(part).to_bytes(8, "little"))
        absorb(state, part, pause)
    return Digest(state.hexdigest())
