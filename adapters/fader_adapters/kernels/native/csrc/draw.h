// Rows of logits: the largest, a draw, scores. A token weighs floor(2^44 exp((x - max x) / heat)), so sums are exact
// integers that no order of additions changes; a draw is the winner of a race (gumbel.h). Knows rows and numbers; no requests.
#pragma once
#include <math.h>

#include <algorithm>

#include "gumbel.h"
#include "simd.h"
#include "team.h"

namespace {

enum { DRAW_BLOCK = 256, DRAW_TOP = 18, DRAW_MIDDLE = 9 }; // elements; bits of a weight below a radix digit
const float DRAW_ONE = 0x1p44f;
const u32 DRAW_LEAST = (127u - 44u) << 23, DRAW_MOST = 127u << 23; // as bits: 2^-44, the least that weighs anything, and 1
enum { DRAW_BUCKETS = (int)((DRAW_MOST >> DRAW_TOP) - (DRAW_LEAST >> DRAW_TOP)) + 1 };

FADER_INLINE int64_t mass_of(float e) { return (int64_t)(e * DRAW_ONE); }
FADER_INLINE float lightest(int64_t mass) { return fmaxf((float)mass * 0x1p-44f * (1 - 0x1p-20f), 0x1p-44f); } // nothing below has that mass

// f(vector, first element) over n elements; what a tail lacks is `fill`
template <class X, class F> FADER_INLINE void over(const X *x, int64_t n, float fill, const F &f) {
    int64_t i = 0;
    for (; i + W <= n; i += W) f(vload_as(x + i), i);
    if (i == n) return;
    float rest[W];
    for (int64_t j = 0; j < W; j++) rest[j] = i + j < n ? load1(x + i + j) : fill;
    f(vload(rest), i);
}

// IEEE's bits of an element that is no number, in either type
FADER_INLINE bool nan_bits(float x) { return (float_bits(x) & 0x7fffffffu) > 0x7f800000u; }
FADER_INLINE bool nan_bits(u16 x) { return (x & 0x7fff) > 0x7f80; }

// largest element of each block, and of all: NaN if one is
template <class X> float tops_of(const X *x, int64_t n, float *tops) {
    float best = -INFINITY;
    bool nan = false;
    for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++) {
        const X *from = x + b * DRAW_BLOCK;
        const int64_t size = min64(DRAW_BLOCK, n - b * DRAW_BLOCK);
        V top = vset(-INFINITY);
        over(from, size, -INFINITY, [&](V v, int64_t) { top = vmax(top, v); });
        int bad = 0;
        for (int64_t i = 0; i < size; i++) bad |= nan_bits(from[i]);
        nan = nan || bad;
        tops[b] = vtop(top);
        best = tops[b] > best ? tops[b] : best;
    }
    return nan ? NAN : best;
}

// the first element that is `best`
template <class X> int64_t first_of(const X *x, int64_t n, const float *tops, float best) {
    for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++)
        if (tops[b] == best)
            for (int64_t i = b * DRAW_BLOCK; i < n; i++)
                if (load1(x + i) == best) return i;
    return 0;
}

// e[n] = exp((x - best) / heat), and of each block the largest of those; returns the mass of all. `tops` are of x: where one
// is -inf, e stays unwritten
template <class X> int64_t weigh(const X *x, int64_t n, float best, float heat, const float *tops, float *e, float *heaviest) {
    int64_t total = 0;
    for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++) {
        const int64_t from = b * DRAW_BLOCK, size = min64(DRAW_BLOCK, n - b * DRAW_BLOCK);
        heaviest[b] = 0.0f;
        if (tops[b] == -INFINITY) continue;
        V top = vzero();
        over(x + from, size, -INFINITY, [&](V v, int64_t i) {
            const V w = vexp(vdiv(vadd(v, vset(-best)), vset(heat)));
            vstore(e + from + i, w);
            top = vmax(top, w);
        });
        int64_t sum = 0;
        for (int64_t i = 0; i < size; i++) sum += mass_of(e[from + i]);
        heaviest[b] = vtop(top);
        total += sum;
    }
    return total;
}

