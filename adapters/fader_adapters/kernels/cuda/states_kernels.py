"""Convolutions and recurrences over the tokens of each row, from slot to slot, in Triton.

One compiled form of a kernel does whatever a row holds: neither a step's size nor the alignment of
what it is given chooses another, so a row's bits are its own.
"""
# ruff: noqa: ANN001, ANN201, ANN202
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _past(x, state, at, came_from, x_row, channels, inside, BEFORE: tl.constexpr):
    """Inputs of token `at` of a row, or, before its first, of the state it goes on from."""
    new = tl.load(x + at * x_row, mask=inside & (at >= 0), other=0.0)
    known = inside & (at < 0) & (came_from >= 0)
    old = tl.load(state + (BEFORE + at) * channels, mask=known, other=0.0)
    return tl.where(at >= 0, new, old)


@triton.jit(
    do_not_specialize=["x_row", "channels"],
    do_not_specialize_on_alignment=["x", "out", "start", "came_from", "to"],
)
def conv_kernel(
    x,
    weight,
    bias,
    states,
    out,
    start,
    came_from,
    to,
    x_row,
    channels,
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = bias + Σ_j weight[j]·x[t − TAPS + 1 + j] over a row's own tokens, in fp32, rounded;
    then SiLU of that, rounded.

    Grid (⌈channels/BLOCK⌉, programs that take turns with a row's tokens, rows).
    x [T, channels] rows x_row apart; out [T, channels]; weight [TAPS, channels], bias [channels]
    fp32; states [slots, TAPS − 1, channels], the last inputs; start [rows + 1], came_from and to
    [rows] int32: below 0 a row begins with zeros, and leaves nothing
    """
    row = tl.program_id(2)
    part, parts = tl.program_id(1), tl.num_programs(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    before: tl.constexpr = TAPS - 1
    first = tl.load(start + row)
    tokens = tl.load(start + row + 1) - first
    source, target = tl.load(came_from + row), tl.load(to + row)
    own = x + first.to(tl.int64) * x_row + at
    state = states + source.to(tl.int64) * before * channels + at
    made = out + first.to(tl.int64) * channels + at
    for i in range(part, tokens, parts):
        total = tl.zeros((BLOCK,), tl.float32)
        if BIASED:
            total = tl.load(bias + at, mask=inside, other=0.0)
        for j in tl.static_range(TAPS):
            some = _past(own, state, i - before + j, source, x_row, channels, inside, before)
            w = tl.load(weight + j * channels + at, mask=inside, other=0.0)
            total = tl.fma(w, some.to(tl.float32), total)
        if SILU:
            y = total.to(out.dtype.element_ty).to(tl.float32)
            small = tl.exp(-tl.abs(y))  # never overflows
            total = y * tl.where(y < 0, small, 1.0) / (1.0 + small)
        tl.store(made + i * channels, total.to(out.dtype.element_ty), mask=inside)
    if (part == 0) & (target >= 0):
        kept = states + target.to(tl.int64) * before * channels + at
        for j in tl.static_range(before):
            last = _past(own, state, tokens - before + j, source, x_row, channels, inside, before)
            tl.store(kept + j * channels, last, mask=inside)


@triton.jit
def _token(
    x, q_at, k_at, v_at, gates, decays, strength, keys, values, there, in_keys, in_values,
    BY_KEY: tl.constexpr,
):  # fmt: skip
    """q, k, v, e^g (of each key, beside values) and β of one token and head, in fp32."""
    q = tl.load(x + q_at + keys, mask=in_keys & there, other=0.0).to(tl.float32)
    k = tl.load(x + k_at + keys, mask=in_keys & there, other=0.0).to(tl.float32)
    v = tl.load(x + v_at + values, mask=in_values & there, other=0.0).to(tl.float32)
    if BY_KEY:
        g = tl.load(gates + decays + keys, mask=in_keys & there, other=0.0)[:, None]
    else:
        g = tl.load(gates + decays, mask=there, other=0.0)
    return q, k, v, tl.exp(g), tl.load(gates + strength, mask=there, other=0.0)


@triton.jit(
    do_not_specialize=["x_row", "q_at", "k_at", "v_at", "heads", "share"],
    do_not_specialize_on_alignment=["x", "gates", "out", "start", "came_from", "to"],
)
def scan_kernel(
    x,
    gates,
    skip,
    states,
    out,
    start,
    came_from,
    to,
    x_row,
    q_at,
    k_at,
    v_at,
    heads,
    share,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEYS_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    UNIT: tl.constexpr,
    BY_KEY: tl.constexpr,
    SKIPS: tl.constexpr,
):
    """Token by token S ← e^g·S + k·uᵀ and out = Sᵀ·q (+ skip·v), u = β·(v − (e^g·S)ᵀ·k), or β·v
    without DELTA, all in fp32; UNIT: k ← k/√(k·k + 1e-6), q the same and over √KEYS.

    Grid (⌈VALUES/BLOCK⌉, heads, rows): a block of a head's columns stays in registers over all of
    a row's tokens, while the next token is on its way.
    x [T, …] rows x_row apart: q and k [heads/share, KEYS] and v [heads, VALUES] of a token begin
    at q_at, k_at and v_at; gates fp32 [T, decays + heads]: g, one a head or BY_KEY one a key, then
    β; out [T, heads, VALUES]; skip fp32 [heads]; states fp32 [slots, heads, KEYS, VALUES]; start
    [rows + 1], came_from and to [rows] int32: below 0 a row begins with zeros, and leaves nothing
    """
    head, row = tl.program_id(1), tl.program_id(2)
    keys = tl.arange(0, KEYS_PAD)
    values = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_keys, in_values = keys < KEYS, values < VALUES
    inside = in_keys[:, None] & in_values[None, :]
    place = head * (KEYS * VALUES) + keys[:, None] * VALUES + values[None, :]
    first = tl.load(start + row)
    tokens = tl.load(start + row + 1) - first
    source, target = tl.load(came_from + row), tl.load(to + row)
    slot = (heads * (KEYS * VALUES)).to(tl.int64)
    s = tl.load(states + source * slot + place, mask=inside & (source >= 0), other=0.0)
    group = head // share
    q_at += group * KEYS
    k_at += group * KEYS
    v_at += head * VALUES
    decays = head
    strength = heads + head
    if BY_KEY:
        decays = head * KEYS
        strength = heads * KEYS + head
    width = strength - head + heads
    own = x + first.to(tl.int64) * x_row
    given = gates + first.to(tl.int64) * width
    made = out + (first.to(tl.int64) * heads + head) * VALUES + values
    direct = 0.0
    if SKIPS:
        direct = tl.load(skip + head)
    q, k, v, d, beta = _token(
        own, q_at, k_at, v_at, given, decays, strength, keys, values, tokens > 0,
        in_keys, in_values, BY_KEY,
    )  # fmt: skip
    for i in range(tokens):
        own += x_row
        given += width
        q_next, k_next, v_next, d_next, beta_next = _token(
            own, q_at, k_at, v_at, given, decays, strength, keys, values, i + 1 < tokens,
            in_keys, in_values, BY_KEY,
        )  # fmt: skip
        if UNIT:
            k = k * (1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6))
            q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) + 1e-6)) * (KEYS**-0.5)
        s = s * d
        change = v
        if DELTA:
            change = v - tl.sum(s * k[:, None], 0)
        s = s + k[:, None] * (change * beta)[None, :]
        y = tl.sum(s * q[:, None], 0)
        if SKIPS:
            y = y + direct * v
        tl.store(made, y.to(out.dtype.element_ty), mask=in_values)
        made += heads * VALUES
        q, k, v, d, beta = q_next, k_next, v_next, d_next, beta_next
    if target >= 0:
        tl.store(states + target * slot + place, s, mask=inside)
