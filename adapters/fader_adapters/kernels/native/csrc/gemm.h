// One panel times many rows: acc[m][32] = x[m] . W[panel]^T in fp32, over NF4 codes or plain weights.
// Knows nothing of threads, members or adapters.
//
// Every row's sum has one shape, whatever tile it falls in: inside a block of 64 a chain of fused
// multiply-adds over k, then acc = t * absmax + acc (plain: acc + t), blocks in order. That is what makes a row's bits
// independent of the number of rows.
#pragma once
#include "simd.h"

namespace {

// x as the kernels read it: row m, block b starts at p + m * row + b * blk (elements of X).
template <class X> struct Rows {
    const X *p;
    int64_t row, blk;
};

#if FADER_ISA >= 3
// bf16: one u32 per pair (k, k+1); codes as bf16 by vpermw, absmax in fp32 after the block.
struct LutBf {
    __m512i t;
    LutBf() {
        alignas(64) u16 c[32];
        for (int i = 0; i < 32; i++) c[i] = to_bf16(NF4[i & 15]);
        t = _mm512_load_si512(c);
    }
};
FADER_INLINE void decode_pair(const LutBf &lut, const uint8_t *w, P *v) {
    __m512i q = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)w));
    v[0] = (P)_mm512_permutexvar_epi16(q, lut.t);
    v[1] = (P)_mm512_permutexvar_epi16(_mm512_srli_epi16(q, 4), lut.t);
}
struct Bf {
    typedef u32 X;
    typedef LutBf Lut;
    // decoding hides behind the dot products, so every tile decodes for itself
    enum { CV = 2, STEP = 1, FUSED = 12, BUF = 0, PAIR = PANEL, SCALED = 1 };
    template <int MR, int C> FADER_INLINE void pair(const Lut &lut, const uint8_t *w, const u32 *x,
                                                    int64_t row, V t[MR][C]) {
        P v[2];
        decode_pair(lut, w, v);
        for (int m = 0; m < MR; m++) {
            P xv = pset(x[m * row]);
            t[m][0] = pdot(t[m][0], v[0], xv);
            t[m][1] = pdot(t[m][1], v[1], xv);
        }
    }
};
#endif

// fp32: two floats per pair, exact codes. The 32 bytes of a pair are 16 words of 16 bits: nibbles
// (k, col j), (k, col j+16), (k+1, col j), (k+1, col j+16).
struct LutF {
#if FADER_ISA >= 2
    V t;
    LutF() : t(vload(NF4)) {}
    FADER_METHOD V at(I q) const { return _mm512_permutexvar_ps(q, t); }
#elif FADER_ISA == 1
    V lo, hi;
    LutF() : lo(vload(NF4)), hi(vload(NF4 + 8)) {}
    FADER_METHOD V at(I q) const {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lo, q), _mm256_permutevar8x32_ps(hi, q),
                                _mm256_castsi256_ps(_mm256_slli_epi32(q, 28)));
    }
#endif
};
#if FADER_ISA >= 2
FADER_INLINE I words(const uint8_t *w, int c) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(w + 32 * c)));
}
FADER_INLINE I shifted(I q, int s) { return _mm512_srli_epi32(q, (unsigned)s); }
#elif FADER_ISA == 1
FADER_INLINE I words(const uint8_t *w, int c) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(w + 16 * c)));
}
FADER_INLINE I shifted(I q, int s) { return _mm256_srli_epi32(q, s); }
#endif
// element `odd` of the pair, vector c of the 32 columns
FADER_INLINE V decode_f(const LutF &lut, const uint8_t *w, int odd, int c) {
#if FADER_ISA >= 1
    const int half = 16 / W; // vectors in 16 columns
    return lut.at(shifted(words(w, c % half), 8 * odd + 4 * (c / half)));
#else
    (void)lut;
    V r;
    for (int i = 0; i < W; i++) {
        int col = c * W + i;
        r.f[i] = NF4[(w[2 * (col & 15) + odd] >> (col & 16 ? 4 : 0)) & 15];
    }
    return r;
#endif
}
struct Fp {
    typedef float X;
    typedef LutF Lut;
    enum { CV = 32 / W, STEP = 2, BUF = 64 * 32 * 4, PAIR = PANEL, SCALED = 1 };
    enum { FUSED = W == 16 ? 10 : 2, TILE = W == 16 ? 12 : 3 };
    template <int MR, int C> FADER_INLINE void pair(const Lut &lut, const uint8_t *w, const float *x,
                                                    int64_t row, V t[MR][C]) {
        for (int odd = 0; odd < 2; odd++)
            for (int c = 0; c < C; c++) {
                V v = decode_f(lut, w, odd, c);
                for (int m = 0; m < MR; m++) t[m][c] = vfma(v, vset(x[m * row + odd]), t[m][c]);
            }
    }
    FADER_INLINE void decode(const Lut &lut, const uint8_t *w, void *buf) {
        float *o = (float *)buf;
        for (int i = 0; i < 64; i++)
            for (int c = 0; c < CV; c++)
                vstore(o + i * 32 + c * W, decode_f(lut, w + (i >> 1) * 32, i & 1, c));
    }
    template <int MR, int C> FADER_INLINE void buffered(const void *buf, int i, const float *x,
                                                        int64_t row, V t[MR][C]) {
        for (int odd = 0; odd < 2; odd++) {
            V xv[MR];
            for (int m = 0; m < MR; m++) xv[m] = vset(x[m * row + odd]);
            for (int c = 0; c < C; c++) {
                V v = vload((const float *)buf + (2 * i + odd) * 32 + c * W);
                for (int m = 0; m < MR; m++) t[m][c] = vfma(v, xv[m], t[m][c]);
            }
        }
    }
};