struct Bucket {
    int64_t count, mass;
};

// The weights that may be an edge, and a walk down from the heaviest of them: to the one at which `left` weights, or
// the mass `left`, are reached. By three digits of their bits, so that nothing is sorted.
struct Radix {
    Bucket top[DRAW_BUCKETS], rest[1 << DRAW_MIDDLE];
    u32 *held, *found; // [n] as bits, and scratch
    int64_t size;

    void hold(const float *e, int64_t n, const float *tops, int64_t mass) {
        const float least = lightest(mass);
        size = 0;
        for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++) {
            if (tops[b] < least) continue;
            for (int64_t i = b * DRAW_BLOCK; i < min64(n, (b + 1) * DRAW_BLOCK); i++) {
                held[size] = float_bits(e[i]);
                size += e[i] >= least;
            }
        }
    }

    int64_t keep(int64_t edge) { // those that weigh so much; returns what they weigh
        int64_t kept = 0, mass = 0;
        for (int64_t i = 0; i < size; i++) {
            const int64_t m = mass_of(bits_float(held[i]));
            held[kept] = held[i];
            kept += m >= edge;
            mass += m >= edge ? m : 0;
        }
        size = kept;
        return mass;
    }

    // the bucket at which the walk ends; `left` is what is still missing there; -1: never
    static int walk(const Bucket *buckets, int count, bool by_mass, int64_t *left) {
        for (int b = count - 1; b >= 0; b--) {
            if (!buckets[b].count) continue;
            const int64_t has = by_mass ? buckets[b].mass : buckets[b].count;
            if (has >= *left) return b;
            *left -= has;
        }
        return -1;
    }

    template <class F> static void fill(Bucket *buckets, int count, const u32 *bits, int64_t n, const F &digit) {
        memset(buckets, 0, sizeof(Bucket) * (size_t)count);
        for (int64_t i = 0; i < n; i++) {
            Bucket &b = buckets[digit(bits[i])];
            b.count++;
            b.mass += mass_of(bits_float(bits[i]));
        }
    }

    // mass of that weight; 1 where all are too few
    int64_t edge(bool by_mass, int64_t left) {
        const u32 mask = (1 << DRAW_MIDDLE) - 1, first = DRAW_LEAST >> DRAW_TOP;
        fill(top, DRAW_BUCKETS, held, size, [=](u32 bits) { return (bits >> DRAW_TOP) - first; });
        const int at = walk(top, DRAW_BUCKETS, by_mass, &left);
        if (at < 0) return 1;
        const u32 head = (u32)at + first;
        int64_t count = 0;
        for (int64_t i = 0; i < size; i++) {
            found[count] = held[i];
            count += held[i] >> DRAW_TOP == head;
        }
        fill(rest, mask + 1, found, count, [=](u32 bits) { return bits >> DRAW_MIDDLE & mask; });
        const u32 middle = (u32)walk(rest, mask + 1, by_mass, &left);
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++)
            if ((found[i] >> DRAW_MIDDLE & mask) == middle) found[kept++] = found[i];
        fill(rest, mask + 1, found, kept, [=](u32 bits) { return bits & mask; });
        const u32 low = (u32)walk(rest, mask + 1, by_mass, &left);
        return mass_of(bits_float(head << DRAW_TOP | middle << DRAW_MIDDLE | low));
    }
};

struct DrawScratch {
    float *e, *tops, *heaviest, *order; // [n]; of each block the largest element, the heaviest weight, and room to sort those
    Radix *radix;
    FADER_INLINE int64_t row(int64_t n) { return align64((n + W) * 4); }
    FADER_INLINE int64_t bytes(int64_t n) {
        const int64_t blocks = align64(ceil_div(n, DRAW_BLOCK) * 4);
        return 3 * row(n) + 3 * blocks + align64((int64_t)sizeof(Radix));
    }
    DrawScratch(char *p, int64_t n) {
        const int64_t blocks = align64(ceil_div(n, DRAW_BLOCK) * 4);
        char *rest = p + 3 * row(n);
        e = (float *)p, tops = (float *)rest, heaviest = (float *)(rest + blocks), order = (float *)(rest + 2 * blocks);
        radix = (Radix *)(rest + 3 * blocks);
        radix->held = (u32 *)(p + row(n)), radix->found = (u32 *)(p + 2 * row(n));
    }
};

