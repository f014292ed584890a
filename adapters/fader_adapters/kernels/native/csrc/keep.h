// NF4 rounding that keeps what a weight does along given directions: each code makes up for the error of
// those before it in its row, seen through r directions. 32 rows at a time, one a lane.
#pragma once
#include <stdlib.h>

#include "common.h"
#include "quant.h"

namespace {

enum { ROWS = 32, VECS = ROWS / W, PARTS = W / 4 }; // PARTS sums of their own hide the adder's latency

// what a column needs: its gain, then its directions, as many as whole PARTS take, the last ones zero
struct Columns {
    float *at;
    int64_t width;
};
FADER_INLINE int64_t padded(int64_t r) { return ceil_div(r, PARTS) * PARTS; }

static Columns columns(int64_t k, int64_t r, const float *q, float weight) {
    const int64_t width = 1 + padded(r);
    float *at = (float *)calloc((size_t)((k + 1) * width), 4); // the one past the last reads as zero
    for (int64_t j = 0; at && j < k; j++) {
        float square = 0;
        for (int64_t i = 0; i < r; i++) square += q[j * r + i] * q[j * r + i];
        at[j * width] = weight / (1 + weight * square);
        memcpy(at + j * width + 1, q + j * r, (size_t)r * 4);
    }
    return {at, width};
}

// the code of a scaled value and what it stands for
FADER_INLINE V nearest(V t, const float *mid, uint8_t *code) {
#if FADER_ISA >= 2
    const I at = codes_of(t, vload(mid));
    _mm_storeu_si128((__m128i *)code, _mm512_cvtepi32_epi8(at));
    return _mm512_permutexvar_ps(at, vload(NF4));
#else
    V above = vzero();
    for (int m = 0; m < 15; m++) above = vadd(above, vwhere_less(vset(mid[m]), t, vzero(), vset(1.0f)));
    float lanes[W];
    vstore(lanes, above);
    for (int l = 0; l < W; l++) {
        code[l] = (uint8_t)(15 - (int)lanes[l]);
        lanes[l] = NF4[code[l]];
    }
    return vload(lanes);
#endif
}

// the errors along direction i with one more
FADER_INLINE V passed(float *c, int64_t i, int v, V error, float q) {
    const V now = vfma(error, vset(q), vload(c + i * ROWS + v * W));
    vstore(c + i * ROWS + v * W, now);
    return now;
}

// 64 columns of 32 rows: x [BLOCK][ROWS] -> codes. c [padded(r)][ROWS] are the errors so far along the
// directions, t their share of the next column: one pass over c adds an error and sums for what follows.
FADER_INLINE void keep_block(const float *x, const V *scale, const V *inverse, const float *column, int64_t width,
                             const float *mid, float *c, V *t, uint8_t *code) {
    for (int j = 0; j < BLOCK; j++, column += width) {
        const float *q = column + 1, *next = q + width;
        V error[VECS], sums[PARTS][VECS];
        for (int v = 0; v < VECS; v++) {
            const V given = vload(x + j * ROWS + v * W);
            const V target = vmul(vadd(given, vmul(vset(-column[0]), t[v])), inverse[v]);
            error[v] = vfma(given, vset(-1.0f), vmul(nearest(target, mid, code + j * ROWS + v * W), scale[v]));
        }
        for (int p = 0; p < PARTS; p++)
            for (int v = 0; v < VECS; v++) sums[p][v] = vmul(passed(c, p, v, error[v], q[p]), vset(next[p]));
        for (int64_t i = PARTS; i + 1 < width; i += PARTS)
            for (int p = 0; p < PARTS; p++)
                for (int v = 0; v < VECS; v++)
                    sums[p][v] = vfma(passed(c, i + p, v, error[v], q[i + p]), vset(next[i + p]), sums[p][v]);
        for (int v = 0; v < VECS; v++) {
            t[v] = sums[0][v];
            for (int p = 1; p < PARTS; p++) t[v] = vadd(t[v], sums[p][v]);
        }
    }
}

// rows first .. first + ROWS of w; those past n repeat the last one and are not stored
static void keep_rows(int64_t first, int64_t n, int64_t k, const float *w, const Columns &columns, const float *mid,
                      float *c, uint8_t *packed, float *absmax) {
    const int64_t blocks = k / BLOCK;
    memset(c, 0, (size_t)((columns.width - 1) * ROWS) * 4);
    V t[VECS];
    for (int v = 0; v < VECS; v++) t[v] = vzero();
    for (int64_t b = 0; b < blocks; b++) {
        float x[BLOCK * ROWS], scale[ROWS];
        uint8_t code[BLOCK * ROWS];
        for (int l = 0; l < ROWS; l++) {
            const float *row = w + min64(first + l, n - 1) * k + b * BLOCK;
            V top = vzero(), odd = vzero(); // odd turns NaN with the first value that is not finite
            for (int j = 0; j < BLOCK; j += W) {
                const V some = vload(row + j);
                top = vmax(top, vmax(some, vmul(some, vset(-1.0f))));
                odd = vfma(some, vzero(), odd);
            }
            scale[l] = vtop(top) + vsum(odd);
            for (int j = 0; j < BLOCK; j++) x[j * ROWS + l] = row[j];
        }
        V scales[VECS], inverse[VECS];
        for (int v = 0; v < VECS; v++) {
            scales[v] = vload(scale + v * W);
            inverse[v] = vdiv(vset(1.0f), vmax(scales[v], vset(1e-38f)));
        }
        keep_block(x, scales, inverse, columns.at + b * BLOCK * columns.width, columns.width, mid, c, t, code);
        uint8_t pair[BLOCK / 2 * ROWS];
        for (int j = 0; j < BLOCK / 2; j++)
            for (int l = 0; l < ROWS; l++)
                pair[j * ROWS + l] = (uint8_t)(code[2 * j * ROWS + l] << 4 | code[(2 * j + 1) * ROWS + l]);
        for (int l = 0; l < ROWS && first + l < n; l++) {
            uint8_t *out = packed + ((first + l) * k + b * BLOCK) / 2;
            for (int j = 0; j < BLOCK / 2; j++) out[j] = pair[j * ROWS + l];
            absmax[(first + l) * blocks + b] = scale[l];
        }
    }
}

int keep(int64_t n, int64_t k, const float *w, const float *q, int64_t r, float weight, uint8_t *packed,
         float *absmax, int nt) {
    float mid[16];
    midpoints(mid);
    const Columns all = columns(k, r, q, weight);
    float *sums = (float *)malloc((size_t)(padded(r) * ROWS * nt) * 4);
    if (!all.at || !sums) {
        free(all.at), free(sums);
        return FADER_E_ARG;
    }
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t g = 0; g < ceil_div(n, ROWS); g++)
        keep_rows(g * ROWS, n, k, w, all, mid, sums + omp_get_thread_num() * padded(r) * ROWS, packed, absmax);
    free(all.at), free(sums);
    return 0;
}

} // namespace
