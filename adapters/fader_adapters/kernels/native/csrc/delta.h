// The LoRA delta of a site: shrink z = coefficient * (x . A^T) into scratch, expand y += z . B; before that
// what is not low-rank: y by its gain, and the bias of B.
// Knows the plan's groups and the arena's tables; nothing of the base weights.
//
// A row's terms are added in the row's own order and every dot product has one shape, so a row's
// bits do not depend on which rows share its adapters. A slot nobody names is never read.
#pragma once
#include "simd.h"

namespace {

enum { SHRINK_RANKS = 8, SHRINK_TOKENS = 64, VECTOR_COLUMNS = 128, FETCH_LINES = 2048 };

struct Item { // one shrink: ranks [r0, r0+nr) of a slot for tokens [t0, t1) of a group's term
    int32_t use, member, r0, nr, t0, t1;
};
struct Delta {
    float *z;
    int64_t *zbase; // [groups * members] first z of a group's member
    int32_t *width; // [groups * members] z floats per token
    int32_t *at;    // [terms * members] a term's place within a token's z
    Item *item;
    int64_t items;
};

FADER_INLINE const int32_t *words_at(const Plan &p, int32_t at) { return (const int32_t *)&p + at; }
FADER_INLINE const float *gammas(const Plan &p) { return (const float *)words_at(p, p.gamma); }

// rank of a slot in a member, 0 where it adds nothing
FADER_INLINE int rank_of(const fader_site_t &s, int slot, int m) {
    const int64_t i = slot * s.table_stride + m;
    return s.a_off[i] >= 0 && s.b_off[i] >= 0 && s.scale[i] != 0.0f ? s.rank[i] : 0;
}

FADER_INLINE int64_t delta_sizes(const fader_site_t &s, const Plan &p, int64_t *items) {
    const int32_t *tp = words_at(p, p.term_ptr), *kp = words_at(p, p.tok_ptr), *sl = words_at(p, p.slot);
    int64_t z = 0;
    *items = 0;
    for (int g = 0; g < p.groups; g++)
        for (int i = tp[g]; i < tp[g + 1]; i++)
            for (int m = 0; m < s.members; m++) {
                const int64_t r = sl[i] < s.slots ? rank_of(s, sl[i], m) : 0, n = kp[g + 1] - kp[g];
                z += r * n;
                *items += ceil_div(r, SHRINK_RANKS) * ceil_div(n, SHRINK_TOKENS);
            }
    return z;
}
FADER_INLINE int64_t delta_bytes(const fader_site_t &s, const Plan &p) {
    int64_t items;
    const int64_t z = delta_sizes(s, p, &items), gm = (int64_t)p.groups * s.members;
    return align64(z * 4) + align64(gm * 8) + align64(gm * 4) +
           align64((int64_t)p.terms * s.members * 4) + align64(items * (int64_t)sizeof(Item));
}

FADER_INLINE bool term_fits(const fader_site_t &s, int slot, int m) {
    if (slot < 0 || slot >= s.slots) return false;
    const int64_t i = slot * s.table_stride + m, r = rank_of(s, slot, m);
    if (s.rank[i] < 0) return false;
    const int64_t n = s.cols[2 * m + 1] - s.cols[2 * m];
    if (r && ((s.gain_off && s.gain_off[i] > s.arena_count - n) || (s.bias_off && s.bias_off[i] > s.arena_count - n)))
        return false;
    return !r || (s.a_off[i] <= s.arena_count - r * s.k && s.b_off[i] <= s.arena_count - r * n);
}

static int delta_layout(const fader_site_t &s, const Plan &p, char *mem, int nt, Delta *d) {
    const int32_t *tp = words_at(p, p.term_ptr), *kp = words_at(p, p.tok_ptr), *sl = words_at(p, p.slot);
    const int32_t *ug = words_at(p, p.use_group), *ut = words_at(p, p.use_term);
    const int M = s.members;
    int64_t items, at = 0;
    const int64_t z = delta_sizes(s, p, &items), gm = (int64_t)p.groups * M;
    d->z = (float *)mem, mem += align64(z * 4);
    d->zbase = (int64_t *)mem, mem += align64(gm * 8);
    d->width = (int32_t *)mem, mem += align64(gm * 4);
    d->at = (int32_t *)mem, mem += align64((int64_t)p.terms * M * 4);
    d->item = (Item *)mem;
    for (int g = 0; g < p.groups; g++)
        for (int m = 0; m < M; m++) {
            int w = 0;
            for (int i = tp[g]; i < tp[g + 1]; i++) {
                if (!term_fits(s, sl[i], m)) return FADER_E_BOUNDS;
                d->at[i * M + m] = w;
                w += rank_of(s, sl[i], m);
            }
            d->zbase[g * M + m] = at;
            d->width[g * M + m] = w;
            at += (int64_t)w * (kp[g + 1] - kp[g]);
        }
    // long token lists are cut only when there are too few items to go round
    const int32_t cut = items < 8 * (int64_t)nt ? SHRINK_TOKENS : 1 << 30;
    int64_t k = 0;
    for (int u = 0; u < p.uses; u++)
        for (int m = 0; m < M; m++) {
            const int r = rank_of(s, sl[ut[u]], m), n = kp[ug[u] + 1] - kp[ug[u]];
            for (int r0 = 0; r0 < r; r0 += SHRINK_RANKS)
                for (int64_t t0 = 0; t0 < n; t0 += cut)
                    d->item[k++] = {u, m, r0, (int)min64(SHRINK_RANKS, r - r0), (int)t0, (int)min64(n, t0 + cut)};
        }
    d->items = k;
    return 0;
}

// RB ranks x TB tokens; out[t * os + r] = c[t] * (x[t] . a[r])
template <class X, class Ar, int RB, int TB>
static void shrink_tile(int64_t K, const X *const *x, const Ar *a, const float *c, float *const *out) {
    typedef Step<X, Ar> S;
    V acc[TB][RB];
    for (int t = 0; t < TB; t++)
        for (int r = 0; r < RB; r++) acc[t][r] = vzero();
    int64_t k = 0;
    for (; k + S::SIZE <= K; k += S::SIZE) {
        typename S::Reg xv[TB];
        for (int t = 0; t < TB; t++) xv[t] = S::x(x[t] + k);
        for (int r = 0; r < RB; r++) {
            typename S::Reg av = S::y(a + r * K + k);
            for (int t = 0; t < TB; t++) acc[t][r] = S::dot(acc[t][r], xv[t], av);
        }
    }
    for (int t = 0; t < TB; t++)
        for (int r = 0; r < RB; r++) {
            float sum = vsum(acc[t][r]);
            for (int64_t i = k; i < K; i++) sum += load1(x[t] + i) * load1(a + r * K + i);
            out[t][r] = c[t] * sum;
        }
}
template <class X, class Ar, int TB>
static void shrink_ranks(int nr, int64_t K, const X *const *x, const Ar *a, const float *c, float *const *out) {
    enum { RB = W == 16 ? 8 : 4 };
    float *o[TB];
    for (int r = 0; r < nr;) {
        for (int t = 0; t < TB; t++) o[t] = out[t] + r;
        if (nr - r >= RB) shrink_tile<X, Ar, RB, TB>(K, x, a + r * K, c, o), r += RB;
        else if (nr - r >= 4) shrink_tile<X, Ar, 4, TB>(K, x, a + r * K, c, o), r += 4;
        else if (nr - r >= 2) shrink_tile<X, Ar, 2, TB>(K, x, a + r * K, c, o), r += 2;
        else shrink_tile<X, Ar, 1, TB>(K, x, a + r * K, c, o), r += 1;
    }
}

// Ask for an item's A while another one is computed. Inline: GCC drops calls that only prefetch.
template <class Ar>
FADER_INLINE void shrink_fetch(const fader_site_t &s, const Plan &p, const Item &it) {
    const int slot = words_at(p, p.slot)[words_at(p, p.use_term)[it.use]];
    const char *a = (const char *)((const Ar *)s.arena + s.a_off[slot * s.table_stride + it.member] + it.r0 * s.k);
    for (int64_t at = 0; at < it.nr * s.k * (int64_t)sizeof(Ar); at += 64) prefetch_far(a + at);
}

template <class X, class Ar>
static void shrink_item(const fader_site_t &s, const Plan &p, const Delta &d, const Item &it, const X *x,
                        int64_t xs) {
    enum { TB = W == 16 ? 3 : 2 };
    const int g = words_at(p, p.use_group)[it.use], i = words_at(p, p.use_term)[it.use];
    const int slot = words_at(p, p.slot)[i], gm = g * s.members + it.member;
    const int term = i - words_at(p, p.term_ptr)[g], first = words_at(p, p.tok_ptr)[g];
    const int64_t e = slot * s.table_stride + it.member;
    const Ar *a = (const Ar *)s.arena + s.a_off[e] + it.r0 * s.k;
    float *z = d.z + d.zbase[gm] + d.at[i * s.members + it.member] + it.r0;
    const X *xp[TB];
    float *zp[TB], c[TB];
    for (int t = it.t0; t < it.t1; t += TB) {
        const int n = (int)min64(TB, it.t1 - t);
        for (int j = 0; j < n; j++) {
            const int tok = first + t + j;
            xp[j] = x + words_at(p, p.tok)[tok] * xs;
            zp[j] = z + (int64_t)(t + j) * d.width[gm];
            c[j] = gammas(p)[words_at(p, p.gam)[tok] + term] * s.scale[e];
        }
        if (n == TB) shrink_ranks<X, Ar, TB>(it.nr, s.k, xp, a, c, zp);
        else
            for (int j = 0; j < n; j++) shrink_ranks<X, Ar, 1>(it.nr, s.k, xp + j, a, c + j, zp + j);
    }
}

// y[t][0 : CV*W] += sum over r of z[t][r] * b[r]
template <class Ar, int MR, int CV>
FADER_INLINE void expand_tile(int nr, const Ar *b, int64_t bs, const float *const *z, float *const *y, int64_t c) {
    V acc[MR][CV];
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < CV; v++) acc[m][v] = vload(y[m] + c + v * W);
    for (int r = 0; r < nr; r++) {
        const Ar *br = b + r * bs + c;
        for (int v = 0; v < CV; v++) {
            V bv = vload_as(br + v * W);
            for (int m = 0; m < MR; m++) acc[m][v] = vfma(vset(z[m][r]), bv, acc[m][v]);
        }
    }
    for (int m = 0; m < MR; m++)
        for (int v = 0; v < CV; v++) vstore(y[m] + c + v * W, acc[m][v]);
}
template <class Ar, int MR>
static void expand_rows(int nr, const Ar *b, int64_t bs, const float *const *z, float *const *y, int64_t n) {
    enum { CV = W == 16 ? (MR == 1 ? 8 : 4) : (MR == 1 ? 8 : 2) };
    int64_t c = 0;
    for (; c + CV * W <= n; c += CV * W) expand_tile<Ar, MR, CV>(nr, b, bs, z, y, c);
    for (; c + W <= n; c += W) expand_tile<Ar, MR, 1>(nr, b, bs, z, y, c);
    for (; c < n; c++)
        for (int m = 0; m < MR; m++) {
            float sum = y[m][c];
            for (int r = 0; r < nr; r++) sum = fma1(z[m][r], load1(b + r * bs + c), sum);
            y[m][c] = sum;
        }
}

