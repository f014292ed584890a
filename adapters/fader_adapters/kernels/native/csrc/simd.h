// One vector vocabulary for four instruction sets, chosen by FADER_ISA at compile time:
// V = W floats, P = W pairs of bf16. Knows nothing of what is computed with them.
#pragma once
#include "common.h"

#if FADER_ISA >= 1
#include <immintrin.h>
#endif

namespace {

#if FADER_ISA >= 2
enum { W = 16 };
typedef __m512 V;
typedef __m512i I;
FADER_INLINE V vzero() { return _mm512_setzero_ps(); }
FADER_INLINE V vset(float f) { return _mm512_set1_ps(f); }
FADER_INLINE V vload(const float *p) { return _mm512_loadu_ps(p); }
FADER_INLINE void vstore(float *p, V v) { _mm512_storeu_ps(p, v); }
FADER_INLINE V vadd(V a, V b) { return _mm512_add_ps(a, b); }
FADER_INLINE V vmul(V a, V b) { return _mm512_mul_ps(a, b); }
FADER_INLINE V vdiv(V a, V b) { return _mm512_div_ps(a, b); }
FADER_INLINE V vmax(V a, V b) { return _mm512_max_ps(a, b); }
FADER_INLINE V vmin(V a, V b) { return _mm512_min_ps(a, b); }
FADER_INLINE V vfma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
FADER_INLINE float vsum(V a) { return _mm512_reduce_add_ps(a); }
FADER_INLINE float vtop(V a) { return _mm512_reduce_max_ps(a); }
FADER_INLINE V vround(V a) { return _mm512_roundscale_ps(a, 8); }
FADER_INLINE V vwhere_less(V a, V b, V v, V w) { // v where a < b, else w (NaN in a: w)
    return _mm512_mask_mov_ps(w, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), v);
}
FADER_INLINE V vsquare_rest(V a, V s) { return _mm512_fmsub_ps(a, a, s); } // a*a - s, rounded once
FADER_INLINE V vpow2(V n) { // 2^n for whole n in [-126, 127]
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
FADER_INLINE V vof_bits(V a) { return _mm512_castsi512_ps(_mm512_cvtps_epi32(a)); } // of a's whole number as bits
FADER_INLINE V vload_bf16(const u16 *p) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
FADER_INLINE void vstore_bf16(u16 *p, V v) {
    I b = _mm512_castps_si512(v);
    I odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    I r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, b, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
#if FADER_ISA >= 3
typedef __m512bh P;
FADER_INLINE P pload(const u16 *p) { return (P)_mm512_loadu_si512(p); }
FADER_INLINE P pset(u32 pair) { return (P)_mm512_set1_epi32((int)pair); }
FADER_INLINE V pdot(V acc, P a, P b) { return _mm512_dpbf16_ps(acc, a, b); }
#else
typedef __m512i P;
FADER_INLINE P pload(const u16 *p) { return _mm512_loadu_si512(p); }
FADER_INLINE P pset(u32 pair) { return _mm512_set1_epi32((int)pair); }
FADER_INLINE V plow(P a) { return _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)); }
FADER_INLINE V phigh(P a) {
    return _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32((int)0xffff0000)));
}
#endif

