"""Gains of the base and biases of B in Triton: a delta beside B·A. Knows tiles, no models.

A kernel of its own before `shrink` and `expand`, so that steps of adapters without vectors, which
are most, launch and read nothing for them.
"""

import triton
import triton.language as tl

from fader_adapters.kernels.cuda.lora_places import member_of


@triton.jit(do_not_specialize=["planes", "plane", "linear", "capacity"])
def vectors(
    y: tl.tensor,
    own: tl.tensor,
    arena: tl.tensor,
    header: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    gamma: tl.tensor,
    gain_at: tl.tensor,
    bias_at: tl.tensor,
    scale_at: tl.tensor,
    width_0: int,
    width_1: int,
    width_2: int,
    width_3: int,
    y_stride: int,
    planes: int,
    plane: tl.tensor,
    linear: tl.tensor,
    capacity: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> None:
    """y[token] += G∘(y − own) + Σ_e γ·s·biasB, G = Σ_e γ·gain, over a slot's first entries.

    Of a result that still lies in `planes` parts, `plane` elements apart and without the base's
    bias, each is scaled and the first is shifted.

    Grid (Σ ⌈width_i/BLOCK_N⌉, tiles); programs past the tiles in use return.
    y        [T, Σ width_i] row stride y_stride: the base's result; width_i: 0 when absent
    own      [Σ width_i] the base's own bias, inside y already; read only when HAS_BIAS
    gain_at, bias_at  [linears, capacity] int64 offsets in the arena, −1: none
    The rest as in `expand`. A zero γ selects; rows without a vector keep their bits.
    """
    tile = tl.program_id(1)
    if tile >= tl.load(header):
        return
    member, block, column, width = member_of(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(0), width_0, width_1, width_2, width_3, BLOCK_N
    )
    table = (linear + member).to(tl.int64) * capacity
    lane = tl.arange(0, ROWS)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < width
    token = tl.load(tokens + tile * ROWS + lane)
    present = token >= 0
    gain = tl.full((ROWS, BLOCK_N), 0, tl.float32)
    shift = tl.full((ROWS, BLOCK_N), 0, tl.float32)
    touched = tl.full((ROWS,), 0, tl.int32)
    for entry in tl.range(tl.load(first + tile), tl.load(last + tile), num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        gain_from = tl.load(gain_at + table + entry)
        bias_from = tl.load(bias_at + table + entry)
        if (gain_from >= 0) | (bias_from >= 0):
            weight = tl.load(gamma + entry * LANES + lane % LANES)
            used = present & (weight != 0)
            scaled = weight * tl.load(scale_at + table + entry)
            g = tl.load(arena + gain_from + n, mask=inside & (gain_from >= 0), other=0.0)
            b = tl.load(arena + bias_from + n, mask=inside & (bias_from >= 0), other=0.0)
            wanted = used[:, None]
            gain += tl.where(wanted, weight[:, None] * g.to(tl.float32)[None, :], 0.0)
            shift += tl.where(wanted, scaled[:, None] * b.to(tl.float32)[None, :], 0.0)
            touched = touched | used.to(tl.int32)
    changed = (touched != 0)[:, None] & inside[None, :]
    y_at = y + tl.where(present, token, 0).to(tl.int64)[:, None] * y_stride + (column + n)[None, :]
    for part in tl.range(0, planes, num_stages=1):  # pyright: ignore[reportGeneralTypeIssues]
        part_at = y_at + part * plane.to(tl.int64)
        base = tl.load(part_at, mask=changed, other=0.0).to(tl.float32)
        plain = base
        if HAS_BIAS:
            held = tl.load(own + column + n, mask=inside, other=0.0).to(tl.float32)
            plain = base - held[None, :]
        tl.store(part_at, base + gain * plain + tl.where(part == 0, shift, 0.0), mask=changed)
