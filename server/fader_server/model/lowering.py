"""Turns torch operators into native calls where one does the very same. Knows both vocabularies."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fader_adapters.kernels.native import Call, Kind, Map, Op
from fader_server.model.recording import Recording, TorchCall

CODES = {torch.float32: 0, torch.bfloat16: 1}
BINARY = {"aten::add": Map.ADD, "aten::sub": Map.SUB, "aten::mul": Map.MUL}
COPIES = frozenset({"aten::clone", "aten::_to_copy", "aten::contiguous", "aten::to"})
MAX_DIMS = 4


def lowered(recording: Recording) -> Iterator[Call | TorchCall]:
    """Its calls, native ones in the place of torch operators where there are such."""
    for call in recording.calls:
        yield from [call] if isinstance(call, Call) else lower(call) or [call]


def lower(call: TorchCall) -> list[Call] | None:
    """The native calls that leave the same bits in call.out; None where there are none."""
    schema = getattr(call.function, "_schema", None)
    out = call.out
    if schema is None or call.in_place or not isinstance(out, Tensor):
        return None
    name, args = schema.name, call.args
    if name in BINARY and len(args) == 2 and not call.kwargs:
        return _binary(BINARY[name], *args, out=out)
    if name == "aten::neg":
        return _one(_map(Map.NEG, args[0], None, out=out))
    if name in COPIES:
        return _one(_map(Map.COPY, args[0], None, out=out))
    if name == "aten::cat":
        return _cat(args[0], args[1] if len(args) > 1 else 0, out)
    if name == "aten::embedding" and len(args) == 2:
        return _one(_gather(args[0], args[1], out))
    if name == "aten::index" and isinstance(args[0], Tensor) and args[0].shape[0] == 1:
        return _index(args[0], args[1], out)
    return None


def _one(call: Call | None) -> list[Call] | None:
    return None if call is None else [call]


def _binary(kind: Map, x: object, y: object, *, out: Tensor) -> list[Call] | None:
    if isinstance(x, Tensor) and isinstance(y, bool | int | float):
        return _one(_map(kind, x, None, out=out, scalar=float(y)))
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return None
    straight = _map(kind, x, y, out=out)
    if straight is None and kind is not Map.SUB:
        straight = _map(kind, y, x, out=out)
    return _one(straight)


def _cat(parts: Sequence[Tensor], dim: int, out: Tensor) -> list[Call] | None:
    calls: list[Call] = []
    at = 0
    for part in parts:
        if part.dim() != out.dim() or part.dtype != out.dtype:
            return None
        call = _map(Map.COPY, part, None, out=out.narrow(dim, at, part.shape[dim]))
        at += part.shape[dim]
        if call is None:
            return None
        calls.append(call)
    return calls


def _index(x: Tensor, indices: Sequence[Tensor | None], out: Tensor) -> list[Call] | None:
    """x[:, index, ...] of one outer row."""
    if len(indices) != 2 or indices[0] is not None or indices[1] is None or not x.is_contiguous():
        return None
    return _one(_gather(x[0].reshape(x.shape[1], -1), indices[1], out))


def _gather(rows: Tensor, index: Tensor, out: Tensor) -> Call | None:
    plain = rows.is_contiguous() and index.is_contiguous() and out.is_contiguous()
    if not plain or rows.dtype not in CODES or index.dtype != torch.int64:
        return None
    op = Op(kind=Kind.GATHER, dtype=CODES[rows.dtype], n=rows.shape[0], k=rows.shape[1])
    op.size[0] = index.numel()
    return Call(op, rows, index, out, None)


def _map(
    kind: Map, x: Tensor, y: Tensor | None, *, out: Tensor, scalar: float = 0.0
) -> Call | None:
    """out = kind(x, y), broadcast; None where the layouts or types are not the kernel's."""
    if x.dtype not in CODES or out.dtype not in CODES or (y is not None and y.dtype != x.dtype):
        return None
    if x.dtype != out.dtype and kind is not Map.COPY:
        return None
    try:
        strides = [t.expand(out.shape).stride() for t in (x, *([] if y is None else [y]))]
    except RuntimeError:
        return None
    dims = _merged(tuple(out.shape), [tuple(out.stride()), *map(tuple, strides)])
    if len(dims) > MAX_DIMS:
        return None
    dims = [(1, [0] * (len(strides) + 1))] * (MAX_DIMS - len(dims)) + dims
    width, last = dims[-1]
    if width > 1 and (last[0] != 1 or last[1] != 1 or any(s not in (0, 1) for s in last[2:])):
        return None
    op = Op(kind=Kind.MAP, map=kind, dtype=CODES[x.dtype], out_dtype=CODES[out.dtype])
    op.scalar = scalar
    op.size[:] = [size for size, _ in dims]
    op.out_step[:] = [steps[0] for _, steps in dims[:-1]] + [1]
    op.x_step[:] = [steps[1] for _, steps in dims[:-1]] + [1]
    if y is not None:
        op.y_step[:] = [steps[2] for _, steps in dims]
    return Call(op, x, y, out, None)


def _merged(shape: tuple[int, ...], strides: list[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """(size, stride of each tensor), dimensions of one element dropped and neighbours joined.

    Dimensions are ordered by the output's strides, so that the last one lies side by side.
    """
    order = sorted((i for i in range(len(shape)) if shape[i] != 1), key=lambda i: -strides[0][i])
    dims: list[tuple[int, list[int]]] = []
    for i in order:
        steps = [stride[i] for stride in strides]
        if dims and all(
            before == step * shape[i] for before, step in zip(dims[-1][1], steps, strict=True)
        ):
            dims[-1] = (dims[-1][0] * shape[i], steps)
        else:
            dims.append((shape[i], steps))
    return dims or [(1, [1] * len(strides))]
