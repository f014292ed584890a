// Turns one step's blends into groups of rows that share a slot list. Integers only; runs once a step.
#include <stdlib.h>

#include "common.h"

struct Rows {
    const int32_t *ptr; // [R+1] kept terms of a row
    const int32_t *slot;
};

// rows without terms last; else by slot list, then by row number
static int compare(const Rows &r, int32_t a, int32_t b) {
    const int32_t na = r.ptr[a + 1] - r.ptr[a], nb = r.ptr[b + 1] - r.ptr[b];
    for (int32_t i = 0; i < na && i < nb; i++) {
        const int32_t d = r.slot[r.ptr[a] + i] - r.slot[r.ptr[b] + i];
        if (d) return d;
    }
    return na != nb ? (na ? (nb ? na - nb : -1) : 1) : 0;
}
static bool before(const Rows &r, int32_t a, int32_t b) {
    const int c = compare(r, a, b);
    return c ? c < 0 : a < b;
}
static void sort_rows(const Rows &r, int32_t *order, int64_t n) { // shell sort: no allocation, n is small
    for (int64_t gap = n / 2; gap > 0; gap = gap == 2 ? 1 : gap * 5 / 11)
        for (int64_t i = gap; i < n; i++) {
            const int32_t v = order[i];
            int64_t j = i;
            for (; j >= gap && before(r, v, order[j - gap]); j -= gap) order[j] = order[j - gap];
            order[j] = v;
        }
}

// use: terms 0 .. n in the order of their slots, those of one slot as they were; spare [n]
static void sort_uses(const int32_t *slot, int32_t slots, int32_t n, int32_t *use, int32_t *spare) {
    for (int32_t i = 0; i < n; i++) use[i] = i;
    for (int shift = 0; n && shift < 32 && (slots - 1) >> shift; shift += 8) { // by one byte after the other
        int32_t at[257] = {};
        for (int32_t i = 0; i < n; i++) at[(slot[i] >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++) at[b + 1] += at[b];
        for (int32_t i = 0; i < n; i++) spare[at[slot[use[i]] >> shift & 255]++] = use[i];
        memcpy(use, spare, (size_t)n * 4);
    }
}

extern "C" int64_t fader_plan_words(int64_t T, int64_t R, int64_t terms) {
    // header, then tok_ptr, tok, gam, term_ptr, slot, use_group, use_term, gamma, then working room
    return (int64_t)(sizeof(Plan) / 4) + (R + 1) * 2 + T * 2 + terms * 4 + (terms + 4 * (R + 1));
}

extern "C" int fader_plan_build(int64_t T, int64_t R, const int32_t *term_ptr, const int32_t *term_slot,
                                const float *term_gamma, const int32_t *row_of_token, int32_t slots,
                                int32_t *blob, int64_t words) {
    if (T < 0 || R < 0 || slots < 0 || !term_ptr || !blob || (T && !row_of_token)) return FADER_E_ARG;
    const int64_t all = term_ptr[R];
    if (term_ptr[0] != 0 || all < 0 || (all && (!term_slot || !term_gamma))) return FADER_E_ARG;
    if (words < fader_plan_words(T, R, all)) return FADER_E_SCRATCH;
    for (int64_t r = 0; r < R; r++)
        if (term_ptr[r + 1] < term_ptr[r]) return FADER_E_BOUNDS;
    for (int64_t i = 0; i < all; i++)
        if (term_slot[i] < 0 || term_slot[i] >= slots) return FADER_E_BOUNDS;
    for (int64_t t = 0; t < T; t++)
        if (row_of_token[t] < 0 || row_of_token[t] >= R) return FADER_E_BOUNDS;

    Plan &p = *(Plan *)blob;
    int32_t at = sizeof(Plan) / 4;
    p.tok_ptr = at, at += (int32_t)R + 1;
    p.tok = at, at += (int32_t)T;
    p.gam = at, at += (int32_t)T;
    p.term_ptr = at, at += (int32_t)R + 1;
    p.slot = at, at += (int32_t)all;
    p.use_group = at, at += (int32_t)all;
    p.use_term = at, at += (int32_t)all;
    p.gamma = at, at += (int32_t)all;
    int32_t *kept = blob + at, *ptr = kept + all, *order = ptr + R + 1, *count = order + R + 1, *start = count + R + 1;
    float *gamma = (float *)(blob + p.gamma);

    ptr[0] = 0;
    for (int64_t r = 0; r < R; r++) {
        int32_t n = ptr[r];
        for (int32_t i = term_ptr[r]; i < term_ptr[r + 1]; i++)
            if (term_gamma[i] != 0.0f) kept[n] = term_slot[i], gamma[n++] = term_gamma[i];
        ptr[r + 1] = n;
        order[r] = (int32_t)r;
        count[r] = 0;
    }
    const Rows rows = {ptr, kept};
    sort_rows(rows, order, R);
    for (int64_t t = 0; t < T; t++) count[row_of_token[t]]++;

    int32_t *tok_ptr = blob + p.tok_ptr, *tok = blob + p.tok, *gam = blob + p.gam;
    int32_t *tp = blob + p.term_ptr, *slot = blob + p.slot;
    int32_t groups = 0, tokens = 0, terms = 0, last = -1;
    for (int64_t i = 0; i < R; i++) {
        const int32_t r = order[i];
        start[r] = -1;
        if (ptr[r + 1] == ptr[r] || !count[r]) continue;
        if (last < 0 || compare(rows, last, r)) {
            tok_ptr[groups] = tokens;
            tp[groups++] = terms;
            for (int32_t k = ptr[r]; k < ptr[r + 1]; k++) slot[terms++] = kept[k];
        }
        start[r] = tokens;
        tokens += count[r];
        last = r;
    }
    tok_ptr[groups] = tokens;
    tp[groups] = terms;
    for (int64_t t = 0; t < T; t++) {
        const int32_t r = row_of_token[t];
        if (start[r] < 0) continue;
        tok[start[r]] = (int32_t)t;
        gam[start[r]++] = ptr[r];
    }
    // uses sorted by slot, so that one thread meets an adapter's matrices in a row
    int32_t *ug = blob + p.use_group, *ut = blob + p.use_term, *group = kept; // whose time is over
    sort_uses(slot, slots, terms, ut, kept);
    for (int32_t g = 0; g < groups; g++)
        for (int32_t i = tp[g]; i < tp[g + 1]; i++) group[i] = g;
    for (int32_t i = 0; i < terms; i++) ug[i] = group[ut[i]];
    p.T = (int32_t)T, p.slots = slots, p.groups = groups, p.tokens = tokens, p.terms = p.uses = terms;
    return 0;
}
