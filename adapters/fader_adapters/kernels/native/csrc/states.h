// What a sequence leaves behind beside keys and values: the last inputs of a convolution over its tokens, the
// sum of a recurrence. A row goes on from one slot and leaves its state in another. Knows no models.
#pragma once
#include <math.h>

#include "map.h"
#include "norm.h"

namespace {

enum { CONV_CHANNELS = 256, KEYS_MAX = 256, LANES = 4 }; // LANES: sums a column is added up in

// ---- Convolution --------------------------------------------------------------------------------

// token i of a row, or what the row goes on from: i < 0 down to -(taps - 1); NULL is zeros
template <class Ty> struct Past {
    const Ty *x, *state;
    int64_t stride, channels, kept;
    FADER_METHOD const Ty *at(int64_t i) const {
        if (i >= 0) return x + i * stride;
        return state ? state + (kept + i) * channels : 0;
    }
};

template <class Ty>
static void conv_row(const fader_conv_t *s, const Past<Ty> &past, int64_t n, int64_t c0, int64_t c1, Ty *out, Ty *kept) {
    const int64_t C = s->channels, before = s->taps - 1;
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = c0; c < c1; c += W) {
            V sum = s->bias ? vload(s->bias + c) : vzero();
            for (int64_t j = 0; j < s->taps; j++) {
                const Ty *from = past.at(i - before + j);
                if (from) sum = vfma(vload(s->weight + j * C + c), vload_as(from + c), sum);
            }
            if (s->silu) sum = vsilu(round_as(past.x, sum));
            vstore_as(out + i * C + c, sum);
        }
    for (int64_t j = 0; j < before; j++) { // kept is never what `past` reads
        const Ty *from = past.at(n - before + j);
        if (from) memcpy(kept + j * C + c0, from + c0, (size_t)(c1 - c0) * sizeof(Ty));
        else memset(kept + j * C + c0, 0, (size_t)(c1 - c0) * sizeof(Ty));
    }
}

template <class Ty>
static void conv_rows(const fader_conv_t *s, int64_t R, const fader_rows_t *rows, const Ty *x, int64_t xs, Ty *out, int nt) {
    const int64_t C = s->channels, state = (s->taps - 1) * C, blocks = ceil_div(C, CONV_CHANNELS);
    share(nt, R * blocks, [&](int64_t item, int) {
        const int64_t r = item / blocks, c0 = item % blocks * CONV_CHANNELS, first = rows->start[r];
        const int32_t from = rows->from[r];
        Ty *const states = (Ty *)s->states;
        const Past<Ty> past = {x + first * xs, from < 0 ? 0 : states + from * state, xs, C, s->taps - 1};
        conv_row<Ty>(s, past, rows->start[r + 1] - first, c0, min64(C, c0 + CONV_CHANNELS), out + first * C,
                     states + rows->to[r] * state);
    });
}

int conv(const fader_conv_t *s, int64_t R, const fader_rows_t *rows, const void *x, int64_t xs, void *out, int nt) {
    if (s->dtype == FADER_BF16) conv_rows<u16>(s, R, rows, (const u16 *)x, xs, (u16 *)out, nt);
    else conv_rows<float>(s, R, rows, (const float *)x, xs, (float *)out, nt);
    return 0;
}

// ---- Recurrence ---------------------------------------------------------------------------------

// to[0..n) = x[0..n) in fp32; the sum of squares of x
template <class Ty> static float widened(int64_t n, const Ty *x, float *to) {
    V squares = vzero();
    for (int64_t i = 0; i < n; i += W) {
        const V v = vload_as(x + i);
        squares = vfma(v, v, squares);
        vstore(to + i, v);
    }
    return vsum(squares);
}
static void scaled(int64_t n, float *x, float by) {
    for (int64_t i = 0; i < n; i += W) vstore(x + i, vmul(vload(x + i), vset(by)));
}

