// One tile of 32 cached tokens against a few queries: scores, softmax update, weighted sum. Knows one
// tile; the walk over blocks, rows and splits is attention.h's.
#pragma once
#include "simd.h"

namespace {

enum { KT = 32, KV = KT / W };

// One (query, head) pair's running softmax.
struct Query {
    const void *q; // [dim]
    int64_t lo, hi; // positions [lo, hi) it sees
    float m, l;     // maximum and sum so far; m = -inf: nothing seen
    float *acc;     // [value_dim]
};

#if FADER_ISA >= 2
FADER_INLINE void transpose_lanes(const u32 *const *from, int64_t j, u32 *to) { // 16 x 16 words
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from[i] + j);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + 2 + h]);
            a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + 2 + h]);
        }
    for (int i = 0; i < 4; i++) { // a[i + 4g]: column i, i+4, .. of rows 4g .. 4g+3
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * KT, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * KT, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * KT, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * KT, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}
#else
FADER_INLINE void transpose_lanes(const u32 *const *from, int64_t j, u32 *to) {
    for (int i = 0; i < W; i++)
        for (int c = 0; c < W; c++) to[c * KT + i] = from[i][j + c];
}
#endif

// tokens [0, n) of a tile, `words` 32-bit words each -> kt[words][KT]; missing tokens are zero
static void transpose_tile(const u32 *const *rows, int n, int64_t words, u32 *kt) {
    for (int t = 0; t < KT; t += W) {
        int64_t j = 0;
        if (t + W <= n)
            for (; j + W <= words; j += W) transpose_lanes(rows + t, j, kt + j * KT + t);
        for (; j < words; j++)
            for (int i = t; i < t + W; i++) kt[j * KT + i] = i < n ? rows[i][j] : 0;
    }
}

// scores[m][KT] = scale * q[m] . k[token], soft-capped
template <class Ty, int MR>
static void score_rows(const Query *q, int64_t words, const u32 *kt, float scale, float cap, float *s) {
    V acc[MR][KV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < KV; v++) acc[m][v] = vzero();
    for (int64_t j = 0; j < words; j++)
        for (int v = 0; v < KV; v++) {
            const u32 *k = kt + j * KT + v * W;
            for (int m = 0; m < MR; m++) {
                if constexpr (sizeof(Ty) == 2) acc[m][v] = pdot(acc[m][v], pload((const u16 *)k), pset(((const u32 *)q[m].q)[j]));
                else acc[m][v] = vfma(vload((const float *)k), vset(((const float *)q[m].q)[j]), acc[m][v]);
            }
        }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < KV; v++) {
            V x = vmul(acc[m][v], vset(scale));
            if (cap != 0.0f) x = vmul(vset(cap), vtanh(vmul(x, vset(1.0f / cap))));
            vstore(s + m * KT + v * W, x);
        }
}
template <class Ty>
static void scores(const Query *q, int count, int64_t words, const u32 *kt, float scale, float cap, float *s) {
    enum { MR = W == 16 ? 8 : 2 };
    int m = 0;
    for (; m + MR <= count; m += MR) score_rows<Ty, MR>(q + m, words, kt, scale, cap, s + m * KT);
    if (MR > 4 && m + 4 <= count) score_rows<Ty, 4>(q + m, words, kt, scale, cap, s + m * KT), m += 4;
    for (; m < count; m++) score_rows<Ty, 1>(q + m, words, kt, scale, cap, s + m * KT);
}

// online softmax of tile positions [pos, pos+KT): s becomes the weights, 0 outside [lo, hi)
static void soften(Query &q, int64_t pos, int64_t dim, float *s) {
    const int lo = (int)max64(0, min64(KT, q.lo - pos)), hi = (int)max64(0, min64(KT, q.hi - pos));
    for (int i = 0; i < lo; i++) s[i] = -__builtin_inff();
    for (int i = hi; i < KT; i++) s[i] = -__builtin_inff();
    if (lo >= hi) return;
    V top = vload(s);
    for (int v = 1; v < KV; v++) top = vmax(top, vload(s + v * W));
    const float seen = vtop(top), m = q.m > seen ? q.m : seen;
    V sum = vzero();
    for (int v = 0; v < KV; v++) {
        V p = vexp(vadd(vload(s + v * W), vset(-m)));
        vstore(s + v * W, p);
        sum = vadd(sum, p);
    }
    if (m != q.m) {
        float f[W];
        vstore(f, vexp(vset(q.m - m)));
        q.l *= f[0];
        for (int64_t d = 0; d < dim; d += W) vstore(q.acc + d, vmul(vload(q.acc + d), vset(f[0])));
        q.m = m;
    }
    q.l += vsum(sum);
}

// acc[m] += sum over tokens [t0, t1) of s[m][t] * v[t], token after token
template <class Ty, int MR, int CV>
FADER_INLINE void weigh_cols(Query *q, const float *s, const Ty *const *rows, int t0, int t1, int64_t d) {
    V acc[MR][CV];
    for (int m = 0; m < MR; m++)
        for (int c = 0; c < CV; c++) acc[m][c] = vload(q[m].acc + d + c * W);
    for (int t = t0; t < t1; t++)
        for (int c = 0; c < CV; c++) {
            V v = vload_as(rows[t] + d + c * W);
            for (int m = 0; m < MR; m++) acc[m][c] = vfma(vset(s[m * KT + t]), v, acc[m][c]);
        }
    for (int m = 0; m < MR; m++)
        for (int c = 0; c < CV; c++) vstore(q[m].acc + d + c * W, acc[m][c]);
}
template <class Ty, int MR>
static void weigh_rows(Query *q, const float *s, const Ty *const *rows, int t0, int t1, int64_t dim) {
    enum { CV = W == 16 ? 4 : 2 };
    if (t0 >= t1) return;
    int64_t d = 0;
    for (; d + CV * W <= dim; d += CV * W) weigh_cols<Ty, MR, CV>(q, s, rows, t0, t1, d);
    for (; d < dim; d += W) weigh_cols<Ty, MR, 1>(q, s, rows, t0, t1, d);
}
// tokens that only some of the queries see go query by query: 0 * NaN must not reach the others
template <class Ty>
static void weigh(Query *q, int count, const float *s, const Ty *const *rows, int64_t pos, int64_t dim) {
    enum { MR = 4 };
    for (int m = 0; m < count; m += MR) {
        const int n = (int)min64(MR, count - m);
        int lo[MR], hi[MR], top = 0, end = KT;
        for (int i = 0; i < n; i++) {
            lo[i] = (int)max64(0, min64(KT, q[m + i].lo - pos));
            hi[i] = (int)max64(lo[i], min64(KT, q[m + i].hi - pos));
            top = lo[i] > top ? lo[i] : top;
            end = hi[i] < end ? hi[i] : end;
        }
        if (n < MR || top >= end) {
            for (int i = 0; i < n; i++) weigh_rows<Ty, 1>(q + m + i, s + (m + i) * KT, rows, lo[i], hi[i], dim);
            continue;
        }
        for (int i = 0; i < n; i++) weigh_rows<Ty, 1>(q + m + i, s + (m + i) * KT, rows, lo[i], top, dim);
        weigh_rows<Ty, MR>(q + m, s + m * KT, rows, top, end, dim);
        for (int i = 0; i < n; i++) weigh_rows<Ty, 1>(q + m + i, s + (m + i) * KT, rows, end, hi[i], dim);
    }
}

} // namespace
