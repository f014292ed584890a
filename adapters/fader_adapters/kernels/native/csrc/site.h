// A site: base panels, then the delta, then one rounding; two parallel phases (pack x and shrink;
// column blocks). Knows the plan's groups; chooses work units, never the order of a row's sum.
#pragma once
#include "delta.h"
#include "gemm.h"
#include "nucleus.h"
#include "team.h"

namespace {

enum { ROWS_MAX = 132, BLOCK_PANELS = 4, PACK_BLOCKS = 8 };

// Rows past 4 are packed block by block: strides of whole rows would fall on few cache sets.
template <class In, class E> struct Packer {
    typedef typename E::X X;
    enum { PER_BLOCK = BLOCK / 2 * E::STEP };
    static const bool same = sizeof(In) * 2 == sizeof(X) * E::STEP;
    static bool direct(const In *x, int64_t T, int64_t stride) {
        return T <= 4 && same && (uintptr_t)x % sizeof(X) == 0 && stride * sizeof(In) % sizeof(X) == 0;
    }
    static Rows<X> view(const In *x, int64_t stride) {
        const int64_t per = sizeof(X) / sizeof(In);
        return {(const X *)x, stride / (per ? per : 1), PER_BLOCK};
    }
    static void block(const In *x, int64_t stride, int64_t T, int64_t b, X *to) {
        for (int64_t t = 0; t < T; t++) {
            const In *from = x + t * stride + b * BLOCK;
            if (same) memcpy(to + t * PER_BLOCK, from, BLOCK * sizeof(In));
            else
                for (int i = 0; i < BLOCK; i++) ((float *)(to + t * PER_BLOCK))[i] = load1(from + i);
        }
    }
};

FADER_INLINE void finish_row(const float *acc, const float *bias, int64_t n, void *out, int dtype) {
    int64_t c = 0;
    if (dtype == FADER_F32) {
        float *o = (float *)out;
        for (; c + W <= n; c += W)
            vstore(o + c, bias ? vadd(vload(acc + c), vload(bias + c)) : vload(acc + c));
        for (; c < n; c++) o[c] = bias ? acc[c] + bias[c] : acc[c];
        return;
    }
    u16 *o = (u16 *)out;
    for (; c + W <= n; c += W)
        vstore_bf16(o + c, bias ? vadd(vload(acc + c), vload(bias + c)) : vload(acc + c));
    for (; c < n; c++) o[c] = to_bf16(bias ? acc[c] + bias[c] : acc[c]);
}

FADER_INLINE bool touched(const fader_site_t &s, const Plan &p) {
    for (int i = 0; i < p.terms; i++)
        for (int m = 0; m < s.members; m++) {
            const int slot = words_at(p, p.slot)[i];
            if (!term_fits(s, slot, m) || rank_of(s, slot, m)) return true; // the usual way says what does not fit
        }
    return false;
}

template <class In, class E, class Ar>
int site_run(const fader_site_t *s, const Plan *plan, int64_t T, const In *x, int64_t xs, void *out,
             int out_dtype, int64_t os, bool screened, char *scratch, int64_t bytes, int64_t *need, int nt) {
    typedef Packer<In, E> Pack;
    typedef typename E::X X;
    const int64_t n = s->n, K = s->k, panels = ceil_div(n, PANEL);
    const int64_t chunks = ceil_div(T, ROWS_MAX), rows = ceil_div(T, chunks);
    // narrower blocks only when the threads would otherwise starve
    int bp = BLOCK_PANELS;
    while (bp > 1 && ceil_div(panels, bp) * chunks < 4 * nt) bp >>= 1;
    const int64_t col_blocks = ceil_div(panels, bp), width = bp * PANEL;
    const bool direct = !s->panels || Pack::direct(x, T, xs);

    const int64_t acc_bytes = align64(rows * width * 4), own = acc_bytes + align64(E::BUF);
    // few rows without adapters: every thread packs for itself, which saves a barrier
    const bool apart = !direct && !plan && T <= 16;
    const int64_t pack_one = direct ? 0 : align64(T * K * (int64_t)sizeof(X) * E::STEP / 2);
    const int64_t pack_bytes = apart ? nt * pack_one : pack_one;
    Delta d;
    const bool nuclei = screened && asks_nuclei(*s, T);
    const int64_t screen_bytes = screened ? Screened::bytes(n, K, T) : 0, before = own * nt + pack_bytes;
    const int64_t fixed = before + screen_bytes + (nuclei ? nuclei_bytes(*s, T, nt) : 0);
    const int64_t total = fixed + (plan ? delta_bytes(*s, *plan) : 0);
    *need = total + 64;
    if (bytes < total) return FADER_E_SCRATCH;
    if (plan) {
        const int err = delta_layout(*s, *plan, scratch + fixed, nt, &d);
        if (err) return err;
    }
    const Screened rows_screened(scratch + before, n, K, T);
    const uint8_t *const hit = screened && screen(*s, T, x, xs, rows_screened, nt) ? rows_screened.hit : 0;
    if (nuclei) s->screen->computed = panels;
    const int64_t pack_blocks = direct ? 0 : K / BLOCK, shrink_items = plan ? d.items : 0;
    const int64_t pack_items = apart ? 0 : ceil_div(pack_blocks, PACK_BLOCKS);
    const int64_t esize = out_dtype == FADER_F32 ? 4 : 2;
    X *const packs = (X *)(scratch + own * nt);
    const auto pack = [&](int64_t from, int64_t to, X *into) {
        for (int64_t b = from; b < to; b++) Pack::block(x, xs, T, b, into + b * T * Pack::PER_BLOCK);
    };
    share(nt, pack_items + shrink_items, [&](int64_t i, int) {
        if (i < shrink_items) {
            if (i + nt < shrink_items) shrink_fetch<Ar>(*s, *plan, d.item[i + nt]);
            shrink_item<In, Ar>(*s, *plan, d, d.item[i], x, xs);
        } else {
            const int64_t from = (i - shrink_items) * PACK_BLOCKS;
            pack(from, min64(pack_blocks, from + PACK_BLOCKS), packs);
        }
    });
    bool ready[TEAM_MAX] = {}; // which threads have packed for themselves
    const auto products = [&](int me, int64_t m0, int64_t m1, int64_t p, int64_t np, float *a) {
        X *const packed = packs + (apart ? me * pack_one / (int64_t)sizeof(X) : 0);
        if (apart && !ready[me]) {
            pack(0, pack_blocks, packed);
            ready[me] = true;
        }
        Rows<X> xc = direct ? Pack::view(x, xs) : Rows<X>{packed, Pack::PER_BLOCK, T * (int64_t)Pack::PER_BLOCK};
        xc.p += m0 * xc.row;
        Gemm<E>::run(m1 - m0, K, xc, s->panels + p * (K / 2) * E::PAIR, s->scales + (E::SCALED ? p * (K / BLOCK) * PANEL : 0), (int)np,
                     a, width, scratch + own * me + acc_bytes);
    };
    const auto finish = [&](const float *a, int64_t as, int64_t m0, int64_t m1, int64_t c0, int64_t c1) {
        for (int64_t m = m0; m < m1; m++)
            finish_row(a + (m - m0) * as, s->bias ? s->bias + c0 : 0, c1 - c0, (char *)out + (m * os + c0) * esize, out_dtype);
    };
    share(nt, chunks * col_blocks, [&](int64_t u, int me) {
        float *const acc = (float *)(scratch + own * me);
        const int64_t cb = u % col_blocks, m0 = u / col_blocks * rows, m1 = min64(T, m0 + rows);
        const int64_t c0 = cb * width, c1 = min64(n, c0 + width), p0 = cb * bp;
        float *a = acc;
        int64_t as = width;
        if (plan) expand_fetch<Ar>(*s, *plan, c0, c1);
        if (s->panels) {
            const int64_t p1 = min64(p0 + bp, panels);
            if (!hit) products(me, m0, m1, p0, p1 - p0, a);
            else
                for (int64_t p = p0; p < p1; p++) {
                    if (hit[p]) products(me, m0, m1, p, 1, a + (p - p0) * PANEL);
                    else
                        for (int64_t m = 0; m < m1 - m0; m++)
                            for (int c = 0; c < PANEL; c++) a[m * as + (p - p0) * PANEL + c] = -INFINITY;
                }
        } else {
            a = (float *)out + m0 * os + c0;
            as = os;
        }
        if (plan) expand_block<Ar>(*s, *plan, d, m0, m1, c0, c1, a, as);
        if (s->panels) finish(a, as, m0, m1, c0, c1);
    });
    if (!hit || !nuclei) return 0;
    find_nuclei(*s, T, (float *)out, os, rows_screened, scratch + before + screen_bytes, nt, [&] {
        share(nt, ceil_div(panels, SCREEN_GROUP), [&](int64_t group, int me) {
            float *const acc = (float *)(scratch + own * me);
            const int64_t last = min64(panels, (group + 1) * SCREEN_GROUP);
            for (int64_t p = group * SCREEN_GROUP, np; p < last; p += np) {
                for (np = 1; np < bp && p + np < last && hit[p + np] == hit[p];) np++;
                if (hit[p] != CHOSEN) continue;
                products(me, 0, T, p, np, acc);
                finish(acc, width, 0, T, p * PANEL, min64(n, (p + np) * PANEL));
            }
        });
    });
    return 0;
}

template <class In, class E>
int site_arena(const fader_site_t *s, const Plan *p, int64_t T, const void *x, int64_t xs, void *out,
               int od, int64_t os, char *scratch, int64_t bytes, int64_t *need, int nt) {
    const bool screened = !E::SCALED && od == FADER_F32 && s->screen && s->screen->count == T && T <= SCREEN_ROWS && !(p && touched(*s, *p));
    if (screened) p = 0;
    if (s->arena_dtype == FADER_BF16)
        return site_run<In, E, u16>(s, p, T, (const In *)x, xs, out, od, os, screened, scratch, bytes, need, nt);
    return site_run<In, E, float>(s, p, T, (const In *)x, xs, out, od, os, screened, scratch, bytes, need, nt);
}

bool screen_packed(int64_t n, int64_t k, const void *panels, int dtype, int8_t *codes, float *scales, int nt) {
    if (dtype == FADER_BF16) return screen_pack(n, k, (const u16 *)panels, codes, scales, nt);
    return screen_pack(n, k, (const float *)panels, codes, scales, nt);
}

int site(const fader_site_t *s, const int32_t *blob, int64_t T, const void *x, int x_dtype,
         int64_t xs, void *out, int od, int64_t os, void *scratch, int64_t bytes, int64_t *need,
         int nt) {
    const Plan *p = (const Plan *)blob;
    if (p && !p->tokens) p = 0;
    if (!s->panels && !p) return 0;
    char *sc = (char *)scratch;
    if (s->weights == FADER_PLAIN) {
        if (x_dtype == FADER_F32)
            return site_arena<float, PlainFp>(s, p, T, x, xs, out, od, os, sc, bytes, need, nt);
        return site_arena<u16, PlainBf>(s, p, T, x, xs, out, od, os, sc, bytes, need, nt);
    }
    if (x_dtype == FADER_F32)
        return site_arena<float, Fp>(s, p, T, x, xs, out, od, os, sc, bytes, need, nt);
#if FADER_ISA >= 3
    return site_arena<u16, Bf>(s, p, T, x, xs, out, od, os, sc, bytes, need, nt);
#else
    return site_arena<u16, Fp>(s, p, T, x, xs, out, od, os, sc, bytes, need, nt);
#endif
}

} // namespace
