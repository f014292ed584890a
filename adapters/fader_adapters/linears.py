"""The linears that an adapter changes, put together from its modules' tensors. Knows modules that
were checked; no configs, no layout.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from fader_adapters.copies import tensor_of
from fader_adapters.errors import AdapterInvalid
from fader_adapters.expert_factors import of_experts, of_stack
from fader_adapters.factors import Linear, Part, put_together
from fader_adapters.header import TensorInfo
from fader_adapters.modules import NOTHING, Checked, Module
from fader_adapters.pauses import Pause
from fader_adapters.replaced import Replaced, as_linear
from fader_adapters.spec import BaseSpec, BaseWeights, LinearSpec
from fader_adapters.tokens import as_part


def linears_of(
    data: bytes,
    checked: Checked,
    replaced: Mapping[int, Replaced],
    base: BaseSpec,
    dtype: torch.dtype,
    weights: BaseWeights | None,
    pause: Pause,
) -> dict[int, Linear]:
    """Every adapted linear by its index in the base, in its order, cast to `dtype`.

    data     of the weights file
    replaced  tables by their linear's index
    weights  the base's own, where they are at hand; without them DoRA is refused
    Raises AdapterInvalid, also where none does anything.
    """
    linears: dict[int, Linear] = {}
    adapted = checked.by_linear
    for index in sorted({*adapted, *replaced}):
        own, table = adapted.get(index, NOTHING), replaced.get(index)
        if table is None:
            linears[index] = _linear(data, index, own, base, dtype, weights)
        else:
            assert weights is not None
            lora = _on_table(data, index, own, table)
            linears[index] = as_linear(table, lora, base, dtype, weights, pause)
        pause()
    if all(linear.idle for linear in linears.values()):
        raise AdapterInvalid("every delta is zero: the adapter would answer as the base does")
    return linears


def _linear(
    data: bytes,
    index: int,
    own: Checked,
    base: BaseSpec,
    dtype: torch.dtype,
    weights: BaseWeights | None,
) -> Linear:
    if base.linears[index].role == "experts":
        return _stack(data, own.modules, base.linears[index], dtype)
    parts = [part for module in own.modules for part in _parts(data, index, module)]
    parts += [as_part(rows, tensor_of(data, rows.info), weights) for rows in own.tokens]
    parts.sort(key=lambda part: part.start)
    panels = None
    if any(part.magnitude is not None for part in parts):
        if weights is None:
            raise AdapterInvalid(
                "adapter_config.json: use_dora = true scales the base's own weights, which are not "
                "at hand here; name the base"
            )
        panels = weights.panels(index)
    return put_together(parts, base.linears[index].out_features, dtype, panels)


def _on_table(data: bytes, index: int, own: Checked, table: Replaced) -> list[Part]:
    """The LoRA modules of a table that is replaced by a copy that was trained. Raises
    AdapterInvalid for what else stands there."""
    others = ["trained tokens"] if own.tokens else []
    others += ["DoRA"] if any(module.tensors.magnitude for module in own.modules) else []
    if others:
        raise AdapterInvalid(
            f"{table.place.path!r} has {others[0]} over a copy of the base's weight that differs "
            "from the base's own: it was trained or belongs to another base; where it was not "
            "trained, save with save_embedding_layers=False"
        )
    return [part for module in own.modules for part in _parts(data, index, module)]


def _stack(
    data: bytes, modules: Sequence[Module], linear: LinearSpec, dtype: torch.dtype
) -> Linear:
    """A stack of experts, given as one parameter or as modules of its experts."""
    first = modules[0]
    if not first.place.module:
        a, b = (tensor_of(data, info) for info in (first.tensors.a, first.tensors.b))
        return of_stack(a, b, linear.experts, first.scale, dtype, turned=first.turned)
    parts: list[list[Part]] = [[] for _ in range(linear.experts)]
    for module in modules:
        for span in module.place.spans:
            assert span.expert is not None
            a, b = (tensor_of(data, info) for info in (module.tensors.a, module.tensors.b))
            parts[span.expert].append(Part(span.start, span.stop, a, b, module.scale))
    return of_experts(parts, (linear.out_features, linear.in_features), dtype)


def _parts(data: bytes, index: int, module: Module) -> Iterable[Part]:
    """What a module adds to the rows of one linear."""
    tensors, at = module.tensors, 0
    a, b = (tensor_of(data, info) for info in (tensors.a, tensors.b))
    a, b = (b.t(), a.t()) if module.turned else (a, b)
    for span in module.place.spans:
        rows = slice(at, at := at + span.stop - span.start)
        if span.linear == index:
            yield Part(
                span.start,
                span.stop,
                a,
                b[rows],
                module.scale,
                _vector(data, tensors.magnitude, rows),
                _vector(data, tensors.bias, rows),
            )


def _vector(data: bytes, info: TensorInfo | None, rows: slice) -> torch.Tensor | None:
    """Raises AdapterInvalid, for the whole vector: what is folded with it may not show a NaN."""
    if info is None:
        return None
    vector = tensor_of(data, info).reshape(-1)
    if not bool(vector.isfinite().all()):
        raise AdapterInvalid(f"tensor {info.name[:160]!r} has NaN or infinite values")
    return vector[rows]