// the columns of one block over the tokens of a row: src, dst [keys][NV * W]
template <int NV, bool BY_KEY, class Ty, class To>
static void scan_block(const fader_scan_t *s, int64_t n, const Ty *x, int64_t xs, const float *gates, int64_t head,
                       int64_t column, const float *src, float *dst, To *out) {
    enum { WIDE = NV * W };
    float k[KEYS_MAX], q[KEYS_MAX], d[KEYS_MAX], kd[KEYS_MAX];
    const int64_t K = s->keys, group = head / (s->heads / s->groups), decays = s->heads * (BY_KEY ? K : 1);
    for (int64_t i = 0; i < n; i++, x += xs, gates += decays + s->heads, out += s->heads * s->values) {
        const float kk = widened(K, x + s->k + group * K, k), qq = widened(K, x + s->q + group * K, q);
        if (s->unit) {
            scaled(K, k, 1.0f / sqrtf(kk + 1e-6f));
            scaled(K, q, 1.0f / sqrtf(qq + 1e-6f) / sqrtf((float)K));
        }
        const V decay = BY_KEY ? vzero() : vset(expf(gates[head])), strength = vset(gates[decays + head]);
        if (BY_KEY)
            for (int64_t a = 0; a < K; a++) {
                d[a] = expf(gates[head * K + a]);
                kd[a] = k[a] * d[a];
            }
        V given[NV], change[NV], sums[NV][LANES];
        for (int j = 0; j < NV; j++) {
            given[j] = vload_as(x + s->v + head * s->values + column + j * W);
            change[j] = given[j];
            for (int u = 0; u < LANES; u++) sums[j][u] = vzero();
        }
        if (s->delta) {
            for (int64_t a = 0; a < K; a += LANES)
                for (int u = 0; u < LANES; u++)
                    for (int j = 0; j < NV; j++)
                        sums[j][u] = vfma(vset((BY_KEY ? kd : k)[a + u]), vload(src + (a + u) * WIDE + j * W), sums[j][u]);
            for (int j = 0; j < NV; j++) {
                const V found = vadd(vadd(sums[j][0], sums[j][1]), vadd(sums[j][2], sums[j][3]));
                change[j] = vfma(BY_KEY ? found : vmul(found, decay), vset(-1.0f), given[j]);
                for (int u = 0; u < LANES; u++) sums[j][u] = vzero();
            }
        }
        for (int j = 0; j < NV; j++) change[j] = vmul(change[j], strength);
        for (int64_t a = 0; a < K; a += LANES)
            for (int u = 0; u < LANES; u++)
                for (int j = 0; j < NV; j++) {
                    const int64_t at = (a + u) * WIDE + j * W;
                    const V kept = vmul(vload(src + at), BY_KEY ? vset(d[a + u]) : decay);
                    const V state = vfma(vset(k[a + u]), change[j], kept);
                    vstore(dst + at, state);
                    sums[j][u] = vfma(vset(q[a + u]), state, sums[j][u]);
                }
        for (int j = 0; j < NV; j++) {
            V y = vadd(vadd(sums[j][0], sums[j][1]), vadd(sums[j][2], sums[j][3]));
            if (s->skip) y = vfma(vset(s->skip[head]), given[j], y);
            vstore_as(out + head * s->values + column + j * W, y);
        }
        src = dst;
    }
}

template <bool BY_KEY, class Ty, class To>
static void scan_rows(const fader_scan_t *s, int64_t R, const fader_rows_t *rows, const Ty *x, int64_t xs,
                      const float *gates, To *out, int nt) {
    const int64_t wide = s->values % 32 ? 16 : 32, blocks = s->values / wide, each = s->keys * wide;
    const int64_t per_row = s->heads * blocks, decided = s->heads * ((BY_KEY ? s->keys : 1) + 1);
    share(nt, R * per_row, [&](int64_t item, int) {
        const int64_t r = item / per_row, h = item % per_row / blocks, b = item % blocks, first = rows->start[r];
        const int64_t place = item % per_row * each, state = per_row * each;
        float *const dst = s->states + rows->to[r] * state + place;
        const int64_t n = rows->start[r + 1] - first;
        const float *src = dst;
        if (rows->from[r] < 0) memset(dst, 0, (size_t)each * 4);
        else src = s->states + rows->from[r] * state + place;
        if (!n && src != dst) memcpy(dst, src, (size_t)each * 4);
        (wide == 32 ? scan_block<32 / W, BY_KEY, Ty, To> : scan_block<16 / W, BY_KEY, Ty, To>)(
            s, n, x + first * xs, xs, gates + first * decided, h, b * wide, src, dst,
            out + first * s->heads * s->values);
    });
}

template <class Ty, class To>
static int scan_typed(const fader_scan_t *s, int64_t R, const fader_rows_t *rows, const void *x, int64_t xs,
                      const float *gates, void *out, int nt) {
    (s->by_key ? scan_rows<true, Ty, To> : scan_rows<false, Ty, To>)(s, R, rows, (const Ty *)x, xs, gates, (To *)out, nt);
    return 0;
}

int scan(const fader_scan_t *s, int64_t R, const fader_rows_t *rows, const void *x, int dtype, int64_t xs,
         const float *gates, void *out, int od, int nt) {
    if (dtype == FADER_F32) return scan_typed<float, float>(s, R, rows, x, xs, gates, out, nt);
    return (od == FADER_BF16 ? scan_typed<u16, u16> : scan_typed<u16, float>)(s, R, rows, x, xs, gates, out, nt);
}

} // namespace
