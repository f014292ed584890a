// The C ABI: argument checks, choice of the instruction set, and the work that needs none (repack,
// 8-bit statistics, cache writes).
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "common.h"

#if defined(__x86_64__) && !defined(FADER_NO_X86)
#define FADER_X86 1
#else
#define FADER_X86 0
#endif

static const Kernels *kernels_of(int level) {
#if FADER_X86
    if (level == FADER_AVX512_BF16) return &fader_avx512bf16;
    if (level == FADER_AVX512) return &fader_avx512;
    if (level == FADER_AVX2) return &fader_avx2;
#endif
    return level == FADER_SCALAR ? &fader_scalar : 0;
}

static int detect(void) {
#if FADER_X86
    __builtin_cpu_init();
    const bool f = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (f && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return FADER_AVX512_BF16;
    if (f) return FADER_AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return FADER_AVX2;
#endif
    return FADER_SCALAR;
}

static int level_in_use = -1; // nobody chose yet
static int level_now(void) {
    int level = __atomic_load_n(&level_in_use, __ATOMIC_RELAXED);
    if (level >= 0) return level;
    const int best = detect(); // another thread may choose meanwhile: then `level` becomes its choice
    const bool ours = __atomic_compare_exchange_n(&level_in_use, &level, best, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return ours ? best : level;
}
static const Kernels &now(void) { return *kernels_of(level_now()); }

extern "C" {

int fader_abi(void) { return FADER_ABI; }
int fader_best_isa(void) { return detect(); }
int fader_isa(void) { return level_now(); }
int fader_set_isa(int level) {
    const int best = detect(), want = level < 0 ? best : level;
    if (want > best || !kernels_of(want)) return FADER_E_ISA;
    __atomic_store_n(&level_in_use, want, __ATOMIC_RELAXED);
    return 0;
}

int fader_repack(int64_t n, int64_t k, const uint8_t *packed, const float *absmax, uint8_t *panels,
                 float *scales, int nt) {
    if (n <= 0 || k <= 0 || k % BLOCK || nt < 1 || !packed || !absmax || !panels || !scales) return FADER_E_ARG;
    const int64_t half = k / 2, blocks = k / BLOCK;
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t p = 0; p < ceil_div(n, PANEL); p++) {
        const uint8_t *row[PANEL];
        uint8_t zero[1] = {0x77}; // code 7 is 0.0
        const int cols = (int)min64(PANEL, n - p * PANEL);
        for (int c = 0; c < cols; c++) row[c] = packed + (p * PANEL + c) * half;
        for (int64_t i = 0; i < half; i++) {
            uint8_t *to = panels + (p * half + i) * PANEL;
            for (int j = 0; j < 16; j++) {
                const uint8_t a = j < cols ? row[j][i] : *zero, b = j + 16 < cols ? row[j + 16][i] : *zero;
                to[2 * j] = (uint8_t)(a >> 4 | (b & 0xf0));
                to[2 * j + 1] = (uint8_t)((a & 15) | b << 4);
            }
        }
        for (int64_t b = 0; b < blocks; b++)
            for (int c = 0; c < PANEL; c++)
                scales[(p * blocks + b) * PANEL + c] = c < cols ? absmax[(p * PANEL + c) * blocks + b] : 0.0f;
    }
    return 0;
}

int fader_panels_dense(int64_t n, int64_t k, const uint8_t *panels, const float *scales, void *out, int dtype,
                       int nt) {
    if (n <= 0 || k <= 0 || k % BLOCK || nt < 1 || !panels || !scales || !out || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    const int64_t half = k / 2, blocks = k / BLOCK;
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t p = 0; p < ceil_div(n, PANEL); p++)
        for (int64_t b = 0; b < blocks; b++)
            for (int c = 0; c < min64(PANEL, n - p * PANEL); c++) {
                const float s = scales[(p * blocks + b) * PANEL + c];
                const uint8_t *w = panels + (p * half + b * (BLOCK / 2)) * PANEL + 2 * (c & 15);
                const int64_t at = (p * PANEL + c) * k + b * BLOCK;
                for (int i = 0; i < BLOCK; i++) {
                    const float v = NF4[(w[i / 2 * PANEL + (i & 1)] >> (c & 16 ? 4 : 0)) & 15] * s;
                    if (dtype == FADER_F32) ((float *)out)[at + i] = v;
                    else ((u16 *)out)[at + i] = to_bf16(v);
                }
            }
    return 0;
}

int fader_pack(int64_t n, int64_t k, const void *w, int dtype, void *panels, int nt) {
    if (n <= 0 || k <= 0 || k % BLOCK || nt < 1 || !w || !panels || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    const int64_t per = dtype == FADER_BF16 ? 2 : 1, words = k / per;
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t p = 0; p < ceil_div(n, PANEL); p++) {
        const u32 *from = (const u32 *)w + p * PANEL * words;
        u32 *to = (u32 *)panels + p * PANEL * words;
        const int64_t cols = min64(PANEL, n - p * PANEL);
        for (int64_t i = 0; i < words; i++)
            for (int64_t c = 0; c < PANEL; c++) to[i * PANEL + c] = c < cols ? from[c * words + i] : 0;
    }
    return 0;
}
int fader_panel_rows(int64_t n, int64_t k, const void *panels, int dtype, const int64_t *index, int64_t count, void *out) {
    if (n <= 0 || k <= 0 || k % BLOCK || count < 0 || !panels || !index || !out || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    const int64_t words = k / (dtype == FADER_BF16 ? 2 : 1);
    for (int64_t r = 0; r < count; r++) {
        if (index[r] < 0 || index[r] >= n) return FADER_E_BOUNDS;
        const u32 *from = (const u32 *)panels + index[r] / PANEL * PANEL * words + index[r] % PANEL;
        u32 *to = (u32 *)out + r * words;
        for (int64_t i = 0; i < words; i++) to[i] = from[i * PANEL];
    }
    return 0;
}

int fader_screen_pack(int64_t n, int64_t k, const void *panels, int dtype, int8_t *codes, float *scales, int nt) {
    if (n <= 0 || k <= 0 || k % BLOCK || nt < 1 || !panels || !codes || !scales || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    return now().screen_pack(n, k, panels, dtype, codes, scales, nt) ? 0 : FADER_E_BOUNDS;
}

int fader_quantise(int64_t count, const void *w, int dtype, uint8_t *packed, float *absmax, int nt) {
    if (count <= 0 || nt < 1 || !w || !packed || !absmax || dtype < 0 || dtype > FADER_F16) return FADER_E_ARG;
    return now().quantise(count, w, dtype, packed, absmax, nt);
}
int fader_quantise_keeping(int64_t n, int64_t k, const float *w, const float *q, int64_t r, float weight,
                           uint8_t *packed, float *absmax, int nt) {
    if (n < 1 || k < 1 || k % BLOCK || r < 1 || !(weight >= 0) || nt < 1 || !w || !q || !packed || !absmax)
        return FADER_E_ARG;
    return now().keep(n, k, w, q, r, weight, packed, absmax, nt);
}
int fader_dequantise(int64_t count, const uint8_t *packed, const float *absmax, void *out, int dtype, int nt) {
    if (count <= 0 || nt < 1 || !packed || !absmax || !out || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    return now().dequantise(count, packed, absmax, out, dtype, nt);
}

// The code of a value is looked up at its nearest 1/65535 step of [-1, 1], as bitsandbytes does.
int fader_quantise8(int64_t count, const float *x, float offset, const float *map, uint8_t *codes, float *absmax,
                    int nt) {
    if (count <= 0 || nt < 1 || !x || !map || !codes || !absmax) return FADER_E_ARG;
    uint8_t *table = (uint8_t *)malloc(65536);
    if (!table) return FADER_E_ARG;
    for (int i = 0, q = 0; i < 65536; i++) {
        const float v = ((float)i + (float)i) / 65535.0f - 1.0f;
        while (q < 255 && v > (map[q] + map[q + 1]) * 0.5f) q++;
        table[i] = (uint8_t)q;
    }
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t b = 0; b < ceil_div(count, 256); b++) {
        const int64_t from = b * 256, to = min64(count, from + 256);
        float am = 0.0f;
        for (int64_t i = from; i < to; i++) {
            const float a = __builtin_fabsf(x[i] - offset);
            am = a > am ? a : am;
        }
        absmax[b] = am;
        const float inv = 1.0f / am;
        for (int64_t i = from; i < to; i++) {
            float v = (x[i] - offset) * inv;
            v = v < -1.0f ? -1.0f : v > 1.0f ? 1.0f : v;
            const int at = v == v ? (int)__builtin_fmaf((v + 1.0f) * 0.5f, 65535.0f, 0.5f) : 0; // all of them 0: 0 / 0
            codes[i] = am == 0.0f ? 0 : table[at & 0xffff];
        }
    }
    free(table);
    return 0;
}
int fader_dequantise8(int64_t count, const uint8_t *codes, const float *absmax, const float *map, float offset,
                      float *out, int nt) {
    if (count <= 0 || nt < 1 || !codes || !absmax || !map || !out) return FADER_E_ARG;
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t i = 0; i < count; i++) out[i] = map[codes[i]] * absmax[i >> 8] + offset;
    return 0;
}

int fader_site(const fader_site_t *s, const int32_t *plan, int64_t T, const void *x, int x_dtype, int64_t xs,
               void *out, int out_dtype, int64_t os, void *scratch, int64_t bytes, int64_t *need, int nt) {
    if (!s || !need || T < 0 || nt < 1 || s->n <= 0 || s->k <= 0 || x_dtype < 0 || x_dtype > FADER_BF16) return FADER_E_ARG;
    if (out_dtype < 0 || out_dtype > FADER_BF16 || (s->panels && s->k % BLOCK)) return FADER_E_ARG;
    if (!s->panels && out_dtype != FADER_F32) return FADER_E_ARG;
    if (!s->members) plan = 0;
    if (!T) return 0;
    if (!x || !out || !scratch || ((uintptr_t)scratch & 63) || xs < s->k || os < s->n) return FADER_E_ARG;
    if (plan && (((const Plan *)plan)->T != T || ((const Plan *)plan)->slots > s->slots)) return FADER_E_BOUNDS;
    return now().site(s, plan, T, x, x_dtype, xs, out, out_dtype, os, scratch, bytes, need, nt);
}

int fader_lookup(const fader_site_t *s, const int32_t *plan, int64_t T, const int64_t *ids, void *y, int y_dtype, int64_t ys,
                 void *scratch, int64_t bytes, int64_t *need, int nt) {
    if (!s || !need || T < 0 || nt < 1 || s->n <= 0 || s->k <= 0 || y_dtype < 0 || y_dtype > FADER_BF16) return FADER_E_ARG;
    if (!T || !plan) return 0;
    if (!ids || !y || !scratch || ((uintptr_t)scratch & 63) || ys < s->n || s->members != 1) return FADER_E_ARG;
    if (((const Plan *)plan)->T != T || ((const Plan *)plan)->slots > s->slots) return FADER_E_BOUNDS;
    return now().lookup(s, plan, T, ids, y, y_dtype, ys, scratch, bytes, need, nt);
}

int fader_experts(const fader_experts_t *s, int64_t T, const int32_t *ends, const void *x, int dtype, int64_t xs, void *out,
                  int out_dtype, int64_t os, void *scratch, int64_t bytes, int64_t *need, int nt) {
    if (!s || !need || T < 0 || nt < 1 || !s->panels || s->n <= 0 || s->n % PANEL || s->k <= 0 || s->k % BLOCK) return FADER_E_ARG;
    if (s->experts < 1 || dtype < 0 || dtype > FADER_BF16 || out_dtype < 0 || out_dtype > FADER_BF16) return FADER_E_ARG;
    if (s->weights != FADER_PLAIN && !s->scales) return FADER_E_ARG;
    if (!T) return 0;
    if (!ends || !x || !out || !scratch || ((uintptr_t)scratch & 63) || xs < s->k || os < s->n) return FADER_E_ARG;
    int32_t from = 0;
    for (int64_t e = 0; e < s->experts; from = ends[e++])
        if (ends[e] < from) return FADER_E_BOUNDS;
    if (from != T) return FADER_E_BOUNDS;
    return now().experts(s, T, ends, x, dtype, xs, out, out_dtype, os, scratch, bytes, need, nt);
}

int fader_rms_norm(int64_t M, int64_t K, const void *x, int64_t xs, const void *w, int dtype, int about_one,
                   float eps, void *y, int nt) {
    if (M < 0 || K <= 0 || nt < 1 || dtype < 0 || dtype > FADER_BF16) return FADER_E_ARG;
    if (!M) return 0;
    if (!x || !w || !y || xs < K) return FADER_E_ARG;
    return now().norm(M, K, x, xs, w, dtype, about_one, eps, y, nt);
}

static int rows_status(int64_t T, int64_t R, const fader_rows_t *rows, int64_t slots) {
    if (!rows || !rows->start || !rows->from || !rows->to) return FADER_E_ARG;
    if (rows->start[0] != 0 || rows->start[R] != T) return FADER_E_BOUNDS;
    for (int64_t r = 0; r < R; r++) {
        const int32_t from = rows->from[r], to = rows->to[r];
        if (rows->start[r + 1] < rows->start[r] || from < -1 || from >= slots || to < 0 || to >= slots || from == to)
            return FADER_E_BOUNDS;
    }
    return 0;
}

int fader_conv(const fader_conv_t *s, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int64_t xs, void *out,
               int nt) {
    if (!s || T < 0 || R < 0 || nt < 1 || s->channels <= 0 || s->channels % 16 || s->taps < 2 || s->slots < 1) return FADER_E_ARG;
    if (s->dtype < 0 || s->dtype > FADER_BF16 || !s->states || !s->weight) return FADER_E_ARG;
    if (!R) return T ? FADER_E_BOUNDS : 0;
    if (T && (!x || !out || xs < s->channels)) return FADER_E_ARG;
    const int status = rows_status(T, R, rows, s->slots);
    return status ? status : now().conv(s, R, rows, x, xs, out, nt);
}

int fader_scan(const fader_scan_t *s, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int dtype, int64_t xs,
               const float *gates, void *out, int out_dtype, int nt) {
    if (!s || T < 0 || R < 0 || nt < 1 || dtype < 0 || dtype > FADER_BF16 || !s->states || s->slots < 1) return FADER_E_ARG;
    if (s->groups < 1 || s->heads < 1 || s->heads % s->groups || s->keys < 16 || s->keys > 256 || s->keys % 16) return FADER_E_ARG;
    if (s->values < 16 || s->values % 16 || (out_dtype != dtype && out_dtype != FADER_F32)) return FADER_E_ARG;
    if (s->q < 0 || s->k < 0 || s->v < 0 || s->v + s->heads * s->values > xs) return FADER_E_ARG;
    if (s->q + s->groups * s->keys > xs || s->k + s->groups * s->keys > xs) return FADER_E_ARG;
    if (!R) return T ? FADER_E_BOUNDS : 0;
    if (T && (!x || !gates || !out)) return FADER_E_ARG;
    const int status = rows_status(T, R, rows, s->slots);
    return status ? status : now().scan(s, R, rows, x, dtype, xs, gates, out, out_dtype, nt);
}

int fader_selective(const fader_selective_t *s, int64_t T, int64_t R, const fader_rows_t *rows, const void *x, int dtype, int64_t xs,
                    const void *steps, const void *gate, int64_t gs, void *out, int nt) {
    if (!s || T < 0 || R < 0 || nt < 1 || dtype < 0 || dtype > FADER_BF16 || !s->states || !s->decay || s->slots < 1) return FADER_E_ARG;
    if (s->channels < 16 || s->channels % 16 || s->keys < 1 || s->keys > 256) return FADER_E_ARG;
    if (!R) return T ? FADER_E_BOUNDS : 0;
    if (T && (!x || !steps || !out || xs < s->channels || (gate && gs < s->channels))) return FADER_E_ARG;
    const int status = rows_status(T, R, rows, s->slots);
    return status ? status : now().selective(s, R, rows, x, dtype, xs, steps, gate, gs, out, nt);
}

int fader_gated_norm(int64_t M, int64_t K, int64_t group, const void *x, int dtype, int64_t xs, const void *gate, int gd,
                     int64_t gs, const float *w, int flags, float eps, void *y, int nt) {
    if (M < 0 || K <= 0 || nt < 1 || dtype < 0 || dtype > FADER_BF16 || gd < 0 || gd > FADER_BF16) return FADER_E_ARG;
    if (group <= 0 || group % 16 || K % group || flags < 0 || flags > 3) return FADER_E_ARG;
    if (!M) return 0;
    if (!x || !gate || !w || !y || xs < K || gs < K) return FADER_E_ARG;
    return now().gated_norm(M, K, group, x, dtype, xs, gate, gd, gs, w, flags, eps, y, nt);
}

int fader_map(const fader_op_t *o) {
    if (!o || !o->x || !o->out || o->dtype < 0 || o->dtype > FADER_BF16 || o->out_dtype < 0 || o->out_dtype > FADER_BF16) return FADER_E_ARG;
    if (o->x_step[3] != 1 || o->out_step[3] != 1 || o->y_step[3] < 0 || o->y_step[3] > 1) return FADER_E_ARG;
    return now().map(o);
}

int fader_attention(const fader_attn_t *a, int64_t T, int64_t R, const void *q, const int32_t *q_start,
                    const int32_t *context, const int32_t *tables, void *out, void *scratch, int64_t bytes,
                    int64_t *need, int nt) {
    if (!a || !need || T < 0 || R < 0 || nt < 1 || a->dtype < 0 || a->dtype > FADER_BF16) return FADER_E_ARG;
    if (a->dim < 16 || a->dim > 512 || a->dim % 16 || a->value_dim < 16 || a->value_dim > 512 || a->value_dim % 16) return FADER_E_ARG;
    if (a->kv_heads <= 0 || a->heads <= 0 || a->heads % a->kv_heads) return FADER_E_ARG;
    if (a->block_size <= 0 || a->blocks <= 0 || a->max_blocks <= 0 || a->window < 0) return FADER_E_ARG;
    if (!T || !R) return 0;
    if (!q || !q_start || !context || !tables || !out || !scratch || ((uintptr_t)scratch & 63)) return FADER_E_ARG;
    if (q_start[0] != 0 || q_start[R] != T) return FADER_E_BOUNDS;
    for (int64_t r = 0; r < R; r++) {
        const int64_t n = q_start[r + 1] - q_start[r], used = ceil_div(context[r], a->block_size);
        if (n < 0 || context[r] < n || used > a->max_blocks) return FADER_E_BOUNDS;
        const int64_t oldest = a->window > 0 ? max64(0, context[r] - n + 1 - a->window) : 0;
        for (int64_t b = oldest / 32 * 32 / a->block_size; n && b < used; b++) {
            const int32_t block = tables[r * a->max_blocks + b];
            if (block < 0 || block >= a->blocks) return FADER_E_BOUNDS;
        }
    }
    return now().attention(a, T, R, q, q_start, context, tables, out, scratch, bytes, need, nt);
}

int fader_write_kv(const fader_attn_t *a, int64_t T, const void *k, int64_t ks, const void *v, int64_t vs,
                   const int64_t *slots, int nt) {
    if (!a || T < 0 || nt < 1 || a->dtype < 0 || a->dtype > FADER_BF16) return FADER_E_ARG;
    if (!T) return 0;
    if (!k || !v || !slots || !a->k_cache || !a->v_cache) return FADER_E_ARG;
    const int64_t size = a->dtype == FADER_BF16 ? 2 : 4, row = a->kv_heads * a->dim * size,
                  value_row = a->kv_heads * a->value_dim * size;
    for (int64_t t = 0; t < T; t++)
        if (slots[t] < -1 || slots[t] >= a->blocks * a->block_size) return FADER_E_BOUNDS;
#pragma omp parallel for schedule(static) num_threads(nt) if (T * (row + value_row) > (1 << 19))
    for (int64_t t = 0; t < T; t++) {
        if (slots[t] < 0) continue;
        memcpy((char *)a->k_cache + slots[t] * row, (const char *)k + t * ks * size, (size_t)row);
        memcpy((char *)a->v_cache + slots[t] * value_row, (const char *)v + t * vs * size, (size_t)value_row);
    }
    return 0;
}

static int logits_status(const fader_logits_t *l, int64_t R, const void *scratch, const int64_t *need, int nt) {
    if (!l || !need || R < 0 || nt < 1 || l->n < 1 || l->n >= 1 << 19 || l->stride < l->n || l->rows < 0) return FADER_E_ARG;
    if (l->dtype < 0 || l->dtype > FADER_BF16 || (R && (!l->x || !scratch || (uintptr_t)scratch & 63))) return FADER_E_ARG;
    if (!l->index) return R > l->rows ? FADER_E_BOUNDS : 0;
    for (int64_t r = 0; r < R; r++)
        if (l->index[r] < 0 || l->index[r] >= l->rows) return FADER_E_BOUNDS;
    return 0;
}

int fader_largest(const fader_logits_t *l, int64_t R, float *best, int64_t *tokens, void *scratch, int64_t bytes, int64_t *need, int nt) {
    const int status = logits_status(l, R, scratch, need, nt);
    if (status || !R) return status;
    if (!best || !tokens) return FADER_E_ARG;
    return now().largest(l, R, best, tokens, scratch, bytes, need, nt);
}

int fader_draw(const fader_logits_t *l, const fader_draw_t *d, int64_t R, void *scratch, int64_t bytes, int64_t *need, int nt) {
    const int status = logits_status(l, R, scratch, need, nt);
    if (status || !R) return status;
    if (!d || !d->heat || !d->top_k || !d->top_p || !d->min_p || !d->key || !d->tokens) return FADER_E_ARG;
    for (int64_t r = 0; r < R; r++) {
        const bool cut = d->top_p[r] >= 0 && d->top_p[r] <= 1 && d->min_p[r] >= 0 && d->min_p[r] <= 1;
        if (!(d->heat[r] > 0) || !cut) return FADER_E_ARG;
    }
    return now().draw(l, d, R, scratch, bytes, need, nt);
}

int fader_score(const fader_logits_t *l, const fader_scores_t *s, int64_t R, void *scratch, int64_t bytes, int64_t *need, int nt) {
    const int status = logits_status(l, R, scratch, need, nt);
    if (status || !R) return status;
    if (!s || !s->tokens || !s->out || s->top < 0 || s->top > l->n) return FADER_E_ARG;
    for (int64_t r = 0; r < R; r++)
        if (s->tokens[r] < 0 || s->tokens[r] >= l->n) return FADER_E_BOUNDS;
    return now().score(l, s, R, scratch, bytes, need, nt);
}

void fader_advise_huge(void *p, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t huge = 2 << 20, from = ((uintptr_t)p + huge - 1) & ~(huge - 1), to = ((uintptr_t)p + (uintptr_t)bytes) & ~(huge - 1);
    if (from < to) madvise((void *)from, to - from, MADV_HUGEPAGE);
#else
    (void)p, (void)bytes;
#endif
}

double fader_probe_read(const void *data, int64_t bytes, int nt) { return now().probe_read(data, bytes, nt); }
double fader_probe_dot(int64_t rounds, int nt) { return now().probe_dot(rounds, nt); }
}