#elif FADER_ISA == 1
enum { W = 8 };
typedef __m256 V;
typedef __m256i I;
FADER_INLINE V vzero() { return _mm256_setzero_ps(); }
FADER_INLINE V vset(float f) { return _mm256_set1_ps(f); }
FADER_INLINE V vload(const float *p) { return _mm256_loadu_ps(p); }
FADER_INLINE void vstore(float *p, V v) { _mm256_storeu_ps(p, v); }
FADER_INLINE V vadd(V a, V b) { return _mm256_add_ps(a, b); }
FADER_INLINE V vmul(V a, V b) { return _mm256_mul_ps(a, b); }
FADER_INLINE V vdiv(V a, V b) { return _mm256_div_ps(a, b); }
FADER_INLINE V vmax(V a, V b) { return _mm256_max_ps(a, b); }
FADER_INLINE V vmin(V a, V b) { return _mm256_min_ps(a, b); }
FADER_INLINE V vfma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
FADER_INLINE float vsum(V a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FADER_INLINE float vtop(V a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
FADER_INLINE V vround(V a) { return _mm256_round_ps(a, 8); }
FADER_INLINE V vwhere_less(V a, V b, V v, V w) {
    return _mm256_blendv_ps(w, v, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
FADER_INLINE V vsquare_rest(V a, V s) { return _mm256_fmsub_ps(a, a, s); }
FADER_INLINE V vpow2(V n) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
FADER_INLINE V vof_bits(V a) { return _mm256_castsi256_ps(_mm256_cvtps_epi32(a)); }
FADER_INLINE V vload_bf16(const u16 *p) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
FADER_INLINE void vstore_bf16(u16 *p, V v) {
    I b = _mm256_castps_si256(v);
    I odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    I r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    I nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(b, _mm256_set1_epi32(0x400000)), nan);
    r = _mm256_srli_epi32(r, 16);
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(r));
}
typedef __m256i P;
FADER_INLINE P pload(const u16 *p) { return _mm256_loadu_si256((const __m256i *)p); }
FADER_INLINE P pset(u32 pair) { return _mm256_set1_epi32((int)pair); }
FADER_INLINE V plow(P a) { return _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)); }
FADER_INLINE V phigh(P a) {
    return _mm256_castsi256_ps(_mm256_and_si256(a, _mm256_set1_epi32((int)0xffff0000)));
}

#else
enum { W = 8 };
struct V {
    float f[W];
};
struct P {
    u32 p[W];
};
#define FADER_LANES for (int i = 0; i < W; i++)
FADER_INLINE V vset(float f) { V r; FADER_LANES r.f[i] = f; return r; }
FADER_INLINE V vzero() { return vset(0.0f); }
FADER_INLINE V vload(const float *p) { V r; FADER_LANES r.f[i] = p[i]; return r; }
FADER_INLINE void vstore(float *p, V v) { FADER_LANES p[i] = v.f[i]; }
FADER_INLINE V vadd(V a, V b) { FADER_LANES a.f[i] += b.f[i]; return a; }
FADER_INLINE V vmul(V a, V b) { FADER_LANES a.f[i] *= b.f[i]; return a; }
FADER_INLINE V vdiv(V a, V b) { FADER_LANES a.f[i] /= b.f[i]; return a; }
FADER_INLINE V vmax(V a, V b) { FADER_LANES a.f[i] = a.f[i] > b.f[i] ? a.f[i] : b.f[i]; return a; }
FADER_INLINE V vmin(V a, V b) { FADER_LANES a.f[i] = a.f[i] < b.f[i] ? a.f[i] : b.f[i]; return a; }
FADER_INLINE V vfma(V a, V b, V c) { FADER_LANES c.f[i] += a.f[i] * b.f[i]; return c; }
FADER_INLINE float vsum(V a) {
    return ((a.f[0] + a.f[4]) + (a.f[2] + a.f[6])) + ((a.f[1] + a.f[5]) + (a.f[3] + a.f[7]));
}
FADER_INLINE float vtop(V a) {
    float t = a.f[0];
    FADER_LANES t = a.f[i] > t ? a.f[i] : t;
    return t;
}
FADER_INLINE V vround(V a) { FADER_LANES a.f[i] = __builtin_rintf(a.f[i]); return a; }
FADER_INLINE V vwhere_less(V a, V b, V v, V w) { FADER_LANES w.f[i] = a.f[i] < b.f[i] ? v.f[i] : w.f[i]; return w; }
FADER_INLINE V vsquare_rest(V a, V s) { FADER_LANES s.f[i] = (float)((double)a.f[i] * a.f[i] - s.f[i]); return s; }
FADER_INLINE V vpow2(V n) { // of a NaN 1: it is multiplied with one anyway
    FADER_LANES n.f[i] = bits_float((u32)((n.f[i] == n.f[i] ? (int)n.f[i] : 0) + 127) << 23);
    return n;
}
FADER_INLINE V vof_bits(V a) { FADER_LANES a.f[i] = bits_float((u32)(int)a.f[i]); return a; }
FADER_INLINE V vload_bf16(const u16 *p) { V r; FADER_LANES r.f[i] = from_bf16(p[i]); return r; }
FADER_INLINE void vstore_bf16(u16 *p, V v) { FADER_LANES p[i] = to_bf16(v.f[i]); }
FADER_INLINE P pload(const u16 *p) { P r; memcpy(&r, p, sizeof r); return r; }
FADER_INLINE P pset(u32 pair) { P r; FADER_LANES r.p[i] = pair; return r; }
FADER_INLINE V plow(P a) { V r; FADER_LANES r.f[i] = bits_float(a.p[i] << 16); return r; }
FADER_INLINE V phigh(P a) { V r; FADER_LANES r.f[i] = bits_float(a.p[i] & 0xffff0000u); return r; }
#endif

