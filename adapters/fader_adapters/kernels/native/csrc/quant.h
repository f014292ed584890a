// Blockwise NF4 with bitsandbytes' arithmetic: scaled = clamp(w * (1 / max(absmax, 1e-38)), -1, 1), code =
// number of midpoints below it; the last, partial block divides instead. Also the machine's limits,
// measured: streaming reads and dot products.
#pragma once
#include <omp.h>

#include "simd.h"

namespace {

FADER_INLINE void midpoints(float *mid) {
    for (int i = 0; i < 15; i++) mid[i] = (NF4[i] + NF4[i + 1]) / 2;
    mid[15] = 2.0f;
}
FADER_INLINE void widen(const void *w, int64_t at, int64_t n, int dtype, float *to) {
    if (dtype == FADER_F32) {
        memcpy(to, (const float *)w + at, (size_t)n * 4);
        return;
    }
    const u16 *h = (const u16 *)w + at;
#if FADER_ISA >= 1
    if (dtype == FADER_F16 && n == BLOCK) {
        for (int i = 0; i < BLOCK; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
        return;
    }
#endif
    for (int64_t i = 0; i < n; i++) to[i] = dtype == FADER_BF16 ? from_bf16(h[i]) : from_f16(h[i]);
}

#if FADER_ISA >= 2
// how many of the 15 midpoints are below each value
FADER_INLINE I codes_of(V x, V mid) {
    I q = _mm512_setzero_si512();
    for (int step = 8; step; step >>= 1) { // midpoint number q + step - 1 decides the bit
        I probe = _mm512_add_epi32(q, _mm512_set1_epi32(step - 1));
        __mmask16 up = _mm512_cmp_ps_mask(_mm512_permutexvar_ps(probe, mid), x, _CMP_LT_OQ);
        q = _mm512_mask_add_epi32(q, up, q, _mm512_set1_epi32(step));
    }
    return q;
}
#endif

// 64 scaled values -> 32 bytes
FADER_INLINE void encode(const float *v, const float *mid, uint8_t *out) {
#if FADER_ISA >= 2
    const V table = vload(mid);
    for (int i = 0; i < BLOCK; i += W) {
        I q = codes_of(vload(v + i), table);
        // lanes 2j, 2j+1 -> (even << 4) | odd
        I pair = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
        _mm_storel_epi64((__m128i *)(out + i / 2), _mm512_cvtepi64_epi8(_mm512_and_si512(pair, _mm512_set1_epi64(255))));
    }
#else
    int q[BLOCK];
    for (int i = 0; i < BLOCK; i++) q[i] = 0;
    for (int j = 0; j < 15; j++)
        for (int i = 0; i < BLOCK; i++) q[i] += mid[j] < v[i];
    for (int i = 0; i < BLOCK / 2; i++) out[i] = (uint8_t)(q[2 * i] << 4 | q[2 * i + 1]);
#endif
}

int quantise(int64_t count, const void *w, int dtype, uint8_t *packed, float *absmax, int nt) {
    float mid[16];
    midpoints(mid);
    const int64_t full = count / BLOCK, rem = count % BLOCK;
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t b = 0; b < full; b++) {
        float v[BLOCK];
        widen(w, b * BLOCK, BLOCK, dtype, v);
        // a NaN must reach absmax, where the caller looks for it
        u32 top = 0;
        for (int i = 0; i < BLOCK; i++) {
            u32 a = float_bits(v[i]) & 0x7fffffff;
            top = a > top ? a : top;
        }
        const float am = bits_float(top), inv = 1.0f / (am < 1e-38f ? 1e-38f : am);
        absmax[b] = am;
        for (int i = 0; i < BLOCK; i++) {
            float s = v[i] * inv;
            s = s < -1.0f ? -1.0f : s;
            v[i] = s > 1.0f ? 1.0f : s;
        }
        encode(v, mid, packed + b * (BLOCK / 2));
    }
    if (rem) {
        float v[BLOCK], am = 0;
        uint8_t bytes[BLOCK / 2];
        for (int i = 0; i < BLOCK; i++) v[i] = 0;
        widen(w, full * BLOCK, rem, dtype, v);
        for (int64_t i = 0; i < rem; i++) {
            const float a = v[i] < 0 ? -v[i] : v[i];
            am = a > am || a != a ? a : am;
        }
        am = am < 1e-38f ? 1e-38f : am;
        absmax[full] = am;
        for (int64_t i = 0; i < rem; i++) v[i] = v[i] / am;
        encode(v, mid, bytes);
        memcpy(packed + full * (BLOCK / 2), bytes, (size_t)(rem + 1) / 2);
    }
    return 0;
}

template <class Out>
static void dequantise_run(int64_t count, const uint8_t *packed, const float *absmax, Out *out, int nt) {
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t b = 0; b < ceil_div(count, BLOCK); b++) {
        const int64_t n = min64(BLOCK, count - b * BLOCK);
        const uint8_t *p = packed + b * (BLOCK / 2);
        Out *o = out + b * BLOCK;
        const float s = absmax[b];
        int64_t i = 0;
#if FADER_ISA >= 2
        const V table = vload(NF4);
        for (; i + W <= n; i += W) { // lane pairs share a byte: the even lane takes its high nibble
            I q = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(p + i / 2)));
            q = _mm512_or_si512(_mm512_srli_epi64(q, 4), _mm512_slli_epi64(q, 32));
            vstore_as(o + i, vmul(_mm512_permutexvar_ps(q, table), vset(s)));
        }
#endif
        for (; i < n; i++) store1(o + i, NF4[(i & 1 ? p[i / 2] : p[i / 2] >> 4) & 15] * s);
    }
}
int dequantise(int64_t count, const uint8_t *packed, const float *absmax, void *out, int dtype, int nt) {
    if (dtype == FADER_F32) dequantise_run(count, packed, absmax, (float *)out, nt);
    else dequantise_run(count, packed, absmax, (u16 *)out, nt);
    return 0;
}

double probe_read(const void *data, int64_t bytes, int nt) {
    const float *p = (const float *)data;
    const int64_t chunk = 1 << 16, n = bytes / (4 * chunk);
    double total = 0;
#pragma omp parallel for schedule(static) num_threads(nt) reduction(+ : total)
    for (int64_t c = 0; c < n; c++) {
        V a[4] = {vzero(), vzero(), vzero(), vzero()};
        for (int64_t i = 0; i < chunk; i += 4 * W)
            for (int j = 0; j < 4; j++) a[j] = vadd(a[j], vload(p + c * chunk + i + j * W));
        total += vsum(vadd(vadd(a[0], a[1]), vadd(a[2], a[3])));
    }
    return total;
}

double probe_dot(int64_t rounds, int nt) {
    enum { N = W == 16 ? 24 : 12 };
    double total = 0;
#pragma omp parallel num_threads(nt) reduction(+ : total)
    {
        V acc[N];
        for (int i = 0; i < N; i++) acc[i] = vzero();
        P a = pset(0x3f803f80u), b = pset(0x3c003c00u);
        for (int64_t r = 0; r < rounds; r++)
            // in full, or the sums live in memory and the limit is the stores'
#pragma GCC unroll 24
            for (int i = 0; i < N; i++) acc[i] = pdot(acc[i], a, b);
        for (int i = 0; i < N; i++) total += vsum(acc[i]);
    }
    return total > 1e30 ? 0.0 : (double)rounds * N * W * 4 * nt; // floating-point operations
}

} // namespace
