"""NF4 quantisation and its inverse, bit-equal with bitsandbytes on CPU. Knows flat blocks of 64,
no layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fader_adapters.kernels.native import checks
from fader_adapters.kernels.native.library import CODES, check, library
from fader_adapters.kernels.native.threads import threads
from fader_adapters.kernels.nf4 import BLOCK

NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Nested:
    """Double quantisation of absmax: value = map[codes] * absmax[i // 256] + offset.

    codes uint8 [blocks]; absmax fp32 [ceil(blocks / 256)]; map fp32 [256], sorted; offset a float.
    """

    codes: Tensor
    absmax: Tensor
    map: Tensor
    offset: float


@dataclass(frozen=True, slots=True)
class Quantised:
    """NF4 weights as bitsandbytes stores them: packed uint8 [n, 1], absmax fp32 [blocks] (None
    if nested)."""

    packed: Tensor
    absmax: Tensor | None
    nested: Nested | None
    shape: tuple[int, ...]


def dynamic_map() -> Tensor:
    """bitsandbytes' signed 8-bit dynamic map, fp32 [256], ascending."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (10 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantise_nf4(weight: Tensor, *, nested: bool = False) -> Quantised:
    """Blockwise NF4 of `weight` (fp32, bf16 or fp16, any shape, contiguous), blocks of 64 over the
    flat data.

    nested: also quantise absmax to 8 bits, blocks of 256 around its mean.
    Raises: TypeError, ValueError (empty, not contiguous, NaN or Inf inside).
    """
    checks.tensor("weight", weight, (torch.float32, torch.bfloat16, torch.float16))
    count, nt = weight.numel(), threads()
    if not count:
        raise ValueError("weight must not be empty")
    packed = torch.empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(-(-count // BLOCK), dtype=torch.float32)
    code = library().fader_quantise(
        count, weight.data_ptr(), CODES[weight.dtype], packed.data_ptr(), absmax.data_ptr(), nt
    )
    check(code, "quantise_nf4")
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("weight must be finite, got NaN or Inf")
    shape = tuple(weight.shape)
    if not nested:
        return Quantised(packed, absmax, None, shape)
    return Quantised(packed, None, quantise_absmax(absmax), shape)


def quantise_keeping(weight: Tensor, directions: Tensor, *, strength: float) -> Quantised:
    """Quantise `weight` (fp32 [n, k], k % 64 == 0) so that its product with `directions` is kept.

    directions: fp32 [k, r]. Row by row, left to right: code j is the one nearest to the value that
    minimises e² + strength · ‖Σ errors so far · directions + e · directions[j]‖². strength 0 is
    `quantise_nf4`. Raises: TypeError, ValueError (shapes, NaN or Inf inside).
    """
    checks.tensor("weight", weight, (torch.float32,), shape=(None, None))
    n, k = weight.shape
    checks.tensor("directions", directions, (torch.float32,), shape=(k, None))
    packed = torch.empty((n * k // 2, 1), dtype=torch.uint8)
    absmax = torch.empty(n * k // BLOCK, dtype=torch.float32)
    code = library().fader_quantise_keeping(
        n,
        k,
        weight.data_ptr(),
        directions.data_ptr(),
        directions.shape[1],
        strength,
        packed.data_ptr(),
        absmax.data_ptr(),
        threads(),
    )
    check(code, "quantise_keeping")
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("weight must be finite, got NaN or Inf")
    return Quantised(packed, absmax, None, tuple(weight.shape))


def quantise_absmax(absmax: Tensor) -> Nested:
    """Double quantisation of `absmax` (fp32 [blocks])."""
    checks.tensor("absmax", absmax, (torch.float32,), shape=(None,))
    offset = float(absmax.mean())
    table = dynamic_map()
    codes = torch.empty(absmax.numel(), dtype=torch.uint8)
    top = torch.empty(-(-absmax.numel() // NESTED_BLOCK), dtype=torch.float32)
    code = library().fader_quantise8(
        absmax.numel(),
        absmax.data_ptr(),
        offset,
        table.data_ptr(),
        codes.data_ptr(),
        top.data_ptr(),
        threads(),
    )
    check(code, "quantise_absmax")
    return Nested(codes, top, table, offset)


def dequantise_absmax(nested: Nested) -> Tensor:
    """fp32 [blocks] absmax of a double-quantised weight. Raises: TypeError, ValueError."""
    codes = checks.tensor("nested.codes", nested.codes, (torch.uint8,)).reshape(-1)
    blocks = codes.numel()
    checks.tensor(
        "nested.absmax", nested.absmax, (torch.float32,), shape=(-(-blocks // NESTED_BLOCK),)
    )
    checks.tensor("nested.map", nested.map, (torch.float32,), shape=(256,))
    out = torch.empty(blocks, dtype=torch.float32)
    code = library().fader_dequantise8(
        blocks,
        codes.data_ptr(),
        nested.absmax.data_ptr(),
        nested.map.data_ptr(),
        float(nested.offset),
        out.data_ptr(),
        threads(),
    )
    check(code, "dequantise_absmax")
    return out


def dequantise_nf4(
    packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Dense weights of `shape` in `dtype` (bf16 or fp32): code * absmax in fp32, rounded once.

    packed: bitsandbytes' bytes (uint8, any shape); absmax fp32 [ceil(count / 64)]. Raises:
    TypeError, ValueError.
    """
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    out = torch.empty(shape, dtype=dtype)
    packed_bytes(packed, absmax, out.numel())
    code = library().fader_dequantise(
        out.numel(),
        packed.data_ptr(),
        absmax.data_ptr(),
        out.data_ptr(),
        CODES[dtype],
        threads(),
    )
    check(code, "dequantise_nf4")
    return out


def packed_bytes(packed: Tensor, absmax: Tensor, count: int) -> None:
    """Check packed NF4 bytes and absmax against an element count."""
    checks.tensor("packed", packed, (torch.uint8,))
    checks.tensor("absmax", absmax, (torch.float32,))
    size, blocks = (count + 1) // 2, -(-count // BLOCK)
    if packed.numel() != size:
        raise ValueError(f"packed must hold {size} bytes for {count} weights, got {packed.numel()}")
    if absmax.numel() != blocks:
        raise ValueError(
            f"absmax must hold {blocks} values for {count} weights, got {absmax.numel()}"
        )
