// Selective scans: a state for each channel, decayed by a step of the channel's own that each token decides. A row
// goes on from one slot and leaves its state in another. Knows no models.
#pragma once
#include "states.h"

namespace {

enum { SELECTED = 16, SELECTIVE_CHANNELS = 64 }; // channels of a group of states; of an item of work

// sixteen channels of one token: src and dst may be one
template <class Ty>
static void selective_group(const fader_selective_t *s, int64_t c, const Ty *x, const Ty *dt, const float *bc,
                            const float *src, float *dst, const Ty *gate, Ty *out) {
    const int64_t K = s->keys;
    const float *const decay = s->decay + c * K;
    for (int j = 0; j < SELECTED; j += W) {
        V step = vload_as(dt + c + j);
        if (s->bias) step = round_as(dt, vadd(step, vload(s->bias + c + j)));
        if (s->softplus) step = round_as(dt, vsoftplus(step));
        const V u = vload_as(x + c + j), given = vmul(step, u);
        V sums[2] = {vzero(), vzero()};
        const auto key = [&](int64_t n, V &sum) __attribute__((always_inline)) {
            const int64_t at = n * SELECTED + j;
            const V state = vfma(given, vset(bc[n]), vmul(vexp(vmul(step, vload(decay + at))), vload(src + at)));
            vstore(dst + at, state);
            sum = vfma(vset(bc[K + n]), state, sum);
        };
        int64_t n = 0;
        for (; n + 2 <= K; n += 2) {
            key(n, sums[0]);
            key(n + 1, sums[1]);
        }
        if (n < K) key(n, sums[0]);
        V y = vadd(sums[0], sums[1]);
        if (s->skip) y = vfma(vload(s->skip + c + j), u, y);
        if (gate) y = vmul(y, vsilu(vload_as(gate + c + j)));
        vstore_as(out + c + j, y);
    }
}

// channels c0..c1 over the tokens of a row; src, dst: a slot
template <class Ty>
static void selective_row(const fader_selective_t *s, int64_t n, int64_t c0, int64_t c1, const Ty *x, int64_t xs,
                          const Ty *steps, const Ty *gate, int64_t gs, const float *src, float *dst, Ty *out) {
    float bc[2 * KEYS_MAX];
    const int64_t C = s->channels, K = s->keys;
    for (int64_t i = 0; i < n; i++, x += xs, steps += C + 2 * K, out += C) {
        for (int64_t k = 0; k < 2 * K; k++) bc[k] = load1(steps + C + k);
        for (int64_t c = c0; c < c1; c += SELECTED)
            selective_group<Ty>(s, c, x, steps, bc, src + c * K, dst + c * K, gate ? gate + i * gs : 0, out);
        src = dst;
    }
}

template <class Ty>
static void selective_rows(const fader_selective_t *s, int64_t R, const fader_rows_t *rows, const Ty *x, int64_t xs,
                           const Ty *steps, const Ty *gate, int64_t gs, Ty *out, int nt) {
    const int64_t C = s->channels, K = s->keys, blocks = ceil_div(C, SELECTIVE_CHANNELS);
    share(nt, R * blocks, [&](int64_t item, int) {
        const int64_t r = item / blocks, c0 = item % blocks * SELECTIVE_CHANNELS, c1 = min64(C, c0 + SELECTIVE_CHANNELS);
        const int64_t first = rows->start[r], n = rows->start[r + 1] - first, from = rows->from[r];
        float *const dst = s->states + rows->to[r] * C * K;
        const float *const src = from < 0 ? dst : s->states + from * C * K;
        if (from < 0) memset(dst + c0 * K, 0, (size_t)((c1 - c0) * K) * 4);
        else if (!n) memcpy(dst + c0 * K, src + c0 * K, (size_t)((c1 - c0) * K) * 4);
        selective_row<Ty>(s, n, c0, c1, x + first * xs, xs, steps + first * (C + 2 * K), gate ? gate + first * gs : 0, gs,
                          src, dst, out + first * C);
    });
}

int selective(const fader_selective_t *s, int64_t R, const fader_rows_t *rows, const void *x, int dtype, int64_t xs,
              const void *steps, const void *gate, int64_t gs, void *out, int nt) {
    if (dtype == FADER_BF16)
        selective_rows<u16>(s, R, rows, (const u16 *)x, xs, (const u16 *)steps, (const u16 *)gate, gs, (u16 *)out, nt);
    else selective_rows<float>(s, R, rows, (const float *)x, xs, (const float *)steps, (const float *)gate, gs, (float *)out, nt);
    return 0;
}

} // namespace
