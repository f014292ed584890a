// NF4 rounding that keeps what a weight does along given directions: each code makes up for the error of
// those before it in its row, seen through r directions. 16 rows at a time, one a lane.
#pragma once
#include <stdlib.h>

#include "common.h"
#include "quant.h"

namespace {

enum { LANES = 16 };

// one row of directions and the gain of its column: the code's target is x - gain * (c . q)
FADER_INLINE void keep_column(const float *x, const float *scale, const float *inverse, const float *q, int64_t r,
                              float gain, const float *mid, float *c, uint8_t *code) {
    float t[LANES], value[LANES];
    int at[LANES];
    for (int l = 0; l < LANES; l++) t[l] = 0;
    for (int64_t i = 0; i < r; i++)
        for (int l = 0; l < LANES; l++) t[l] += c[i * LANES + l] * q[i];
    for (int l = 0; l < LANES; l++) {
        t[l] = (x[l] - gain * t[l]) * inverse[l];
        at[l] = 0;
    }
    for (int m = 0; m < 15; m++)
        for (int l = 0; l < LANES; l++) at[l] += mid[m] < t[l];
    for (int l = 0; l < LANES; l++) {
        code[l] = (uint8_t)at[l];
        value[l] = NF4[at[l]] * scale[l] - x[l];
    }
    for (int64_t i = 0; i < r; i++)
        for (int l = 0; l < LANES; l++) c[i * LANES + l] += value[l] * q[i];
}

// rows first .. first + LANES of w; those past n repeat the last one and are not stored
FADER_INLINE void keep_rows(int64_t first, int64_t n, int64_t k, const float *w, const float *q, int64_t r,
                            const float *gain, const float *mid, float *c, uint8_t *packed, float *absmax) {
    memset(c, 0, (size_t)(r * LANES) * 4);
    for (int64_t b = 0; b < k / BLOCK; b++) {
        float x[BLOCK][LANES], scale[LANES], inverse[LANES];
        uint8_t code[BLOCK][LANES];
        for (int l = 0; l < LANES; l++) {
            const float *row = w + min64(first + l, n - 1) * k + b * BLOCK;
            float top = 0;
            for (int j = 0; j < BLOCK; j++) {
                x[j][l] = row[j];
                const float a = row[j] < 0 ? -row[j] : row[j];
                top = a > top || a != a ? a : top;
            }
            scale[l] = top;
            inverse[l] = 1.0f / (top < 1e-38f ? 1e-38f : top);
        }
        for (int j = 0; j < BLOCK; j++)
            keep_column(x[j], scale, inverse, q + (b * BLOCK + j) * r, r, gain[b * BLOCK + j], mid, c, code[j]);
        for (int l = 0; l < LANES && first + l < n; l++) {
            uint8_t *out = packed + ((first + l) * k + b * BLOCK) / 2;
            for (int j = 0; j < BLOCK; j += 2) out[j / 2] = (uint8_t)(code[j][l] << 4 | code[j + 1][l]);
            absmax[(first + l) * (k / BLOCK) + b] = scale[l];
        }
    }
}

int keep(int64_t n, int64_t k, const float *w, const float *q, int64_t r, float weight, uint8_t *packed,
         float *absmax, int nt) {
    float mid[16];
    midpoints(mid);
    float *gain = (float *)malloc((size_t)k * 4), *sums = (float *)malloc((size_t)(r * LANES * nt) * 4);
    if (!gain || !sums) {
        free(gain), free(sums);
        return FADER_E_ARG;
    }
    for (int64_t j = 0; j < k; j++) {
        float square = 0;
        for (int64_t i = 0; i < r; i++) square += q[j * r + i] * q[j * r + i];
        gain[j] = weight / (1 + weight * square);
    }
#pragma omp parallel for schedule(static) num_threads(nt)
    for (int64_t g = 0; g < ceil_div(n, LANES); g++)
        keep_rows(g * LANES, n, k, w, q, r, gain, mid, sums + omp_get_thread_num() * r * LANES, packed, absmax);
    free(gain), free(sums);
    return 0;
}

} // namespace
