// Finds the panels of a plain weight that may hold a row's largest products, from codes of one byte a weight: half of
// what the weight itself takes to read, or less. Knows bounds; the products themselves are gemm.h's.
//
// A weight is scale * (code + d), |d| <= 1/2, with a scale a block of 64; a row of x is step * (q + e), |e| <= 1/2, q of 16
// bits. Sums of code * q are exact integers, so a product is known up to scale * (|x|/2 + ...) a block, plus what the
// kernel that computes it in fp32 may round. Nothing of it is assumed to be likely: what a bound excludes is smaller.
#pragma once
#include <math.h>

#include <algorithm>

#include "gumbel.h"
#include "simd.h"
#include "team.h"

namespace {

enum { SCREEN_ROWS = 8, SCREEN_GROUP = 8, SCREEN_LEADERS = 4 }; // rows, beyond which the products themselves take no longer;
                                                                // panels an item; panels among which a race's lead is sought
FADER_INLINE V vabs(V v) { return vmax(vmul(v, vset(-1.0f)), v); }
const float SCREEN_HALF = 0.503f, SCREEN_TINY = 1e-30f; // half a step and what dividing by one is off; smaller is nothing
const float SCREEN_LOST = 1e30f; // where a bound is larger sums may overflow: such a panel is computed
const float SCREEN_LANE[PANEL] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                  16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

#if FADER_ISA >= 2
typedef I Ints;
FADER_INLINE Ints izero() { return _mm512_setzero_si512(); }
FADER_INLINE Ints icodes(const int8_t *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p)); }
FADER_INLINE Ints ipair(const int16_t *p) { int v; memcpy(&v, p, 4); return _mm512_set1_epi32(v); }
#if FADER_ISA >= 3
FADER_INLINE Ints idot(Ints acc, Ints a, Ints b) { return _mm512_dpwssd_epi32(acc, a, b); }
#else
FADER_INLINE Ints idot(Ints acc, Ints a, Ints b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
#endif
FADER_INLINE V ifloat(Ints a) { return _mm512_cvtepi32_ps(a); }
#elif FADER_ISA == 1
typedef I Ints;
FADER_INLINE Ints izero() { return _mm256_setzero_si256(); }
FADER_INLINE Ints icodes(const int8_t *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)); }
FADER_INLINE Ints ipair(const int16_t *p) { int v; memcpy(&v, p, 4); return _mm256_set1_epi32(v); }
FADER_INLINE Ints idot(Ints acc, Ints a, Ints b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
FADER_INLINE V ifloat(Ints a) { return _mm256_cvtepi32_ps(a); }
#else
struct Ints {
    int32_t i[W];
};
struct Codes {
    int32_t low[W], high[W];
};
FADER_INLINE Ints izero() { Ints r; FADER_LANES r.i[i] = 0; return r; }
FADER_INLINE Codes icodes(const int8_t *p) { Codes r; FADER_LANES { r.low[i] = p[2 * i]; r.high[i] = p[2 * i + 1]; } return r; }
FADER_INLINE Codes ipair(const int16_t *p) { Codes r; FADER_LANES { r.low[i] = p[0]; r.high[i] = p[1]; } return r; }
FADER_INLINE Ints idot(Ints acc, Codes a, Codes b) { FADER_LANES acc.i[i] += a.low[i] * b.low[i] + a.high[i] * b.high[i]; return acc; }
FADER_INLINE V ifloat(Ints a) { V r; FADER_LANES r.f[i] = (float)a.i[i]; return r; }
#endif

// codes and scales of 64 rows of a panel w [64][32]; false where one is not finite
FADER_INLINE bool screen_block(const float (*w)[PANEL], int8_t *codes, float *scales) {
    float code[BLOCK][PANEL];
    float wrong = 0.0f;
    for (int c = 0; c < PANEL; c += W) {
        V most = vzero(), sum = vzero();
        for (int i = 0; i < BLOCK; i++) {
            const V v = vload(w[i] + c);
            most = vmax(most, vabs(v));
            sum = vfma(v, vzero(), sum); // of what is not finite NaN
        }
        const V none = vwhere_less(most, vset(SCREEN_TINY), vset(1.0f), vzero()); // then half a step holds all of it
        const V some = vwhere_less(vzero(), none, vset(1.0f), vdiv(most, vset(127.0f)));
        vstore(scales + c, vwhere_less(vzero(), none, vadd(most, most), some));
        for (int i = 0; i < BLOCK; i++) {
            const V v = vmin(vset(127.0f), vmax(vset(-127.0f), vround(vdiv(vload(w[i] + c), some))));
            vstore(code[i] + c, vwhere_less(vzero(), none, vzero(), v));
        }
        wrong += vsum(sum);
    }
    if (!(wrong == 0.0f)) return false;
    for (int i = 0; i < BLOCK; i++)
        for (int c = 0; c < PANEL; c++) codes[(i / 2 * PANEL + c) * 2 + i % 2] = (int8_t)code[i][c];
    return true;
}

// codes [P][k/2][32][2], scales [P][k/64][32] of panels as fader_pack leaves them; false where a weight is not finite
template <class T> bool screen_pack(int64_t n, int64_t k, const T *panels, int8_t *codes, float *scales, int nt) {
    const int64_t per = sizeof(T) == 2 ? 2 : 1, blocks = k / BLOCK;
    int bad = 0;
    share(nt, ceil_div(n, PANEL), [&](int64_t p, int) {
        for (int64_t b = 0; b < blocks; b++) {
            const T *from = panels + (p * k + b * BLOCK) * PANEL; // rows of 32, or of 32 pairs
            float w[BLOCK][PANEL];
            for (int i = 0; i < BLOCK; i++)
                for (int c = 0; c < PANEL; c++) w[i][c] = load1(from + (i / per * PANEL + c) * per + i % per);
            if (!screen_block(w, codes + (p * k + b * BLOCK) * PANEL, scales + (p * blocks + b) * PANEL))
                __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        }
    });
    return !bad;
}

// A call's rows as the bounds want them, in scratch.
struct Screened {
    int16_t *q;            // [T][k]
    float *step, *slack;   // [T][k/64]: of q; what a scale is multiplied with to bound a block's error
    float *most, *least;   // [T][P] bounds of a panel's largest, from above and from below
    float *race;           // [T][P] of its best in the row's race, from above; where that is run
    float *heavy, *light;  // [T][P] bounds of what a panel weighs, against exp(most / heat); where a nucleus is asked for
    uint8_t *hit;          // [P]: may hold what a row wants
    FADER_INLINE int64_t bytes(int64_t n, int64_t k, int64_t T) {
        const int64_t panels = ceil_div(n, PANEL), blocks = align64(T * (k / BLOCK) * 4);
        return align64(T * k * 2) + 2 * blocks + 5 * align64(panels * T * 4) + align64(panels);
    }
    Screened(char *p, int64_t n, int64_t k, int64_t T) {
        const int64_t panels = ceil_div(n, PANEL), blocks = align64(T * (k / BLOCK) * 4);
        q = (int16_t *)p, p += align64(T * k * 2);
        step = (float *)p, p += blocks;
        slack = (float *)p, p += blocks;
        most = (float *)p, p += align64(panels * T * 4);
        least = (float *)p, p += align64(panels * T * 4);
        race = (float *)p, p += align64(panels * T * 4);
        heavy = (float *)p, p += align64(panels * T * 4);
        light = (float *)p, p += align64(panels * T * 4);
        hit = (uint8_t *)p;
    }
};

// false where the row holds what is no number: nothing can be said of it
template <class X> bool screen_row(int64_t k, const X *x, int16_t *q, float *step, float *slack) {
    // roundings that a product passes: 3 a pair in its block, one a block, in the kernel and here
    const float rounding = 1.01f * (float)(3 * BLOCK / 2 + 2 * (k / BLOCK) + 16) * 0x1p-24f;
    for (int64_t b = 0; b < k / BLOCK; b++) {
        V most = vzero(), sum = vzero();
        for (int i = 0; i < BLOCK; i += W) {
            const V v = vabs(vload_as(x + b * BLOCK + i));
            most = vmax(most, v);
            sum = vadd(sum, v);
        }
        const float all = vsum(sum), top = vtop(most);
        if (!isfinite(all)) return false;
        const bool none = top < SCREEN_TINY;
        step[b] = none ? 0.0f : top / 32767.0f;
        for (int i = 0; i < BLOCK; i += W) {
            float f[W];
            vstore(f, vround(none ? vzero() : vdiv(vload_as(x + b * BLOCK + i), vset(step[b]))));
            for (int j = 0; j < W; j++) q[b * BLOCK + i + j] = (int16_t)f[j]; // at most 32767 and a rounding
        }
        const float rest = none ? 128.0f * all : 127.0f * BLOCK * SCREEN_HALF * step[b];
        slack[b] = 1.001f * (all * (SCREEN_HALF + 128.0f * rounding) + rest);
    }
    return true;
}

// bounds of every product of MR rows from `t` with one panel: [MR][PANEL] from above and from below
template <int MR>
void screen_panel(const fader_site_t &s, int64_t t, int64_t p, const Screened &rows, float (*above)[PANEL], float (*below)[PANEL]) {
    enum { C = PANEL / W };
    const int64_t k = s.k, blocks = k / BLOCK, columns = min64(PANEL, s.n - p * PANEL);
    const int8_t *codes = s.screen->codes + p * k * PANEL;
    const float *scales = s.screen->scales + p * blocks * PANEL;
    float value[MR][PANEL] = {}, slack[MR][PANEL] = {};
    for (int64_t b = 0; b < blocks; b++) {
        Ints acc[MR][C];
        for (int m = 0; m < MR; m++)
            for (int c = 0; c < C; c++) acc[m][c] = izero();
#pragma GCC unroll 4
        for (int i = 0; i < BLOCK / 2; i++) {
            const int8_t *w = codes + (b * (BLOCK / 2) + i) * 2 * PANEL;
            prefetch(w + 4096);
            decltype(icodes(w)) v[C];
            for (int c = 0; c < C; c++) v[c] = icodes(w + 2 * W * c);
            for (int m = 0; m < MR; m++) {
                const auto x = ipair(rows.q + (t + m) * k + b * BLOCK + 2 * i);
                for (int c = 0; c < C; c++) acc[m][c] = idot(acc[m][c], v[c], x);
            }
        }
        for (int m = 0; m < MR; m++) {
            const V step = vset(rows.step[(t + m) * blocks + b]), off = vset(rows.slack[(t + m) * blocks + b]);
            for (int c = 0; c < C; c++) {
                const V scale = vload(scales + b * PANEL + c * W);
                float *to = value[m] + c * W, *by = slack[m] + c * W;
                vstore(to, vfma(vmul(ifloat(acc[m][c]), step), scale, vload(to)));
                vstore(by, vfma(scale, off, vload(by)));
            }
        }
    }
    float own[PANEL] = {};
    if (s.bias) memcpy(own, s.bias + p * PANEL, (size_t)columns * 4);
    const V none = vset(-INFINITY), end = vset((float)columns);
    for (int m = 0; m < MR; m++)
        for (int c = 0; c < PANEL; c += W) {
            const V at = vload(value[m] + c), about = vload(own + c), all = vadd(at, about), lane = vload(SCREEN_LANE + c);
            const V by = vfma(vload(slack[m] + c), vset(1.001f), vfma(vadd(vabs(at), vabs(about)), vset(0x1p-21f), vset(SCREEN_TINY)));
            const V most = vwhere_less(by, vset(SCREEN_LOST), vadd(all, by), vset(INFINITY));
            const V least = vwhere_less(by, vset(SCREEN_LOST), vfma(by, vset(-1.0f), all), none);
            vstore(above[m] + c, vwhere_less(lane, end, most, none));
            vstore(below[m] + c, vwhere_less(lane, end, least, none));
        }
}

FADER_INLINE float top_of(const float *x) {
    V top = vload(x);
    for (int c = W; c < PANEL; c += W) top = vmax(top, vload(x + c));
    return vtop(top);
}

// bounds of logit / heat, a logit's part in a race
FADER_INLINE V heated(V logit, float cold) { // from above; cold: 1 / heat
    const V z = vmax(vset(-1e38f), vmul(logit, vset(cold)));
    return vfma(vabs(z), vset(0x1p-21f), z);
}
FADER_INLINE double heated(float logit, float heat) { // from below
    const double z = (double)logit / (double)heat;
    return z - fabs(z) * 0x1p-40;
}

// 2^z for z <= 0, on a chord: not below it but for rounding, and at most SCREEN_CHORD of it; 2^-126 where z is less
FADER_INLINE V vpower(V z) { return vof_bits(vmax(vfma(z, vset(0x1p23f), vset(127 * 0x1p23f)), vset(0x1p23f))); }
const float SCREEN_CHORD = 1.0615f;

static bool asks_nucleus(const fader_wanted_t &wanted) { return wanted.race && wanted.top_p < 1.0; }

template <int MR> void screen_bounds(const fader_site_t &s, int64_t p, const Screened &rows) {
    const int64_t panels = ceil_div(s.n, PANEL);
    float above[MR][PANEL], below[MR][PANEL], noise[PANEL];
    screen_panel<MR>(s, 0, p, rows, above, below);
    for (int m = 0; m < MR; m++) {
        const fader_wanted_t &wanted = s.screen->rows[m];
        rows.most[m * panels + p] = top_of(above[m]);
        rows.least[m * panels + p] = top_of(below[m]);
        if (!wanted.race) continue;
        gumbel_tops(wanted.key, p * PANEL, PANEL, noise);
        for (int c = 0; c < PANEL; c += W)
            vstore(noise + c, vadd(vload(noise + c), heated(vload(above[m] + c), 1.0f / wanted.heat)));
        rows.race[m * panels + p] = top_of(noise);
        if (!asks_nucleus(wanted)) continue;
        const V top = vset(-rows.most[m * panels + p]), cold = vset(1.44269504f / wanted.heat);
        V heavy = vzero(), light = vzero();
        for (int c = 0; c < PANEL; c += W) {
            heavy = vadd(heavy, vpower(vmul(vadd(vload(above[m] + c), top), cold)));
            light = vadd(light, vpower(vmul(vadd(vload(below[m] + c), top), cold)));
        }
        rows.heavy[m * panels + p] = vsum(heavy);
        rows.light[m * panels + p] = vsum(light) / SCREEN_CHORD;
    }
}

typedef void (*ScreenBounds)(const fader_site_t &, int64_t, const Screened &);
template <int M> ScreenBounds screen_for(int64_t m) {
    if constexpr (M == 1) return screen_bounds<1>;
    else return m == M ? screen_bounds<M> : screen_for<M - 1>(m);
}

static float largest_of(const float *x, int64_t n) {
    float top = -INFINITY;
    for (int64_t i = 0; i < n; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// What is below has no place among a row's `keep` largest, nor does it weigh what the last of those weighs; `least` is put
// in another order. NaN where that cannot be said.
static float screen_edge(const fader_wanted_t &wanted, const float *most, float *least, int64_t panels) {
    if (wanted.keep > panels) return NAN;
    std::nth_element(least, least + wanted.keep - 1, least + panels, [](float a, float b) { return a > b; });
    const float edge = least[wanted.keep - 1]; // so many panels have one that is no smaller
    if (wanted.race || wanted.heat == 0.0f) return edge;
    // weights are whole numbers, of exponentials that are off by 5e-6 at most: a gap keeps them apart
    const float mass = 0x1p44f * expf((edge - largest_of(most, panels)) / wanted.heat);
    if (!(mass >= 0x1p20f)) return NAN;
    return edge - wanted.heat * (2e-5f + 4.0f / mass) - fabsf(edge) * 0x1p-22f;
}

// What is below does not win row t's race. Somebody is sought who can be drawn for certain and is nearly the first.
static float screen_lead(const fader_site_t &s, int64_t t, const Screened &rows, int64_t panels) {
    const fader_wanted_t &wanted = s.screen->rows[t];
    const float *race = rows.race + t * panels, *most = rows.most + t * panels;
    const float least = largest_of(most, panels) - wanted.reach; // a rounding more than this can be drawn
    const float drawn = least + fabsf(least) * 0x1p-20f + wanted.heat * GUMBEL_OFF;
    int64_t leaders[SCREEN_LEADERS], count = 0;
    for (int64_t p = 0; p < panels; p++) {
        if (!(most[p] >= drawn) || (count == SCREEN_LEADERS && !(race[p] > race[leaders[count - 1]]))) continue;
        int64_t at = count < SCREEN_LEADERS ? count++ : count - 1;
        for (; at > 0 && race[p] > race[leaders[at - 1]]; at--) leaders[at] = leaders[at - 1];
        leaders[at] = p;
    }
    double lead = -INFINITY;
    for (int64_t i = 0; i < count; i++) {
        float above[1][PANEL], below[1][PANEL];
        screen_panel<1>(s, t, leaders[i], rows, above, below);
        for (int c = 0; c < PANEL; c++)
            if (below[0][c] >= drawn && below[0][c] > -INFINITY)
                lead = fmax(lead, heated(below[0][c], wanted.heat) + gumbel(wanted.key, leaders[i] * PANEL + c));
    }
    return (float)(lead - GUMBEL_OFF - fabs(lead) * 0x1p-20);
}

// `hit` of the rows x [T,k]; false where all products must be computed
template <class X>
bool screen(const fader_site_t &s, int64_t T, const X *x, int64_t xs, const Screened &rows, int nt) {
    const int64_t panels = ceil_div(s.n, PANEL), blocks = s.k / BLOCK;
    for (int64_t t = 0; t < T; t++)
        if (!screen_row(s.k, x + t * xs, rows.q + t * s.k, rows.step + t * blocks, rows.slack + t * blocks)) return false;
    share(nt, ceil_div(panels, SCREEN_GROUP), [&](int64_t group, int) {
        for (int64_t p = group * SCREEN_GROUP; p < min64(panels, (group + 1) * SCREEN_GROUP); p++)
            screen_for<SCREEN_ROWS>(T)(s, p, rows);
    });
    memset(rows.hit, 0, (size_t)panels);
    for (int64_t t = 0; t < T; t++) {
        const fader_wanted_t &wanted = s.screen->rows[t];
        const float *most = rows.most + t * panels, *race = rows.race + t * panels;
        const float edge = screen_edge(wanted, most, rows.least + t * panels, panels);
        if (edge != edge) return false;
        for (int64_t p = 0; p < panels; p++) rows.hit[p] |= !(most[p] < edge);
        if (!wanted.race) continue;
        const float lead = screen_lead(s, t, rows, panels), least = edge - wanted.reach;
        const float drawn = least - fabsf(least) * 0x1p-20f - wanted.heat * GUMBEL_OFF; // what is below cannot be
        for (int64_t p = 0; p < panels; p++) rows.hit[p] |= !(race[p] < lead) && !(most[p] < drawn);
    }
    return true;
}

} // namespace
