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

int norm(int64_t M, int64_t K, const void *x, int64_t xs, const void *w, int dtype, int about_one, float eps,
         void *y, int nt) {
    if (dtype == FADER_BF16) norm_rows<u16>(M, K, x, xs, w, about_one, eps, y, nt);
    else norm_rows<float>(M, K, x, xs, w, about_one, eps, y, nt);
    return 0;
}

} // namespace