// place of a slot's vector in the arena, -1 where it has none
FADER_INLINE int64_t vector_of(const fader_site_t &s, const int64_t *off, int slot, int m) {
    return off && rank_of(s, slot, m) ? off[slot * s.table_stride + m] : -1;
}
// whether a term of a group has a vector in a member
FADER_INLINE bool any_vector(const fader_site_t &s, const int32_t *slot, int terms, int m) {
    for (int i = 0; i < terms; i++)
        if (vector_of(s, s.gain_off, slot[i], m) >= 0 || vector_of(s, s.bias_off, slot[i], m) >= 0) return true;
    return false;
}
// y += c * v, over n columns
template <class Ar> static void add_scaled(float *y, float c, const Ar *v, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) vstore(y + i, vfma(vset(c), vload_as(v + i), vload(y + i)));
    for (; i < n; i++) y[i] = fma1(c, load1(v + i), y[i]);
}
// One row's columns [lo, hi) of a member that starts at n0; own: the base's bias, if y holds it already.
// y += G * (y - own) + sum of gamma * scale * biasB, G = sum of gamma * gain, in the row's order
template <class Ar>
static void add_vectors(const fader_site_t &s, const int32_t *slot, const float *gamma, int terms, int m, int64_t n0,
                        int64_t lo, int64_t hi, const float *own, float *y) {
    const Ar *arena = (const Ar *)s.arena;
    float g[VECTOR_COLUMNS];
    for (int64_t c = lo; c < hi; c += VECTOR_COLUMNS, y += VECTOR_COLUMNS) {
        const int64_t n = min64(VECTOR_COLUMNS, hi - c);
        bool any = false;
        for (int i = 0; i < terms; i++) {
            const int64_t at = vector_of(s, s.gain_off, slot[i], m);
            if (at < 0) continue;
            if (!any) memset(g, 0, sizeof g);
            any = true;
            add_scaled(g, gamma[i], arena + at + (c - n0), n);
        }
        for (int64_t i = 0; any && i < n; i++) y[i] = fma1(g[i], own ? y[i] - own[c + i] : y[i], y[i]);
        for (int i = 0; i < terms; i++) {
            const int64_t at = vector_of(s, s.bias_off, slot[i], m);
            if (at >= 0) add_scaled(y, gamma[i] * s.scale[slot[i] * s.table_stride + m], arena + at + (c - n0), n);
        }
    }
}

