"""Rows of logits: the largest, a draw, scores, each in one call. Knows rows and numbers; no
requests."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import (
    CODES,
    DrawStruct,
    LogitsStruct,
    ScoresStruct,
    library,
)
from fader_adapters.kernels.native.workspace import Workspace

MOST = 2**19 - 1
"""Widest row: sums of weights stay within 63 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """How a token is drawn, a row each. Contiguous CPU tensors [R]."""

    heat: Tensor
    """float32, above 0; logits are divided by it."""
    top_k: Tensor
    """int64; below 1 keeps every token."""
    top_p: Tensor
    """float64 in [0, 1]; of what top-k leaves."""
    min_p: Tensor
    """float64 in [0, 1]; of the likeliest."""
    key: Tensor
    """int64: decides, with a token's number, what is added to its logit."""


def largest(x: Tensor, *, scratch: Workspace) -> tuple[Tensor, Tensor]:
    """Maximum [R] float32 and its lowest index [R] int64 of every row of x [R, n].

    x bf16 or fp32, rows may be strided. NaN where a row holds one. Raises: TypeError, ValueError.
    """
    logits = _logits(x, None)
    best = torch.empty(len(x))
    tokens = torch.empty(len(x), dtype=torch.int64)
    _call("fader_largest", logits, len(x), best.data_ptr(), tokens.data_ptr(), scratch=scratch)
    return best, tokens


def draw(x: Tensor, draws: Draws, *, scratch: Workspace, rows: Tensor | None = None) -> Tensor:
    """A token [R] int64 of each of `rows` [R] int64 (None: all) of x [M, n]; 0 in a row whose
    maximum is not finite.

    Gumbel-max: that of the largest (x − max x)/heat − log(−log u), where u in (0, 1) has the upper
    52 bits of output number `token` of a SplitMix64 generator that starts at the row's key; of
    those that top-k, top-p and min-p leave. There a token weighs floor(2^44·exp((x − max x)/heat)),
    and all that are tied at an edge stay. Raises: TypeError, ValueError.
    """
    count = len(x) if rows is None else len(rows)
    logits = _logits(x, rows)
    tokens = torch.empty(count, dtype=torch.int64)
    given = DrawStruct(tokens=tokens.data_ptr())
    for name, dtype in _DRAWS.items():
        value = checks.tensor(name, getattr(draws, name), (dtype,), shape=(count,))
        setattr(given, name, value.data_ptr())
    _call("fader_draw", logits, ctypes.byref(given), count, scratch=scratch)
    return tokens


def score(
    x: Tensor, tokens: Tensor, top: int, *, scratch: Workspace, rows: Tensor | None = None
) -> Tensor:
    """[R, 1 + 2·min(top, n)] float64: logprob of tokens [R] int64 under each of `rows` [R] int64
    (None: all) of x [M, n], numbers of the likeliest, equal ones by lowest, and their logprobs.

    Logprobs are NaN in rows whose maximum is not finite. Raises: TypeError, ValueError.
    """
    count = len(x) if rows is None else len(rows)
    logits = _logits(x, rows)
    checks.tensor("tokens", tokens, (torch.int64,), shape=(count,))
    top = min(top, x.shape[1])
    out = torch.empty(count, 1 + 2 * top, dtype=torch.float64)
    given = ScoresStruct(tokens=tokens.data_ptr(), out=out.data_ptr(), top=top)
    _call("fader_score", logits, ctypes.byref(given), count, scratch=scratch)
    return out


_DRAWS = {
    "heat": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float64,
    "key": torch.int64,
}


def _logits(x: Tensor, rows: Tensor | None) -> LogitsStruct:
    checks.inputs("x", x, checks.FLOATS, x.shape[-1])
    given = LogitsStruct(x=x.data_ptr(), rows=x.shape[0], n=x.shape[1])
    given.stride, given.dtype = checks.row_stride(x), CODES[x.dtype]
    if rows is not None:
        given.index = checks.tensor("rows", rows, (torch.int64,), shape=(None,)).data_ptr()
    return given


def _call(function: str, logits: LogitsStruct, *args: object, scratch: Workspace) -> None:
    scratch.call(getattr(library(), function), function, ctypes.byref(logits), *args)
