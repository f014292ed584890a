// RMS normalisation of rows, rounded where transformers rounds. Knows one row; no models.
#pragma once
#include <math.h>

#include "simd.h"
#include "team.h"

namespace {

FADER_INLINE V round_as(const float *, V v) { return v; }
FADER_INLINE V round_as(const u16 *, V v) {
    u16 t[W];
    vstore_bf16(t, v);
    return vload_bf16(t);
}
FADER_INLINE float round1(const float *, float v) { return v; }
FADER_INLINE float round1(const u16 *, float v) { return from_bf16(to_bf16(v)); }

// y = w * round(x / rms) or, about one, y = (1 + w) * (x / rms); rms = sqrt(mean(x^2) + eps)
template <class Ty>
static void norm_row(int64_t K, const Ty *x, const Ty *w, int about_one, float eps, Ty *y) {
    V squares = vzero();
    int64_t k = 0;
    for (; k + W <= K; k += W) {
        const V v = vload_as(x + k);
        squares = vfma(v, v, squares);
    }
    float total = vsum(squares);
    for (int64_t i = k; i < K; i++) total += load1(x + i) * load1(x + i);
    const float r = 1.0f / sqrtf(total / (float)K + eps);
    for (k = 0; k + W <= K; k += W) {
        const V n = vmul(vload_as(x + k), vset(r)), weight = vload_as(w + k);
        if (about_one) vstore_as(y + k, vmul(n, vadd(vset(1.0f), weight)));
        else vstore_as(y + k, vmul(weight, round_as(x, n)));
    }
    for (; k < K; k++) {
        const float n = load1(x + k) * r, weight = load1(w + k);
        store1(y + k, about_one ? n * (1.0f + weight) : weight * round1(x, n));
    }
}

template <class Ty>
static void norm_rows(int64_t M, int64_t K, const void *x, int64_t xs, const void *w, int about_one, float eps,
                      void *y, int nt) {
    share(M * K > 65536 ? nt : 1, M, [&](int64_t m, int) {
        norm_row<Ty>(K, (const Ty *)x + m * xs, (const Ty *)w, about_one, eps, (Ty *)y + m * K);
    });
}

template <int FLAGS, class Tx, class Tg>
static void gated_norm_row(int64_t K, int64_t group, const Tx *x, const Tg *gate, const float *w, float eps, Tx *y) {
    const auto open = [&](int64_t i) {
        const V g = vload_as(gate + i), s = vsigmoid(g);
        return FLAGS & FADER_GATE_SIGMOID ? s : vmul(g, s);
    };
    const auto input = [&](int64_t i) {
        const V v = vload_as(x + i);
        return FLAGS & FADER_GATE_INSIDE ? vmul(v, open(i)) : v;
    };
    for (int64_t from = 0; from < K; from += group) {
        V squares = vzero();
        for (int64_t i = from; i < from + group; i += W) {
            const V v = input(i);
            squares = vfma(v, v, squares);
        }
        const V r = vset(1.0f / sqrtf(vsum(squares) / (float)group + eps));
        for (int64_t i = from; i < from + group; i += W) {
            const V n = vmul(vmul(input(i), r), vload(w + i));
            vstore_as(y + i, FLAGS & FADER_GATE_INSIDE ? n : vmul(n, open(i)));
        }
    }
}

template <class Tx, class Tg>
static void gated_norm_rows(int64_t M, int64_t K, int64_t group, const void *x, int64_t xs, const void *gate, int64_t gs,
                            const float *w, int flags, float eps, void *y, int nt) {
    const auto row = flags == 0   ? gated_norm_row<0, Tx, Tg>
                     : flags == 1 ? gated_norm_row<1, Tx, Tg>
                     : flags == 2 ? gated_norm_row<2, Tx, Tg>
                                  : gated_norm_row<3, Tx, Tg>;
    const int64_t some = max64(1, 2048 / K); // rows of an item
    share(M * K > 8192 ? nt : 1, ceil_div(M, some), [&](int64_t item, int) {
        for (int64_t m = item * some; m < min64(M, (item + 1) * some); m++)
            row(K, group, (const Tx *)x + m * xs, (const Tg *)gate + m * gs, w, eps, (Tx *)y + m * K);
    });
}

int gated_norm(int64_t M, int64_t K, int64_t group, const void *x, int dtype, int64_t xs, const void *gate, int gd,
               int64_t gs, const float *w, int flags, float eps, void *y, int nt) {
    const auto rows = dtype == FADER_BF16 ? (gd == FADER_BF16 ? gated_norm_rows<u16, u16> : gated_norm_rows<u16, float>)
                                          : (gd == FADER_BF16 ? gated_norm_rows<float, u16> : gated_norm_rows<float, float>);
    rows(M, K, group, x, xs, gate, gs, w, flags, eps, y, nt);
    return 0;
}

int norm(int64_t M, int64_t K, const void *x, int64_t xs, const void *w, int dtype, int about_one, float eps,
         void *y, int nt) {
    if (dtype == FADER_BF16) norm_rows<u16>(M, K, x, xs, w, about_one, eps, y, nt);
    else norm_rows<float>(M, K, x, xs, w, about_one, eps, y, nt);
    return 0;
}

} // namespace
