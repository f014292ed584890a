// A stack of experts: each row against the matrix of its own expert. Rows lie expert by expert; a segment is
// some rows of one of them. Knows no tokens, routers or adapters.
#pragma once
#include "site.h"

namespace {

struct Segment {
    int64_t first, rows, expert;
};

template <class In, class E>
int experts_run(const fader_experts_t *s, int64_t T, const int32_t *ends, const In *x, int64_t xs, void *out,
                int out_dtype, int64_t os, char *scratch, int64_t bytes, int64_t *need, int nt) {
    typedef Packer<In, E> Pack;
    typedef typename E::X X;
    const int64_t n = s->n, K = s->k, panels = n / PANEL, blocks = K / BLOCK;
    int64_t segments = 0;
    for (int64_t e = 0, from = 0; e < s->experts; from = ends[e++]) segments += ceil_div(ends[e] - from, ROWS_MAX);
    int bp = BLOCK_PANELS;
    while (bp > 1 && ceil_div(panels, bp) * segments < 4 * nt) bp >>= 1;
    const int64_t col_blocks = ceil_div(panels, bp), width = bp * PANEL;
    const int64_t acc_bytes = align64(min64(T, ROWS_MAX) * width * 4), own = acc_bytes + align64(E::BUF);
    const int64_t list_bytes = align64(segments * (int64_t)sizeof(Segment));
    const int64_t per_row = K / 2 * E::STEP; // of X, packed
    const int64_t total = own * nt + list_bytes + align64(T * per_row * (int64_t)sizeof(X));
    *need = total + 64;
    if (bytes < total) return FADER_E_SCRATCH;

    Segment *const list = (Segment *)(scratch + own * nt);
    X *const packs = (X *)(scratch + own * nt + list_bytes);
    int64_t count = 0, indirect = 0;
    for (int64_t e = 0, from = 0; e < s->experts; from = ends[e++]) {
        const int64_t rows = ends[e] - from, parts = ceil_div(rows, ROWS_MAX);
        for (int64_t i = 0; i < parts; i++) {
            const int64_t first = from + rows * i / parts, end = from + rows * (i + 1) / parts;
            list[count++] = {first, end - first, e};
            indirect += !Pack::direct(x + first * xs, end - first, xs);
        }
    }
    const int64_t pieces = ceil_div(blocks, PACK_BLOCKS);
    if (indirect)
        share(nt, count * pieces, [&](int64_t i, int) {
            const Segment &g = list[i / pieces];
            const In *from = x + g.first * xs;
            if (Pack::direct(from, g.rows, xs)) return;
            const int64_t b0 = i % pieces * PACK_BLOCKS, b1 = min64(blocks, b0 + PACK_BLOCKS);
            for (int64_t b = b0; b < b1; b++)
                Pack::block(from, xs, g.rows, b, packs + g.first * per_row + b * g.rows * Pack::PER_BLOCK);
        });
    const int64_t esize = out_dtype == FADER_F32 ? 4 : 2, weights = panels * (K / 2) * E::PAIR;
    const int64_t scales = panels * blocks * PANEL;
    share(nt, count * col_blocks, [&](int64_t i, int me) {
        float *const acc = (float *)(scratch + own * me);
        const Segment &g = list[i / col_blocks];
        const int64_t p0 = i % col_blocks * bp, c0 = p0 * PANEL, c1 = min64(n, c0 + width);
        const In *from = x + g.first * xs;
        Rows<X> rows = Pack::direct(from, g.rows, xs)
                           ? Pack::view(from, xs)
                           : Rows<X>{packs + g.first * per_row, Pack::PER_BLOCK, g.rows * (int64_t)Pack::PER_BLOCK};
        Gemm<E>::run(g.rows, K, rows, s->panels + g.expert * weights + p0 * (K / 2) * E::PAIR,
                     s->scales + (E::SCALED ? g.expert * scales + p0 * blocks * PANEL : 0),
                     (int)min64(bp, panels - p0), acc, width, (char *)acc + acc_bytes);
        for (int64_t m = 0; m < g.rows; m++)
            finish_row(acc + m * width, s->bias ? s->bias + g.expert * n + c0 : 0, c1 - c0,
                       (char *)out + ((g.first + m) * os + c0) * esize, out_dtype);
    });
    return 0;
}

int experts(const fader_experts_t *s, int64_t T, const int32_t *ends, const void *x, int dtype, int64_t xs, void *out,
            int od, int64_t os, void *scratch, int64_t bytes, int64_t *need, int nt) {
    char *sc = (char *)scratch;
    const float *const f = (const float *)x;
    const u16 *const h = (const u16 *)x;
    if (s->weights == FADER_PLAIN) {
        if (dtype == FADER_F32) return experts_run<float, PlainFp>(s, T, ends, f, xs, out, od, os, sc, bytes, need, nt);
        return experts_run<u16, PlainBf>(s, T, ends, h, xs, out, od, os, sc, bytes, need, nt);
    }
    if (dtype == FADER_F32) return experts_run<float, Fp>(s, T, ends, f, xs, out, od, os, sc, bytes, need, nt);
#if FADER_ISA >= 3
    return experts_run<u16, Bf>(s, T, ends, h, xs, out, od, os, sc, bytes, need, nt);
#else
    return experts_run<u16, Fp>(s, T, ends, h, xs, out, od, os, sc, bytes, need, nt);
#endif
}

} // namespace
