// An embedding's delta: a token names the column of A that stands for x . A^T. Rows are independent items.
#pragma once
#include "delta.h"
#include "team.h"

namespace {

// one row: terms in its own order, summed in fp32 in `acc` [n]
template <class Ar, class Y>
void lookup_row(const fader_site_t &s, const int32_t *slot, const float *gamma, int terms, int64_t id, float *acc, Y *y) {
    const int64_t n = s.n;
    for (int64_t c = 0; c < n; c++) acc[c] = load1(y + c);
    if (any_vector(s, slot, terms, 0)) add_vectors<Ar>(s, slot, gamma, terms, 0, 0, 0, n, 0, acc);
    for (int i = 0; i < terms; i++) {
        const int64_t e = slot[i] * s.table_stride;
        const int rank = rank_of(s, slot[i], 0);
        if (!rank) continue;
        const Ar *a = (const Ar *)s.arena + s.a_off[e] + id, *b = (const Ar *)s.arena + s.b_off[e];
        for (int r = 0; r < rank; r++)
            add_scaled(acc, gamma[i] * s.scale[e] * load1(a + r * s.k), b + r * n, n);
    }
    for (int64_t c = 0; c < n; c++) store1(y + c, acc[c]);
}

template <class Ar, class Y>
int lookup_run(const fader_site_t &s, const Plan &p, const int64_t *ids, Y *y, int64_t ys, char *scratch, int64_t bytes,
               int64_t *need, int nt) {
    const int64_t own = align64(s.n * 4);
    *need = own * nt;
    if (bytes < *need) return FADER_E_SCRATCH;
    const int32_t *tp = words_at(p, p.term_ptr), *kp = words_at(p, p.tok_ptr), *sl = words_at(p, p.slot);
    for (int g = 0; g < p.groups; g++) {
        for (int i = tp[g]; i < tp[g + 1]; i++)
            if (!term_fits(s, sl[i], 0)) return FADER_E_BOUNDS;
        for (int t = kp[g]; t < kp[g + 1]; t++) {
            const int64_t id = ids[words_at(p, p.tok)[t]];
            if (id < 0 || id >= s.k) return FADER_E_BOUNDS;
        }
    }
    for (int g = 0; g < p.groups; g++) {
        const int terms = tp[g + 1] - tp[g];
        bool touched = false;
        for (int i = tp[g]; i < tp[g + 1]; i++) touched = touched || rank_of(s, sl[i], 0);
        if (!touched) continue; // y keeps its bits
        share(nt, kp[g + 1] - kp[g], [&](int64_t i, int me) {
            const int64_t at = kp[g] + i, tok = words_at(p, p.tok)[at];
            lookup_row<Ar>(s, sl + tp[g], gammas(p) + words_at(p, p.gam)[at], terms, ids[tok],
                           (float *)(scratch + own * me), y + tok * ys);
        });
    }
    return 0;
}

template <class Ar>
int lookup_typed(const fader_site_t &s, const Plan &p, const int64_t *ids, void *y, int yd, int64_t ys, char *scratch,
                 int64_t bytes, int64_t *need, int nt) {
    if (yd == FADER_F32) return lookup_run<Ar>(s, p, ids, (float *)y, ys, scratch, bytes, need, nt);
    return lookup_run<Ar>(s, p, ids, (u16 *)y, ys, scratch, bytes, need, nt);
}

int lookup(const fader_site_t *s, const int32_t *blob, int64_t, const int64_t *ids, void *y, int yd, int64_t ys,
           void *scratch, int64_t bytes, int64_t *need, int nt) {
    const Plan *p = (const Plan *)blob;
    if (!p || !p->tokens) return 0;
    if (s->arena_dtype == FADER_BF16) return lookup_typed<u16>(*s, *p, ids, y, yd, ys, (char *)scratch, bytes, need, nt);
    return lookup_typed<float>(*s, *p, ids, y, yd, ys, (char *)scratch, bytes, need, nt);
}

} // namespace