#if FADER_ISA < 3
FADER_INLINE V pdot(V acc, P a, P b) { return vfma(phigh(a), phigh(b), vfma(plow(a), plow(b), acc)); }
#endif

// Loads, stores and dot steps by element type, so that kernels are written once.
FADER_INLINE V vload_as(const float *p) { return vload(p); }
FADER_INLINE V vload_as(const u16 *p) { return vload_bf16(p); }
FADER_INLINE void vstore_as(float *p, V v) { vstore(p, v); }
FADER_INLINE void vstore_as(u16 *p, V v) { vstore_bf16(p, v); }
FADER_INLINE float load1(const float *p) { return *p; }
FADER_INLINE float load1(const u16 *p) { return from_bf16(*p); }
FADER_INLINE void store1(float *p, float v) { *p = v; }
FADER_INLINE void store1(u16 *p, float v) { *p = to_bf16(v); }

// one lane of vfma, for tails: the same rounding as the vector
FADER_INLINE float fma1(float a, float b, float c) {
#if FADER_ISA >= 1
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Step<X, Y>: acc += x . y over SIZE elements. bf16 pairs go through pdot, everything else through fp32.
template <class X, class Y> struct Step {
    enum { SIZE = W };
    typedef V Reg;
    FADER_INLINE V x(const X *p) { return vload_as(p); }
    FADER_INLINE V y(const Y *p) { return vload_as(p); }
    FADER_INLINE V dot(V acc, V a, V b) { return vfma(a, b, acc); }
};
template <> struct Step<u16, u16> {
    enum { SIZE = 2 * W };
    typedef P Reg;
    FADER_INLINE P x(const u16 *p) { return pload(p); }
    FADER_INLINE P y(const u16 *p) { return pload(p); }
    FADER_INLINE V dot(V acc, P a, P b) { return pdot(acc, a, b); }
};

// max and min hand on their second operand when one is NaN: x stands there so that NaN survives
FADER_INLINE V vexp(V x) { // e^x, exactly 0 below -87; relative error 2e-7
    V c = vmin(vset(88.0f), vmax(vset(-87.0f), x));
    V n = vround(vmul(c, vset(1.44269504088896341f)));
    V r = vfma(n, vset(-0.693359375f), c);
    r = vfma(n, vset(2.12194440e-4f), r);
    V y = vset(1.9875691500e-4f);
    y = vfma(y, r, vset(1.3981999507e-3f));
    y = vfma(y, r, vset(8.3334519073e-3f));
    y = vfma(y, r, vset(4.1665795894e-2f));
    y = vfma(y, r, vset(1.6666665459e-1f));
    y = vfma(y, r, vset(5.0000001201e-1f));
    y = vadd(vfma(y, vmul(r, r), r), vset(1.0f));
    return vwhere_less(x, vset(-87.0f), vzero(), vmul(y, vpow2(n)));
}
// below 0.625 Cephes' polynomial, above by exp; relative error 2e-7
FADER_INLINE V vtanh(V x) {
    const V minus = vmul(x, vset(-1.0f)), u = vmin(vset(20.0f), vmax(minus, x)), z = vmul(u, u);
    V y = vset(-5.70498872745e-3f);
    y = vfma(y, z, vset(2.06390887954e-2f));
    y = vfma(y, z, vset(-5.37397155531e-2f));
    y = vfma(y, z, vset(1.33314422036e-1f));
    y = vfma(y, z, vset(-3.33332819422e-1f));
    const V near = vfma(vmul(y, z), x, x);
    const V far = vadd(vset(1.0f), vdiv(vset(-2.0f), vadd(vexp(vadd(u, u)), vset(1.0f))));
    return vwhere_less(u, vset(0.625f), near, vwhere_less(x, vzero(), vmul(far, vset(-1.0f)), far));
}
FADER_INLINE V vsigmoid(V x) { return vdiv(vset(1.0f), vadd(vset(1.0f), vexp(vmul(x, vset(-1.0f))))); }
FADER_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
FADER_INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); } // no nearer than L2

} // namespace
