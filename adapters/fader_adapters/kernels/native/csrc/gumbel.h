// Gumbel-max draws: to every token of a row a number that its key and the token decide, SplitMix64's hash. The token at which
// logit / heat and that number add up to most is a sample of the softmax. Knows keys and places; no logits.
#pragma once
#include <math.h>

#include "simd.h"

namespace {

const float GUMBEL_OFF = 1e-4f; // more than the bounds below are rounded by

// output number `at`, from 0, of a SplitMix64 generator that starts at `key`
FADER_INLINE uint64_t splitmix(uint64_t key, int64_t at) {
    uint64_t z = key + (uint64_t)(at + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

FADER_INLINE double gumbel(uint64_t key, int64_t at) {
    const double u = ((double)(splitmix(key, at) >> 12) + 0.5) * 0x1p-52;
    return -log(-log(u));
}

// not less than gumbel(key, at + i), and hardly more where that is large
FADER_INLINE void gumbel_tops(uint64_t key, int64_t at, int64_t n, float *out) {
    for (int64_t i = 0; i < n; i++) {
        const u32 rest = ~(u32)(splitmix(key, at + i) >> 32); // 1 - u is more than rest / 2^32, and than 2^-54
        const float far = (float)rest + 0x1p-22f;
        const float log2 = (float)((int32_t)float_bits(far) - (127 << 23)) * 0x1p-23f; // on a chord: never above the logarithm
        out[i] = (32.0f - log2) * 0.69314718f + GUMBEL_OFF;
    }
}

} // namespace