// the least mass that stays under top-k, then top-p of what that leaves, then min-p
int64_t edge_of(const fader_draw_t &d, int64_t r, const DrawScratch &s, int64_t n, int64_t total) {
    Radix &radix = *s.radix;
    const int64_t k = d.top_k[r], blocks = ceil_div(n, DRAW_BLOCK);
    const double p = d.top_p[r];
    const bool bounded = k > 0 && k < n, nucleus = p < 1.0;
    int64_t edge = max64(1, (int64_t)ceil(d.min_p[r] * (double)DRAW_ONE));
    if (!bounded && !nucleus) return edge;
    int64_t least = 1;
    if (!bounded) // lighter than what is left out on average: all of those together are less than is left out
        least = (total - (int64_t)ceil(p * (double)total)) / n;
    else if (k <= blocks) { // the k heaviest of k blocks weigh as much
        memcpy(s.order, s.heaviest, (size_t)blocks * 4);
        std::nth_element(s.order, s.order + k - 1, s.order + blocks, [](float a, float b) { return a > b; });
        least = mass_of(s.order[k - 1]);
    }
    radix.hold(s.e, n, s.heaviest, least);
    if (bounded) {
        const int64_t edge_k = radix.edge(false, k);
        edge = max64(edge, edge_k);
        total = radix.keep(edge_k);
    }
    return nucleus ? max64(edge, radix.edge(true, (int64_t)ceil(p * (double)total))) : edge;
}

// Of the tokens that weigh at least `edge` (0: all) the one whose (x - best) / heat and Gumbel number add up to most, equal
// ones by lowest number. Few can: the rest is passed over by bounds, without a logarithm.
template <class X>
int64_t race(const X *x, int64_t n, float best, float heat, uint64_t key, int64_t edge, const DrawScratch &s) {
    int64_t winner = first_of(x, n, s.tops, best);
    double lead = gumbel(key, winner);
    const float least = edge ? lightest(edge) : 0.0f;
    for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++) {
        if (s.tops[b] == -INFINITY || (edge && s.heaviest[b] < least)) continue;
        const int64_t from = b * DRAW_BLOCK, size = min64(DRAW_BLOCK, n - from);
        float bound[DRAW_BLOCK + W];
        gumbel_tops(key, from, ceil_div(size, W) * W, bound); // a tail is read by whole vectors
        V top = vset(-INFINITY);
        over(x + from, size, -INFINITY, [&](V v, int64_t i) { // none above 0: a little less of one is a little more
            const V z = vfma(vdiv(vadd(v, vset(-best)), vset(heat)), vset(1 - 0x1p-20f), vload(bound + i));
            vstore(bound + i, z);
            top = vmax(top, z);
        });
        if ((double)vtop(top) < lead) continue;
        for (int64_t i = 0; i < size; i++) {
            if ((double)bound[i] < lead || (edge && mass_of(s.e[from + i]) < edge)) continue;
            const double z = (double)(load1(x + from + i) - best) / (double)heat + gumbel(key, from + i);
            if (z > lead || (z == lead && from + i < winner)) lead = z, winner = from + i;
        }
    }
    return winner;
}

template <class X> void draw_row(const fader_draw_t &d, int64_t r, const X *x, int64_t n, const DrawScratch &s) {
    const float best = tops_of(x, n, s.tops);
    d.tokens[r] = 0;
    if (!isfinite(best)) return;
    int64_t edge = 0;
    if ((d.top_k[r] > 0 && d.top_k[r] < n) || d.top_p[r] < 1.0 || d.min_p[r] > 0.0)
        edge = edge_of(d, r, s, n, weigh(x, n, best, d.heat[r], s.tops, s.e, s.heaviest));
    d.tokens[r] = race(x, n, best, d.heat[r], d.key[r], edge, s);
}

