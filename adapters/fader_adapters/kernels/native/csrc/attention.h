// Paged attention: walks each row's blocks in tiles of 32 absolute positions and splits of 1024. Knows
// block tables and causality; the arithmetic of one tile is attn_tile.h's.
//
// Splits are always summed apart and joined in order, whether one thread walks them or several, so
// results depend neither on threads nor on other rows nor on the cut of a prompt in chunks.
#pragma once

#include "attn_tile.h"
#include "team.h"

namespace {

enum { SPLIT = 1024, QUERIES = 64 };

struct AttnItem {
    int32_t row, head, first, count; // queries [first, first+count) of a row, one kv head
};
struct AttnRun {
    const fader_attn_t *a;
    const void *q;
    const int32_t *q_start, *context, *tables;
    void *out;
    int64_t group;
};

// a query's share of one split, at `part`: m, l, then acc[value_dim]
FADER_INLINE void join(Query &q, const Query &p, int64_t dim) {
    if (p.l == 0.0f) return;
    if (q.m == -__builtin_inff()) {
        q.m = p.m, q.l = p.l;
        memcpy(q.acc, p.acc, (size_t)dim * 4);
        return;
    }
    const float m = q.m > p.m ? q.m : p.m;
    float f[W], g[W];
    vstore(f, vexp(vset(q.m - m)));
    vstore(g, vexp(vset(p.m - m)));
    q.l = q.l * f[0] + p.l * g[0];
    for (int64_t d = 0; d < dim; d += W)
        vstore(q.acc + d, vfma(vload(p.acc + d), vset(g[0]), vmul(vload(q.acc + d), vset(f[0]))));
    q.m = m;
}

static int item_queries(const AttnRun &r, const AttnItem &it, float *acc, Query *q) {
    const fader_attn_t &a = *r.a;
    const int64_t n = r.q_start[it.row + 1] - r.q_start[it.row], size = a.dtype == FADER_BF16 ? 2 : 4;
    int k = 0;
    for (int i = it.first; i < it.first + it.count; i++)
        for (int64_t h = 0; h < r.group; h++, k++) {
            const int64_t pos = r.context[it.row] - n + i;
            const int64_t token = r.q_start[it.row] + i, head = it.head * r.group + h;
            q[k].q = (const char *)r.q + (token * a.heads + head) * a.dim * size;
            q[k].hi = pos + 1;
            q[k].lo = a.window > 0 ? max64(0, pos + 1 - a.window) : 0;
            q[k].m = -__builtin_inff();
            q[k].l = 0.0f;
            q[k].acc = acc + k * a.value_dim;
        }
    return k;
}

// Ask for the keys and values of positions [from, to): a token's lie in lines far apart, which no hardware
// prefetcher follows. Inline: GCC drops calls that only prefetch.
template <class Ty>
FADER_INLINE void fetch_tile(const fader_attn_t &a, const int32_t *table, const Ty *kc, const Ty *vc, int64_t from, int64_t to) {
    const int64_t line = 64 / (int64_t)sizeof(Ty);
    for (int64_t p = from; p < to; p++) {
        const int64_t at = (table[p / a.block_size] * (int64_t)a.block_size + p % a.block_size) * a.kv_heads;
        for (int64_t d = 0; d < a.dim; d += line) prefetch_far(kc + at * a.dim + d);
        for (int64_t d = 0; d < a.value_dim; d += line) prefetch_far(vc + at * a.value_dim + d);
    }
}

// positions [from, to) of one item, from a clean start
template <class Ty>
static void walk(const AttnRun &r, const AttnItem &it, Query *q, int n, int64_t from, int64_t to, u32 *kt, float *s) {
    const fader_attn_t &a = *r.a;
    const int64_t words = a.dim * (int64_t)sizeof(Ty) / 4;
    const int32_t *table = r.tables + it.row * a.max_blocks;
    const Ty *kc = (const Ty *)a.k_cache + it.head * a.dim, *vc = (const Ty *)a.v_cache + it.head * a.value_dim;
    for (int64_t i = 0; i < n; i++) {
        q[i].m = -__builtin_inff();
        q[i].l = 0.0f;
        memset(q[i].acc, 0, (size_t)a.value_dim * 4);
    }
    from = max64(from, q[0].lo / KT * KT);
    to = min64(to, q[n - 1].hi);
    fetch_tile<Ty>(a, table, kc, vc, from, min64(to, from + KT));
    for (int64_t pos = from; pos < to; pos += KT) {
        fetch_tile<Ty>(a, table, kc, vc, pos + KT, min64(to, pos + 2 * KT));
        const int tokens = (int)min64(KT, to - pos);
        const Ty *krow[KT], *vrow[KT];
        for (int t = 0; t < tokens; t++) {
            const int64_t p = pos + t, at = (table[p / a.block_size] * a.block_size + p % a.block_size) * a.kv_heads;
            krow[t] = kc + at * a.dim;
            vrow[t] = vc + at * a.value_dim;
        }
        transpose_tile((const u32 *const *)krow, tokens, words, kt);
        scores<Ty>(q, n, words, kt, a.scale, a.softcap, s);
        for (int i = 0; i < n; i++) soften(q[i], pos, a.value_dim, s + i * KT);
        weigh<Ty>(q, n, s, vrow, pos, a.value_dim);
    }
}

// what the values are multiplied by: 1 / sum, with the head's sink in it
FADER_INLINE float norm_of(const Query &q, const float *sinks, int64_t head) {
    if (!sinks) return 1.0f / q.l;
    const float sink = sinks[head], m = q.m > sink ? q.m : sink;
    float f[W], g[W];
    vstore(f, vexp(vset(q.m - m)));
    vstore(g, vexp(vset(sink - m)));
    return f[0] / (q.l * f[0] + g[0]);
}

template <class Ty> static void write_out(const AttnRun &r, const AttnItem &it, const Query *q, int n) {
    const fader_attn_t &a = *r.a;
    for (int k = 0; k < n; k++) {
        const int64_t token = r.q_start[it.row] + it.first + k / r.group, head = it.head * r.group + k % r.group;
        Ty *o = (Ty *)r.out + (token * a.heads + head) * a.value_dim;
        const V inv = vset(norm_of(q[k], a.sinks, head));
        for (int64_t d = 0; d < a.value_dim; d += W) vstore_as(o + d, vmul(vload(q[k].acc + d), inv));
    }
}

static int64_t splits_of(const AttnRun &r, const AttnItem &it) {
    const int64_t n = r.q_start[it.row + 1] - r.q_start[it.row];
    return ceil_div(r.context[it.row] - n + it.first + it.count, SPLIT);
}

// memory of one thread: queries, partial queries, scores, transposed keys, two sets of sums
struct AttnMem {
    Query *q, *part;
    float *s, *acc, *part_acc;
    u32 *kt;
    static int64_t bytes(int64_t nq, const fader_attn_t &a) {
        return 2 * align64(nq * (int64_t)sizeof(Query)) + align64(nq * KT * 4) + 2 * align64(nq * a.value_dim * 4) + align64(a.dim * KT * 4);
    }
    AttnMem(char *p, int64_t nq, const fader_attn_t &a) {
        q = (Query *)p, p += align64(nq * (int64_t)sizeof(Query));
        part = (Query *)p, p += align64(nq * (int64_t)sizeof(Query));
        s = (float *)p, p += align64(nq * KT * 4);
        acc = (float *)p, p += align64(nq * a.value_dim * 4);
        part_acc = (float *)p, p += align64(nq * a.value_dim * 4);
        kt = (u32 *)p;
    }
};

template <class Ty>
static int attention_run(AttnRun &r, int64_t R, char *scratch, int64_t bytes, int64_t *need, int nt) {
    const fader_attn_t &a = *r.a;
    const int64_t per = max64(1, QUERIES / r.group), nq = per * r.group;
    int64_t items = 0, splits = 1;
    for (int64_t i = 0; i < R; i++) {
        items += ceil_div(r.q_start[i + 1] - r.q_start[i], per) * a.kv_heads;
        splits = max64(splits, ceil_div(r.context[i], SPLIT));
    }
    if (!items) return 0;
    const bool wide = items < 2 * (int64_t)nt && splits > 1; // several threads walk one item
    const int64_t own = AttnMem::bytes(nq, a), list = align64(items * (int64_t)sizeof(AttnItem));
    const int64_t part = align64(nq * (a.value_dim + 2) * 4), parts = wide ? items * splits * part : 0;
    *need = list + own * nt + parts + 64;
    if (bytes < list + own * nt + parts) return FADER_E_SCRATCH;
    AttnItem *item = (AttnItem *)scratch;
    int64_t k = 0;
    for (int64_t i = 0; i < R; i++)
        for (int64_t f = 0, n = r.q_start[i + 1] - r.q_start[i]; f < n; f += per)
            for (int h = 0; h < a.kv_heads; h++) item[k++] = {(int)i, h, (int)f, (int)min64(per, n - f)};
    char *threads = scratch + list, *shared = threads + own * nt;
    if (wide)
        share(nt, items * splits, [&](int64_t u, int me) {
            AttnMem mem(threads + own * me, nq, a);
            const AttnItem &it = item[u / splits];
            const int64_t at = u % splits * SPLIT;
            float *to = (float *)(shared + u * part);
            const int n = item_queries(r, it, to + 2 * nq, mem.part);
            walk<Ty>(r, it, mem.part, n, at, at + SPLIT, mem.kt, mem.s);
            for (int i = 0; i < n; i++) to[2 * i] = mem.part[i].m, to[2 * i + 1] = mem.part[i].l;
        });
    share(nt, items, [&](int64_t u, int me) {
        AttnMem mem(threads + own * me, nq, a);
        const AttnItem &it = item[u];
        const int n = item_queries(r, it, mem.acc, mem.q);
        item_queries(r, it, mem.part_acc, mem.part);
        for (int64_t sp = 0, all = splits_of(r, it); sp < all; sp++) {
            if (wide) {
                const float *from = (const float *)(shared + (u * splits + sp) * part);
                for (int i = 0; i < n; i++) {
                    mem.part[i].m = from[2 * i], mem.part[i].l = from[2 * i + 1];
                    mem.part[i].acc = (float *)from + 2 * nq + i * a.value_dim;
                }
            } else walk<Ty>(r, it, mem.part, n, sp * SPLIT, (sp + 1) * SPLIT, mem.kt, mem.s);
            for (int i = 0; i < n; i++) join(mem.q[i], mem.part[i], a.value_dim);
        }
        write_out<Ty>(r, it, mem.q, n);
    });
    return 0;
}

int attention(const fader_attn_t *a, int64_t, int64_t R, const void *q, const int32_t *q_start,
              const int32_t *context, const int32_t *tables, void *out, void *scratch, int64_t bytes, int64_t *need, int nt) {
    AttnRun r = {a, q, q_start, context, tables, out, a->heads / a->kv_heads};
    if (a->dtype == FADER_BF16) return attention_run<u16>(r, R, (char *)scratch, bytes, need, nt);
    return attention_run<float>(r, R, (char *)scratch, bytes, need, nt);
}

} // namespace
