// A plain weight matrix [N,K] times few rows: weights are read once, in order. For lm_head and merged
// bf16 layers. Every dot product has one shape, so a row's bits do not depend on the number of rows.
#pragma once
#include "simd.h"
#include "team.h"

namespace {

enum { DENSE_AHEAD = 1024, DENSE_COLUMNS = 64 };

template <int COUNT> static void sums(const V *acc, float *out) {
#if FADER_ISA >= 2
    if constexpr (COUNT > 2 && COUNT <= 16) {
        V all[16];
        float totals[16];
        for (int i = 0; i < 16; i++) all[i] = i < COUNT ? acc[i] : vzero();
        vsum16(all, totals);
        for (int i = 0; i < COUNT; i++) out[i] = totals[i];
        return;
    }
#endif
    for (int i = 0; i < COUNT; i++) out[i] = vsum(acc[i]);
}

// The rows of the weight are read one after the other: one stream is what the prefetchers follow best.
template <class Ty, int MR, int NR>
static void dense_tile(int64_t K, const Ty *const *x, const Ty *w, float *out) {
    typedef Step<Ty, Ty> S;
    V acc[MR * NR];
    int64_t k = 0;
    for (int n = 0; n < NR; n++) {
        const Ty *row = w + n * K;
        V sum[MR];
        for (int m = 0; m < MR; m++) sum[m] = vzero();
        for (k = 0; k + S::SIZE <= K; k += S::SIZE) {
            typename S::Reg wv = S::y(row + k);
            prefetch(row + k + DENSE_AHEAD);
            for (int m = 0; m < MR; m++) sum[m] = S::dot(sum[m], S::x(x[m] + k), wv);
        }
        for (int m = 0; m < MR; m++) acc[m * NR + n] = sum[m];
    }
    sums<MR * NR>(acc, out);
    for (int m = 0; m < MR; m++)
        for (int n = 0; n < NR; n++)
            for (int64_t i = k; i < K; i++)
                out[m * NR + n] += load1(x[m] + i) * load1(w + n * K + i);
}

template <class Ty, int MR, int NR>
static void dense_rows(int m, int64_t K, const Ty *const *x, const Ty *w, float *out) {
    if constexpr (MR > 1) {
        if (m < MR) return dense_rows<Ty, MR - 1, NR>(m, K, x, w, out);
    }
    dense_tile<Ty, MR, NR>(K, x, w, out);
}

// MR x NR sums fill the registers: wide tiles for few rows, tall ones for more
template <class Ty, class Out, int MR, int NR>
static void dense_run(int64_t M, int64_t N, int64_t K, const Ty *x, int64_t xs, const Ty *w,
                      const float *bias, Out *y, int64_t ys, int nt) {
    const int64_t parts = ceil_div(M, MR);
    const auto columns = [&](int64_t n0) {
        const int nn = (int)min64(NR, N - n0);
        for (int64_t i = 0, m0 = 0; i < parts; i++) {
            const int64_t m1 = M * (i + 1) / parts;
            const int mm = (int)(m1 - m0);
            const Ty *xp[MR];
            float out[MR * NR];
            for (int m = 0; m < mm; m++) xp[m] = x + (m0 + m) * xs;
            if (nn == NR) dense_rows<Ty, MR, NR>(mm, K, xp, w + n0 * K, out);
            else
                for (int n = 0; n < nn; n++) {
                    float one[MR];
                    dense_rows<Ty, MR, 1>(mm, K, xp, w + (n0 + n) * K, one);
                    for (int m = 0; m < mm; m++) out[m * NR + n] = one[m];
                }
            for (int m = 0; m < mm; m++)
                for (int n = 0; n < nn; n++)
                    store1(y + (m0 + m) * ys + n0 + n, out[m * NR + n] + (bias ? bias[n0 + n] : 0.0f));
            m0 = m1;
        }
    };
    share(nt, ceil_div(N, DENSE_COLUMNS), [&](int64_t i, int) {
        for (int64_t n0 = i * DENSE_COLUMNS, end = min64(N, n0 + DENSE_COLUMNS); n0 < end; n0 += NR) columns(n0);
    });
}

template <class Ty, class Out>
static int dense_shaped(int64_t M, int64_t N, int64_t K, const void *x, int64_t xs, const void *w,
                        const float *bias, void *y, int64_t ys, int nt) {
    const Ty *xt = (const Ty *)x, *wt = (const Ty *)w;
    if (W < 16) dense_run<Ty, Out, 3, 4>(M, N, K, xt, xs, wt, bias, (Out *)y, ys, nt);
    else if (M <= 2) dense_run<Ty, Out, 2, 1>(M, N, K, xt, xs, wt, bias, (Out *)y, ys, nt); // one stream
    else dense_run<Ty, Out, 8, 2>(M, N, K, xt, xs, wt, bias, (Out *)y, ys, nt);
    return 0;
}
template <class Ty>
static int dense_typed(int64_t M, int64_t N, int64_t K, const void *x, int64_t xs, const void *w,
                       const float *bias, void *y, int yd, int64_t ys, int nt) {
    if (yd == FADER_F32) return dense_shaped<Ty, float>(M, N, K, x, xs, w, bias, y, ys, nt);
    return dense_shaped<Ty, u16>(M, N, K, x, xs, w, bias, y, ys, nt);
}
int dense(int64_t M, int64_t N, int64_t K, const void *x, int64_t xs, const void *w, int dtype,
          const float *bias, void *y, int yd, int64_t ys, int nt) {
    if (dtype == FADER_BF16) return dense_typed<u16>(M, N, K, x, xs, w, bias, y, yd, ys, nt);
    return dense_typed<float>(M, N, K, x, xs, w, bias, y, yd, ys, nt);
}

} // namespace