// the `count` largest, equal ones by lowest number, into ids and values
template <class X> void likeliest(const X *x, int64_t n, const float *tops, int64_t count, double *ids, double *values) {
    int64_t have = 0;
    for (int64_t b = 0; b < ceil_div(n, DRAW_BLOCK); b++) {
        if (have == count && !(tops[b] > values[count - 1])) continue;
        for (int64_t i = b * DRAW_BLOCK; i < min64(n, (b + 1) * DRAW_BLOCK); i++) {
            const float v = load1(x + i);
            if (have == count && !(v > values[count - 1])) continue;
            int64_t at = have < count ? have++ : count - 1;
            for (; at > 0 && v > values[at - 1]; at--) values[at] = values[at - 1], ids[at] = ids[at - 1];
            values[at] = v, ids[at] = (double)i;
        }
    }
}

template <class X> void score_row(const fader_scores_t &s, int64_t r, const X *x, int64_t n, const DrawScratch &w) {
    const int64_t wide = 1 + 2 * s.top;
    double *out = s.out + r * wide, *ids = out + 1, *values = ids + s.top;
    const float best = tops_of(x, n, w.tops);
    if (!isfinite(best)) {
        for (int64_t i = 0; i < wide; i++) out[i] = i >= 1 && i <= s.top ? (double)(i - 1) : NAN;
        return;
    }
    const double total = log((double)weigh(x, n, best, 1.0f, w.tops, w.e, w.heaviest) / (double)DRAW_ONE);
    const auto logprob = [&](float v) { return (double)(v - best) - total; };
    out[0] = logprob(load1(x + s.tokens[r]));
    if (!s.top) return;
    likeliest(x, n, w.tops, s.top, ids, values);
    for (int64_t i = 0; i < s.top; i++) values[i] = logprob((float)values[i]);
}

// f(item, its row, scratch of the thread)
template <class F>
int each_row(const fader_logits_t &l, int64_t R, char *scratch, int64_t bytes, int64_t *need, int nt, const F &f) {
    const int64_t own = DrawScratch::bytes(l.n);
    const int threads = (int)min64(nt, R);
    *need = own * threads;
    if (bytes < *need) return FADER_E_SCRATCH;
    share(threads, R, [&](int64_t r, int me) {
        const int64_t at = (l.index ? l.index[r] : r) * l.stride;
        const DrawScratch mine(scratch + own * me, l.n);
        if (l.dtype == FADER_BF16) f(r, (const u16 *)l.x + at, mine);
        else f(r, (const float *)l.x + at, mine);
    });
    return 0;
}

int largest(const fader_logits_t *l, int64_t R, float *best, int64_t *tokens, void *scratch, int64_t bytes, int64_t *need, int nt) {
    return each_row(*l, R, (char *)scratch, bytes, need, nt, [&](int64_t r, const auto *x, const DrawScratch &s) {
        best[r] = tops_of(x, l->n, s.tops);
        tokens[r] = first_of(x, l->n, s.tops, best[r]);
    });
}

int draw(const fader_logits_t *l, const fader_draw_t *d, int64_t R, void *scratch, int64_t bytes, int64_t *need, int nt) {
    return each_row(*l, R, (char *)scratch, bytes, need, nt,
                    [&](int64_t r, const auto *x, const DrawScratch &s) { draw_row(*d, r, x, l->n, s); });
}

int score(const fader_logits_t *l, const fader_scores_t *o, int64_t R, void *scratch, int64_t bytes, int64_t *need, int nt) {
    return each_row(*l, R, (char *)scratch, bytes, need, nt,
                    [&](int64_t r, const auto *x, const DrawScratch &s) { score_row(*o, r, x, l->n, s); });
}

} // namespace
