// What every instruction set shares: element conversions, the NF4 code book, the plan's layout, the
// table of kernels one level offers. No intrinsics here.
#pragma once
#include <stdint.h>
#include <string.h>

#include "fader.h"

typedef uint16_t u16;
typedef uint32_t u32;
#define FADER_INLINE static inline __attribute__((always_inline))
#define FADER_METHOD inline __attribute__((always_inline))

enum { PANEL = 32, BLOCK = 64 };

static const float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

FADER_INLINE float bits_float(u32 b) {
    float f;
    memcpy(&f, &b, 4);
    return f;
}
FADER_INLINE u32 float_bits(float f) {
    u32 b;
    memcpy(&b, &f, 4);
    return b;
}
FADER_INLINE float from_bf16(u16 h) { return bits_float((u32)h << 16); }
FADER_INLINE u16 to_bf16(float f) {
    u32 b = float_bits(f);
    if (f != f) return (u16)((b >> 16) | 0x40);
    return (u16)((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}
FADER_INLINE float from_f16(u16 h) {
    u32 sign = (u32)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023;
    if (e == 31) return bits_float(sign | 0x7f800000 | (m << 13));
    if (e) return bits_float(sign | ((e + 112) << 23) | (m << 13));
    float f = (float)m * 0x1p-24f;
    return sign ? -f : f;
}
FADER_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
FADER_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
FADER_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FADER_INLINE int64_t align64(int64_t bytes) { return (bytes + 63) & ~(int64_t)63; }

// A plan is one block of int32 words: this header, then the arrays at the offsets it names.
// Rows with the same slot list form a group; `use` lists, slot by slot, where a slot is named.
struct Plan {
    int32_t T, slots, groups, tokens, terms, uses;
    int32_t tok_ptr;   // [groups+1] into tok, gam
    int32_t tok;       // [tokens] token number
    int32_t gam;       // [tokens] first gamma of the token's row
    int32_t term_ptr;  // [groups+1] into slot
    int32_t slot;      // [terms] slot numbers of a group, in term order
    int32_t use_group; // [uses] sorted by slot
    int32_t use_term;  // [uses] index into slot
    int32_t gamma;     // floats, row after row
};

// Everything that differs between instruction sets.
struct Kernels {
    int (*site)(const fader_site_t *, const int32_t *, int64_t, const void *, int, int64_t, void *,
                int, int64_t, void *, int64_t, int64_t *, int);
    int (*attention)(const fader_attn_t *, int64_t, int64_t, const void *, const int32_t *,
                     const int32_t *, const int32_t *, void *, void *, int64_t, int64_t *, int);
    int (*quantise)(int64_t, const void *, int, uint8_t *, float *, int);
    int (*dequantise)(int64_t, const uint8_t *, const float *, void *, int, int);
    double (*probe_read)(const void *, int64_t, int);
    double (*probe_dot)(int64_t, int);
    int (*norm)(int64_t, int64_t, const void *, int64_t, const void *, int, int, float, void *, int);
    int (*map)(const fader_op_t *);
    int (*lookup)(const fader_site_t *, const int32_t *, int64_t, const int64_t *, void *, int, int64_t, void *,
                  int64_t, int64_t *, int);
    int (*keep)(int64_t, int64_t, const float *, const float *, int64_t, float, uint8_t *, float *, int);
    int (*experts)(const fader_experts_t *, int64_t, const int32_t *, const void *, int, int64_t, void *, int, int64_t,
                   void *, int64_t, int64_t *, int);
    int (*conv)(const fader_conv_t *, int64_t, const fader_rows_t *, const void *, int64_t, void *, int);
    int (*scan)(const fader_scan_t *, int64_t, const fader_rows_t *, const void *, int, int64_t, const float *, void *, int,
                int);
    int (*selective)(const fader_selective_t *, int64_t, const fader_rows_t *, const void *, int, int64_t, const void *,
                     const void *, int64_t, void *, int);
    int (*gated_norm)(int64_t, int64_t, int64_t, const void *, int, int64_t, const void *, int, int64_t, const float *, int,
                      float, void *, int);
    int (*largest)(const fader_logits_t *, int64_t, float *, int64_t *, void *, int64_t, int64_t *, int);
    int (*draw)(const fader_logits_t *, const fader_draw_t *, int64_t, void *, int64_t, int64_t *, int);
    bool (*screen_pack)(int64_t, int64_t, const void *, int, int8_t *, float *, int);
    int (*score)(const fader_logits_t *, const fader_scores_t *, int64_t, void *, int64_t, int64_t *, int);
};
extern const Kernels fader_scalar, fader_avx2, fader_avx512, fader_avx512bf16;
