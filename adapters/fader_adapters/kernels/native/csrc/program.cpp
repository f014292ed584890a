// Runs a recorded step: the calls of one forward, in order, without leaving native code between them. Knows
// the order and the addresses; what a call computes is the kernels' business.
#include "common.h"
#include "team.h"

enum { MAP_ITEM = 1 << 14 }; // elements of an elementwise call that a thread takes at a time, about

static int map(const fader_op_t &o, int nt) {
    int cut = 0; // the outermost dimension that can be cut
    while (cut < 3 && o.size[cut] == 1) cut++;
    int64_t inside = 1;
    for (int d = cut + 1; d < 4; d++) inside *= o.size[d];
    const int64_t rows = max64(1, MAP_ITEM / max64(1, inside)), items = ceil_div(o.size[cut], rows);
    if (nt < 2 || items < 2) return fader_map(&o);
    const int64_t wide = o.dtype == FADER_BF16 ? 2 : 4, out_wide = o.out_dtype == FADER_BF16 ? 2 : 4;
    int status = 0;
    share(nt, items, [&](int64_t item, int) {
        fader_op_t part = o;
        const int64_t first = item * rows;
        part.size[cut] = min64(rows, o.size[cut] - first);
        part.x = (const char *)o.x + first * o.x_step[cut] * wide;
        if (o.y) part.y = (const char *)o.y + first * o.y_step[cut] * wide;
        part.out = (char *)o.out + first * o.out_step[cut] * out_wide;
        if (const int given = fader_map(&part)) __atomic_store_n(&status, given, __ATOMIC_RELAXED);
    });
    return status;
}

static int gather(const fader_op_t &o) {
    if (o.map) return fader_panel_rows(o.n, o.k, o.x, o.dtype, (const int64_t *)o.y, o.size[0], o.out);
    const int64_t *index = (const int64_t *)o.y, bytes = o.k * (o.dtype == FADER_BF16 ? 2 : 4);
    for (int64_t i = 0; i < o.size[0]; i++) {
        if (index[i] < 0 || index[i] >= o.n) return FADER_E_BOUNDS;
        memcpy((char *)o.out + i * bytes, (const char *)o.x + index[i] * bytes, (size_t)bytes);
    }
    return 0;
}

static int attend(const fader_op_t &o, const fader_step_t &s, void *scratch, int64_t bytes, int64_t *need, int nt) {
    fader_attn_t a = *(const fader_attn_t *)o.what;
    a.max_blocks = s.max_blocks;
    if (o.kind == FADER_OP_WRITE_KV) return fader_write_kv(&a, s.tokens, o.x, o.x_stride, o.y, o.y_stride, s.slots, nt);
    return fader_attention(&a, s.tokens, s.rows, o.x, s.q_start, s.context, s.block_tables, o.out, scratch, bytes, need, nt);
}

static int go_on(const fader_op_t &o, const fader_step_t &s, int nt) {
    const fader_rows_t rows = {s.q_start, s.state_from, s.state_to};
    if (o.kind == FADER_OP_CONV) return fader_conv((const fader_conv_t *)o.what, o.size[0], s.rows, &rows, o.x, o.x_stride, o.out, nt);
    if (o.kind == FADER_OP_SELECTIVE)
        return fader_selective((const fader_selective_t *)o.what, o.size[0], s.rows, &rows, o.x, o.dtype, o.x_stride, o.y, o.z,
                               o.y_stride, o.out, nt);
    return fader_scan((const fader_scan_t *)o.what, o.size[0], s.rows, &rows, o.x, o.dtype, o.x_stride, (const float *)o.y,
                      o.out, o.out_dtype, nt);
}

static int run_one(const fader_op_t &o, const fader_step_t &s, void *scratch, int64_t bytes, int64_t *need, int nt) {
    switch (o.kind) {
    case FADER_OP_SITE:
        return fader_site((const fader_site_t *)o.what, o.map ? 0 : s.plan, o.size[0], o.x, o.dtype, o.x_stride, o.out,
                          o.out_dtype, o.out_stride, scratch, bytes, need, nt);
    case FADER_OP_NORM:
        return fader_rms_norm(o.size[0], o.k, o.x, o.x_stride, o.what, o.dtype, o.map, o.scalar, o.out, nt);
    case FADER_OP_WRITE_KV:
    case FADER_OP_ATTEND: return attend(o, s, scratch, bytes, need, nt);
    case FADER_OP_GATHER: return gather(o);
    case FADER_OP_MAP: return map(o, nt);
    case FADER_OP_LOOKUP:
        return fader_lookup((const fader_site_t *)o.what, s.plan, o.size[0], (const int64_t *)o.x, o.out, o.out_dtype,
                            o.out_stride, scratch, bytes, need, nt);
    case FADER_OP_EXPERTS:
        return fader_experts((const fader_experts_t *)o.what, o.size[0], (const int32_t *)o.y, o.x, o.dtype, o.x_stride,
                             o.out, o.out_dtype, o.out_stride, scratch, bytes, need, nt);
    case FADER_OP_GATED_NORM:
        return fader_gated_norm(o.size[0], o.k, o.n, o.x, o.dtype, o.x_stride, o.y, o.out_dtype, o.y_stride,
                                (const float *)o.what, o.map, o.scalar, o.out, nt);
    case FADER_OP_CONV:
    case FADER_OP_SCAN:
    case FADER_OP_SELECTIVE: return go_on(o, s, nt);
    }
    return FADER_E_ARG;
}

extern "C" int fader_run(const fader_op_t *ops, int64_t count, int64_t *next, const fader_step_t *step, void *scratch,
                         int64_t bytes, int64_t *need, int nt) {
    if (!ops || !next || !step || !need || *next < 0 || nt < 1) return FADER_E_ARG;
    for (; *next < count; ++*next) {
        const int status = run_one(ops[*next], *step, scratch, bytes, need, nt);
        if (status) return status;
    }
    return 0;
}
