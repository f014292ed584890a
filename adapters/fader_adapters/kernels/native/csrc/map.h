// Elementwise work on tensors of up to four dimensions: copies, sums, products, activations. Knows strides
// and one element type a call; rounds once an element, as torch does.
#pragma once
#include <math.h>

#include "simd.h"

namespace {

FADER_INLINE V vsilu(V x) { return vdiv(x, vadd(vset(1.0f), vexp(vmul(x, vset(-1.0f))))); }
FADER_INLINE V vgelu_tanh(V x) { // (1 + tanh(y)) / 2 = sigmoid(2y), which loses no digits below 0
    const V cubed = vmul(vmul(x, x), x);
    return vmul(x, vsigmoid(vmul(vset(1.5957691216057308f), vfma(cubed, vset(0.044715f), x))));
}

// x Phi(x). With u = |x|, Phi(-u) = exp(-u^2/2) r(u): r is smooth, r(u) (2 + 2.5u) a polynomial in (u-3)/(u+3)
// (interpolated up to 14, 4e-8); what rounding takes from u^2 is made up for behind exp
FADER_INLINE V vgelu(V x) {
    const V u = vmin(vset(14.0f), vmax(vmul(x, vset(-1.0f)), x)), square = vmul(u, u);
    const V rest = vfma(vsquare_rest(u, square), vset(-0.5f), vset(1.0f));
    const V e = vmul(vexp(vmul(square, vset(-0.5f))), rest);
    const V t = vdiv(vadd(u, vset(-3.0f)), vadd(u, vset(3.0f)));
    const float c[] = {8.015277573e-3f, 1.368589969e-3f, -5.990039906e-2f, 1.360266785e-1f,
                       -1.026916752e-1f, -1.381159544e-1f, 1.15438249f};
    V y = vfma(vset(-2.120515508e-4f), t, vset(-1.21426681e-3f));
    y = vfma(y, t, vset(-4.758182585e-4f));
    for (int i = 0; i < 7; i++) y = vfma(y, t, vset(c[i]));
    const V below = vdiv(vmul(e, y), vfma(u, vset(2.5f), vset(2.0f)));
    return vmul(x, vwhere_less(x, vzero(), below, vfma(below, vset(-1.0f), vset(1.0f))));
}

// max(x, 0) + log(1 + e) with e = exp(-|x|), the logarithm as 2 artanh(e / (2 + e))
FADER_INLINE V vsoftplus(V x) {
    const V e = vexp(vmin(vmul(x, vset(-1.0f)), x)), s = vdiv(e, vadd(vset(2.0f), e)), z = vmul(s, s);
    V y = vset(1.0f / 15);
    for (int n = 13; n > 0; n -= 2) y = vfma(y, z, vset(1.0f / (float)n));
    return vfma(vmul(s, vset(2.0f)), y, vmax(vzero(), x));
}

FADER_INLINE V vlog(V x) { // few need it: one by one
    float f[W];
    vstore(f, x);
    for (int i = 0; i < W; i++) f[i] = logf(f[i]);
    return vload(f);
}

template <int MAP> FADER_INLINE V mapped(V x, V y) {
    if constexpr (MAP == FADER_MAP_NEG) return vmul(x, vset(-1.0f));
    if constexpr (MAP == FADER_MAP_ADD) return vadd(x, y);
    if constexpr (MAP == FADER_MAP_SUB) return vfma(y, vset(-1.0f), x);
    if constexpr (MAP == FADER_MAP_MUL) return vmul(x, y);
    if constexpr (MAP == FADER_MAP_SILU) return vsilu(x);
    if constexpr (MAP == FADER_MAP_GELU_TANH) return vgelu_tanh(x);
    if constexpr (MAP == FADER_MAP_SIGMOID) return vsigmoid(x);
    if constexpr (MAP == FADER_MAP_SOFTPLUS) return vsoftplus(x);
    if constexpr (MAP == FADER_MAP_EXP) return vexp(x);
    if constexpr (MAP == FADER_MAP_LOG) return vlog(x);
    if constexpr (MAP == FADER_MAP_GELU) return vgelu(x);
    if constexpr (MAP == FADER_MAP_TANH) return vtanh(x);
    return x;
}

// n elements side by side; a tail goes through the same vectors as the rest
template <int MAP, class In, class Out, bool BINARY>
static void map_run(int64_t n, const In *x, const In *y, bool same_y, float scalar, Out *out) {
    int64_t i = 0;
    const V fixed = vset(BINARY && same_y ? load1(y) : scalar);
    for (; i + W <= n; i += W)
        vstore_as(out + i, mapped<MAP>(vload_as(x + i), BINARY && !same_y ? vload_as(y + i) : fixed));
    if (i == n) return;
    In xt[W] = {}, yt[W] = {};
    Out ot[W];
    for (int64_t j = i; j < n; j++) {
        xt[j - i] = x[j];
        if (BINARY && !same_y) yt[j - i] = y[j];
    }
    vstore_as(ot, mapped<MAP>(vload_as(xt), BINARY && !same_y ? vload_as(yt) : fixed));
    for (int64_t j = i; j < n; j++) out[j] = ot[j - i];
}

template <int MAP, class In, class Out, bool BINARY> static void map_all(const fader_op_t &o) {
    const int64_t *size = o.size, *xs = o.x_step, *ys = o.y_step, *os = o.out_step;
    const In *x = (const In *)o.x, *y = (const In *)o.y;
    Out *out = (Out *)o.out;
    for (int64_t a = 0; a < size[0]; a++)
        for (int64_t b = 0; b < size[1]; b++)
            for (int64_t c = 0; c < size[2]; c++) {
                const In *xr = x + a * xs[0] + b * xs[1] + c * xs[2];
                const In *yr = BINARY ? y + a * ys[0] + b * ys[1] + c * ys[2] : 0;
                map_run<MAP, In, Out, BINARY>(size[3], xr, yr, BINARY && !ys[3], o.scalar,
                                              out + a * os[0] + b * os[1] + c * os[2]);
            }
}

template <class T> static int map_typed(const fader_op_t &o) {
    const bool binary = o.y != 0;
    switch (o.map) {
    case FADER_MAP_COPY: map_all<FADER_MAP_COPY, T, T, false>(o); return 0;
    case FADER_MAP_NEG: map_all<FADER_MAP_NEG, T, T, false>(o); return 0;
    case FADER_MAP_SILU: map_all<FADER_MAP_SILU, T, T, false>(o); return 0;
    case FADER_MAP_GELU_TANH: map_all<FADER_MAP_GELU_TANH, T, T, false>(o); return 0;
    case FADER_MAP_SIGMOID: map_all<FADER_MAP_SIGMOID, T, T, false>(o); return 0;
    case FADER_MAP_SOFTPLUS: map_all<FADER_MAP_SOFTPLUS, T, T, false>(o); return 0;
    case FADER_MAP_EXP: map_all<FADER_MAP_EXP, T, T, false>(o); return 0;
    case FADER_MAP_LOG: map_all<FADER_MAP_LOG, T, T, false>(o); return 0;
    case FADER_MAP_GELU: map_all<FADER_MAP_GELU, T, T, false>(o); return 0;
    case FADER_MAP_TANH: map_all<FADER_MAP_TANH, T, T, false>(o); return 0;
    case FADER_MAP_ADD: (binary ? map_all<FADER_MAP_ADD, T, T, true> : map_all<FADER_MAP_ADD, T, T, false>)(o); return 0;
    case FADER_MAP_SUB: (binary ? map_all<FADER_MAP_SUB, T, T, true> : map_all<FADER_MAP_SUB, T, T, false>)(o); return 0;
    case FADER_MAP_MUL: (binary ? map_all<FADER_MAP_MUL, T, T, true> : map_all<FADER_MAP_MUL, T, T, false>)(o); return 0;
    }
    return FADER_E_ARG;
}

int map(const fader_op_t *o) {
    if (o->dtype == o->out_dtype) return o->dtype == FADER_BF16 ? map_typed<u16>(*o) : map_typed<float>(*o);
    if (o->map != FADER_MAP_COPY) return FADER_E_ARG;
    if (o->dtype == FADER_BF16) map_all<FADER_MAP_COPY, u16, float, false>(*o);
    else map_all<FADER_MAP_COPY, float, u16, false>(*o);
    return 0;
}

} // namespace