// Plain weights, a pair (k, k+1) of 32 columns side by side: bf16 as words of two, fp32 k after k.
struct NoLut {};
struct PlainBf {
    typedef u32 X;
    typedef NoLut Lut;
    enum { CV = 32 / W, STEP = 1, FUSED = W == 16 ? 12 : 3, BUF = 0, PAIR = 4 * PANEL, SCALED = 0 };
    template <int MR, int C> FADER_INLINE void pair(const Lut &, const uint8_t *w, const u32 *x,
                                                    int64_t row, V t[MR][C]) {
        P v[C];
        for (int c = 0; c < C; c++) v[c] = pload((const u16 *)(w + c * W * 4));
        for (int m = 0; m < MR; m++) {
            P xv = pset(x[m * row]);
            for (int c = 0; c < C; c++) t[m][c] = pdot(t[m][c], v[c], xv);
        }
    }
};
struct PlainFp {
    typedef float X;
    typedef NoLut Lut;
    enum { CV = 32 / W, STEP = 2, FUSED = W == 16 ? 12 : 3, BUF = 0, PAIR = 8 * PANEL, SCALED = 0 };
    template <int MR, int C> FADER_INLINE void pair(const Lut &, const uint8_t *w, const float *x,
                                                    int64_t row, V t[MR][C]) {
        for (int odd = 0; odd < 2; odd++)
            for (int c = 0; c < C; c++) {
                V v = vload((const float *)w + odd * PANEL + c * W);
                for (int m = 0; m < MR; m++) t[m][c] = vfma(v, vset(x[m * row + odd]), t[m][c]);
            }
    }
};