// Ask for what expand_block will read of columns [c0, c1): short pieces of many rows, which no hardware
// prefetcher follows; the base's products hide the wait. Inline: GCC drops calls that only prefetch.
template <class Ar>
FADER_INLINE void expand_fetch(const fader_site_t &s, const Plan &p, int64_t c0, int64_t c1) {
    const int32_t *tp = words_at(p, p.term_ptr), *sl = words_at(p, p.slot);
    const int64_t line = 64 / sizeof(Ar);
    int64_t left = FETCH_LINES;
    for (int mem = 0; mem < s.members; mem++) {
        const int64_t n0 = s.cols[2 * mem], n1 = s.cols[2 * mem + 1];
        const int64_t lo = max64(n0, c0), hi = min64(n1, c1);
        for (int i = 0; lo < hi && i < tp[p.groups]; i++) {
            const int r = rank_of(s, sl[i], mem);
            if (!r) continue;
            left -= r * ceil_div(hi - lo, line);
            if (left < 0) return;
            const Ar *b = (const Ar *)s.arena + s.b_off[sl[i] * s.table_stride + mem] + (lo - n0);
            for (int j = 0; j < r; j++, b += n1 - n0)
                for (int64_t c = 0; c < hi - lo; c += line) prefetch_far(b + c);
        }
    }
}

// rows [m0, m1), columns [c0, c1) of the site; y points at (m0, c0)
template <class Ar>
static void expand_block(const fader_site_t &s, const Plan &p, const Delta &d, int64_t m0, int64_t m1,
                         int64_t c0, int64_t c1, float *y, int64_t ys) {
    enum { MR = 4 };
    const int32_t *tp = words_at(p, p.term_ptr), *kp = words_at(p, p.tok_ptr), *sl = words_at(p, p.slot);
    const int32_t *tok = words_at(p, p.tok);
    for (int mem = 0; mem < s.members; mem++) {
        const int64_t n0 = s.cols[2 * mem], n1 = s.cols[2 * mem + 1];
        const int64_t lo = max64(n0, c0), hi = min64(n1, c1);
        if (lo >= hi) continue;
        for (int g = 0; g < p.groups; g++) {
            const int gm = g * s.members + mem;
            if (!d.width[gm]) continue;
            const bool vectors = any_vector(s, sl + tp[g], tp[g + 1] - tp[g], mem);
            float *yp[MR];
            const float *zp[MR], *zt[MR];
            for (int t = kp[g]; t < kp[g + 1];) {
                int n = 0;
                for (; t < kp[g + 1] && n < MR; t++) {
                    if (tok[t] < m0 || tok[t] >= m1) continue;
                    yp[n] = y + (tok[t] - m0) * ys + (lo - c0);
                    if (vectors)
                        add_vectors<Ar>(s, sl + tp[g], gammas(p) + words_at(p, p.gam)[t], tp[g + 1] - tp[g], mem, n0, lo,
                                        hi, s.panels ? 0 : s.bias, yp[n]);
                    zp[n++] = d.z + d.zbase[gm] + (int64_t)(t - kp[g]) * d.width[gm];
                }
                for (int i = tp[g]; i < tp[g + 1]; i++) {
                    const int r = rank_of(s, sl[i], mem);
                    if (!r) continue;
                    const Ar *b = (const Ar *)s.arena + s.b_off[sl[i] * s.table_stride + mem] + (lo - n0);
                    for (int j = 0; j < n; j++) zt[j] = zp[j] + d.at[i * s.members + mem];
                    if (n == MR) expand_rows<Ar, MR>(r, b, n1 - n0, zt, yp, hi - lo);
                    else
                        for (int j = 0; j < n; j++) expand_rows<Ar, 1>(r, b, n1 - n0, zt + j, yp + j, hi - lo);
                }
            }
        }
    }
}

} // namespace