enum { AHEAD = 4096 }; // bytes of one stream to prefetch ahead
template <class E> struct Gemm {
    typedef typename E::X X;
    typedef typename E::Lut Lut;
    enum { C = E::CV, PAIRS = BLOCK / 2, BLOCK_BYTES = PAIRS * E::PAIR };

    template <int N> static constexpr bool in_registers() { return N * C * 2 <= (W == 16 ? 26 : 10); }

    // MR rows, NP neighbouring panels (side by side they hide the latency of few rows), decoded in
    // registers as they stream by
    template <int MR, int NP>
    static void fused(int64_t K, Rows<X> x, const uint8_t *w, const float *am, float *acc, int64_t as) {
        const Lut lut;
        const int64_t blocks = K / BLOCK, wp = K / 2 * E::PAIR, ap = blocks * PANEL;
        V sum[NP][MR][C];
        for (int p = 0; p < NP; p++)
            for (int m = 0; m < MR; m++)
                for (int c = 0; c < C; c++) {
                    sum[p][m][c] = vzero();
                    if (!in_registers<MR * NP>()) vstore(acc + m * as + p * PANEL + c * W, vzero());
                }
        for (int64_t b = 0; b < blocks; b++) {
            V t[NP][MR][C];
            for (int p = 0; p < NP; p++)
                for (int m = 0; m < MR; m++)
                    for (int c = 0; c < C; c++) t[p][m][c] = vzero();
            const X *xb = x.p + b * x.blk;
            const uint8_t *wb = w + b * BLOCK_BYTES;
            // past a panel's end its stream goes on NP panels further
            const uint8_t *ahead = wb + AHEAD + (b * BLOCK_BYTES + AHEAD < wp ? 0 : (NP - 1) * wp);
            for (int i = 0; i < PAIRS; i += 2)
#pragma GCC unroll 2
                for (int p = 0; p < NP; p++) {
                    const uint8_t *wi = wb + p * wp + i * E::PAIR;
                    for (int line = 0; line < 2 * E::PAIR; line += 64) prefetch(ahead + p * wp + i * E::PAIR + line);
                    E::template pair<MR, C>(lut, wi, xb + i * E::STEP, x.row, t[p]);
                    E::template pair<MR, C>(lut, wi + E::PAIR, xb + (i + 1) * E::STEP, x.row, t[p]);
                }
            for (int p = 0; p < NP; p++)
                for (int c = 0; c < C; c++) {
                    V s = E::SCALED ? vload(am + p * ap + b * PANEL + c * W) : vzero();
                    const auto add = [&](V part, V all) { return E::SCALED ? vfma(part, s, all) : vadd(part, all); };
                    for (int m = 0; m < MR; m++) {
                        float *a = acc + m * as + p * PANEL + c * W;
                        if (in_registers<MR * NP>()) sum[p][m][c] = add(t[p][m][c], sum[p][m][c]);
                        else vstore(a, add(t[p][m][c], vload(a)));
                    }
                }
        }
        if (in_registers<MR * NP>())
            for (int p = 0; p < NP; p++)
                for (int m = 0; m < MR; m++)
                    for (int c = 0; c < C; c++) vstore(acc + m * as + p * PANEL + c * W, sum[p][m][c]);
    }

    // MR rows against one decoded block
    template <int MR>
    static void tile(const void *buf, const float *am, const X *x, int64_t row, float *acc,
                     int64_t as) {
        V t[MR][C];
        for (int m = 0; m < MR; m++)
            for (int c = 0; c < C; c++) t[m][c] = vzero();
        for (int i = 0; i < PAIRS; i++)
            E::template buffered<MR, C>(buf, i, x + i * E::STEP, row, t);
        for (int c = 0; c < C; c++) {
            V s = vload(am + c * W);
            for (int m = 0; m < MR; m++) {
                float *a = acc + m * as + c * W;
                vstore(a, vfma(t[m][c], s, vload(a)));
            }
        }
    }

    typedef void (*Fused)(int64_t, Rows<X>, const uint8_t *, const float *, float *, int64_t);
    typedef void (*Tile)(const void *, const float *, const X *, int64_t, float *, int64_t);
    template <int M> static Fused fused_for(int m) {
        if constexpr (M == 1) return fused<1, 1>;
        else return m == M ? fused<M, 1> : fused_for<M - 1>(m);
    }
    template <int M> static Tile tile_for(int m) {
        if constexpr (M == 1) return tile<1>;
        else return m == M ? tile<M> : tile_for<M - 1>(m);
    }

    // rows [0, M) x `np` panels -> acc[M][as]; buf holds E::BUF bytes, 64-byte aligned
    static void run(int64_t M, int64_t K, Rows<X> x, const uint8_t *w, const float *am, int np,
                    float *acc, int64_t as, void *buf) {
        const int64_t wp = K / 2 * E::PAIR, ap = E::SCALED ? K / BLOCK * PANEL : 0;
        int p = 0;
        if constexpr (W == 16) {
            for (; M <= 2 && p + 2 <= np; p += 2)
                (M == 1 ? fused<1, 2> : fused<2, 2>)(K, x, w + p * wp, am + p * ap, acc + p * PANEL, as);
        }
        for (; p < np; p++)
            panel(M, K, x, w + p * wp, am + p * ap, acc + p * PANEL, as, buf);
    }

    static void panel(int64_t M, int64_t K, Rows<X> x, const uint8_t *w, const float *am,
                      float *acc, int64_t as, void *buf) {
        if constexpr (E::BUF > 0) {
            if (M > E::FUSED) return buffered(M, K, x, w, am, acc, as, buf);
        }
        evenly<E::FUSED>(M, [&](int64_t m, int rows) {
            fused_for<E::FUSED>(rows)(K, {x.p + m * x.row, x.row, x.blk}, w, am, acc + m * as, as);
        });
    }

    static void buffered(int64_t M, int64_t K, Rows<X> x, const uint8_t *w, const float *am,
                         float *acc, int64_t as, void *buf) {
        const Lut lut;
        for (int64_t m = 0; m < M; m++)
            for (int c = 0; c < C; c++) vstore(acc + m * as + c * W, vzero());
        for (int64_t b = 0; b < K / BLOCK; b++) {
            prefetch(w + (b + 1) * BLOCK_BYTES);
            E::decode(lut, w + b * BLOCK_BYTES, buf);
            evenly<E::TILE>(M, [&](int64_t m, int rows) {
                tile_for<E::TILE>(rows)(buf, am + b * PANEL, x.p + b * x.blk + m * x.row, x.row,
                                        acc + m * as, as);
            });
        }
    }

    // f(first row, rows) for parts of at most `most` rows, as even as can be: no thin last tile
    template <int most, class F> static void evenly(int64_t M, F f) {
        const int64_t parts = ceil_div(M, most);
        for (int64_t i = 0, m = 0; i < parts; i++) {
            const int64_t end = M * (i + 1) / parts;
            f(m, (int)(end - m));
            m = end;
        }
    }
};

} // namespace
