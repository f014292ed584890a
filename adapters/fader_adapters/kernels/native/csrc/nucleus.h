// Finds the token that a draw with top_p gives from part of a row's products: those that a screen chose, and what is not
// computed weighs as much as its bounds say. Whoever wins the race is the token if what outweighs it is less than the share p of
// all; if it is more, the next of those that weigh more is asked. Nothing of it is assumed to be likely. Knows rows; no weights.
#pragma once
#include "draw.h"
#include "screen.h"

namespace {

enum { NUCLEUS_ROUNDS = 6, NUCLEUS_CELLS = 512 }; // of products; cells of a histogram of floats' uppermost bits
enum { COMPUTED = 1, CHOSEN = 2 };                // of a panel in `hit`
const double NUCLEUS_OFF = 1e-4;                  // more than bounds of masses are rounded by, relatively
const double NUCLEUS_MOST = 0.5;                  // of the panels: where more are needed all are computed

// A row's way down its race.
struct Walk {
    bool open, lost;
    float best;
    int64_t first, winner; // the first that is `best`; what is drawn, or -1
    int64_t outside;       // mass: what weighs so much or less is not drawn
    double from;           // logit: what is below weighs no more than that
};

// A row of products and what is known of the rest.
struct Nucleus {
    const fader_wanted_t &wanted;
    const float *x;           // [n], where it is computed
    int64_t n, panels;
    const float *most, *race; // [P] of screen.h
    float *heavy, *light;     // [P] of screen.h; once the walk has begun against exp(best / heat)
    uint8_t *hit;             // [P], shared by the rows
    float *e, *heaviest;      // [n] and [P] as draw.h's, where it is computed
    Walk &walk;

    bool known(int64_t p) const { return __atomic_load_n(hit + p, __ATOMIC_RELAXED) == COMPUTED; }
    void choose(int64_t p) const { __atomic_store_n(hit + p, (uint8_t)CHOSEN, __ATOMIC_RELAXED); }
    int64_t columns(int64_t p) const { return min64(PANEL, n - p * PANEL); }

    // what is not computed lies below the largest, and is finite
    void begin() {
        float best = -INFINITY;
        for (int64_t p = 0; p < panels; p++) {
            if (!known(p)) continue;
            for (int64_t i = p * PANEL; i < p * PANEL + columns(p); i++) {
                if (nan_bits(x[i])) return; // whoever draws sees it
                if (x[i] > best) best = x[i], walk.first = i;
            }
        }
        walk.open = isfinite(best), walk.best = best, walk.outside = wanted.least - 1;
        walk.from = best - fmin(wanted.reach, 30.6 * wanted.heat) - 1e-4 * wanted.heat - fabs(best) * 0x1p-20; // below that nothing is drawn
        over(most, panels, -INFINITY, [&](V v, int64_t i) {
            float part[W];
            vstore(part, vexp(vdiv(vadd(v, vset(-best)), vset(wanted.heat))));
            for (int64_t j = 0; j < min64(W, panels - i); j++) {
                heavy[i + j] *= part[j] * (float)(1 + NUCLEUS_OFF);
                const float all = light[i + j] * part[j] * (float)(1 - NUCLEUS_OFF);
                light[i + j] = fmaxf(0.0f, all - PANEL * 0x1p-44f); // each token is rounded down
            }
        });
    }

    // e and heaviest; returns the mass of what is computed
    int64_t weigh_panels() {
        int64_t total = 0;
        for (int64_t p = 0; p < panels; p++) {
            heaviest[p] = 0.0f;
            if (!known(p)) continue;
            float *const own = e + p * PANEL;
            V top = vzero();
            over(x + p * PANEL, columns(p), -INFINITY, [&](V v, int64_t i) {
                const V w = vexp(vdiv(vadd(v, vset(-walk.best)), vset(wanted.heat)));
                vstore(own + i, w);
                top = vmax(top, w);
            });
            for (int64_t i = 0; i < columns(p); i++) total += mass_of(own[i]);
            heaviest[p] = vtop(top);
        }
        return total;
    }

    // f(token, its mass) of what is computed and weighs more than `mass`
    template <class F> void heavier(int64_t mass, const F &f) const {
        const float least = lightest(mass + 1);
        for (int64_t p = 0; p < panels; p++)
            if (heaviest[p] >= least)
                for (int64_t i = p * PANEL; i < p * PANEL + columns(p); i++)
                    if (mass_of(e[i]) > mass) f(i, mass_of(e[i]));
    }

    // logit / heat and a number, less what bounds of others' are rounded by
    double bar(int64_t i) const {
        const double z = heated(x[i], wanted.heat) + gumbel(wanted.key, i);
        return z - GUMBEL_OFF - fabs(z) * 0x1p-20;
    }

    // draw.h's race of what is computed and not outside
    int64_t leader() const {
        int64_t winner = walk.first;
        double lead = gumbel(wanted.key, winner), least = bar(winner);
        const float lightest_in = lightest(walk.outside + 1);
        for (int64_t p = 0; p < panels; p++) {
            if (heaviest[p] < lightest_in || race[p] < least) continue;
            float noise[PANEL];
            gumbel_tops(wanted.key, p * PANEL, PANEL, noise);
            for (int64_t i = p * PANEL; i < p * PANEL + columns(p); i++) {
                const double at = (double)(x[i] - walk.best) / (double)wanted.heat;
                if (mass_of(e[i]) <= walk.outside || at + (double)noise[i % PANEL] < lead) continue;
                const double z = at + gumbel(wanted.key, i);
                if (z > lead || (z == lead && i < winner)) lead = z, winner = i, least = bar(i);
            }
        }
        return winner;
    }

    // Those that are not computed and may win. False where there are none.
    bool choose_rivals(double least) const {
        bool any = false;
        for (int64_t p = 0; p < panels; p++)
            if (race[p] >= least && most[p] >= walk.from && !known(p)) choose(p), any = true;
        return any;
    }

    // p of all, less what outweighs a token: bounds, and about where between them it lies. Above 0 the token is drawn.
    struct Margin {
        double low, high, about;
        bool hidden; // something of what is not computed may outweigh it
    };
    Margin margin(double edge, int64_t total, int64_t above) const {
        const double p = wanted.top_p, sure = (p * (double)total - (double)above) * 0x1p-44;
        Margin m = {sure, sure, sure, false};
        for (int64_t i = 0; i < panels; i++) {
            if (known(i)) continue;
            const bool hides = most[i] >= edge;
            m.hidden |= hides;
            m.low += hides ? (p - 1) * heavy[i] : p * light[i];
            m.high += p * heavy[i];
            m.about += (hides ? p - 0.5 : p) * sqrtf(heavy[i] * light[i]);
        }
        return m;
    }

    // Those without which bounds would tell, if all lies about where it seems to. False where they are more than `room`.
    bool choose_weights(double edge, double enough, int64_t room) const {
        double doubts[NUCLEUS_CELLS] = {}, rest = 0.0;
        int64_t counts[NUCLEUS_CELLS] = {}, more = 0;
        const auto doubt = [&](int64_t i) { return fmaxf(0.0f, most[i] >= edge ? heavy[i] : (float)wanted.top_p * (heavy[i] - light[i])); };
        for (int64_t i = 0; i < panels; i++) {
            if (known(i)) continue;
            const u32 cell = float_bits(doubt(i)) >> 22;
            doubts[cell] += doubt(i), counts[cell]++;
        }
        u32 first = 0;
        while (first < NUCLEUS_CELLS && rest + doubts[first] <= enough) rest += doubts[first++];
        for (u32 cell = first; cell < NUCLEUS_CELLS; cell++) more += counts[cell];
        if (!more || more > room) return false;
        for (int64_t i = 0; i < panels; i++)
            if (!known(i) && float_bits(doubt(i)) >> 22 >= first) choose(i);
        return true;
    }

    // as far as what is computed tells who comes next; `room`: how many panels more may be asked for
    void go_on(int64_t room) {
        const int64_t total = weigh_panels();
        for (;;) {
            const int64_t next = leader(), mass = mass_of(e[next]);
            if (choose_rivals(bar(next))) return;
            int64_t above = 0;
            heavier(mass, [&](int64_t, int64_t m) { above += m; });
            const double edge = x[next] - 2e-5 * wanted.heat - fabs(x[next]) * 0x1p-22; // what is below weighs no more
            const Margin m = margin(edge, total, above);
            const double off = 1e-9 * ((double)total * 0x1p-44 + m.high - m.low);
            if (m.low > off || !(above || m.hidden)) walk.winner = next, walk.open = false;
            else if (m.high < -off - 0x1p-44) {
                walk.outside = mass, walk.from = edge;
                continue;
            } else walk.open = !(walk.lost = !choose_weights(edge, fabs(m.about) / 2, room));
            return;
        }
    }
};

static bool asks_nuclei(const fader_site_t &s, int64_t T) {
    return std::any_of(s.screen->rows, s.screen->rows + T, asks_nucleus);
}
static int64_t nuclei_bytes(const fader_site_t &s, int64_t T, int nt) {
    return min64(nt, T) * ceil_div(s.n, PANEL) * align64((PANEL + 1) * 4);
}

// Rows out [T, n], of which what rows.hit names is computed, and -inf the rest; those whose token is found are left with it
// alone. more(): computes what is CHOSEN.
template <class F>
void find_nuclei(const fader_site_t &s, int64_t T, float *out, int64_t os, const Screened &rows, char *scratch, int nt, const F &more) {
    const int64_t panels = ceil_div(s.n, PANEL);
    Walk walks[SCREEN_ROWS] = {};
    int64_t have = 0;
    for (int64_t p = 0; p < panels; p++) have += rows.hit[p];
    for (int64_t t = 0; t < T; t++) walks[t].open = asks_nucleus(s.screen->rows[t]), walks[t].winner = -1;
    for (int round = 0; have < panels; round++) {
        share((int)min64(nt, T), T, [&](int64_t t, int me) {
            if (!walks[t].open) return;
            float *const e = (float *)(scratch + me * nuclei_bytes(s, 1, 1));
            const int64_t at = t * panels;
            Nucleus row = {s.screen->rows[t], out + t * os, s.n, panels, rows.most + at, rows.race + at, rows.heavy + at, rows.light + at,
                           rows.hit, e, e + panels * PANEL, walks[t]};
            if (!round) walks[t].open = false, row.begin();
            if (walks[t].open) row.go_on((int64_t)(NUCLEUS_MOST * (double)panels) - have);
        });
        bool lost = false, open = false;
        for (int64_t t = 0; t < T; t++) open |= walks[t].open, lost |= walks[t].lost;
        lost |= open && round == NUCLEUS_ROUNDS;
        if (!open && !lost) break;
        for (int64_t p = 0; p < panels; p++) {
            if (lost && !rows.hit[p]) rows.hit[p] = CHOSEN;
            have += rows.hit[p] == CHOSEN;
        }
        more();
        for (int64_t p = 0; p < panels; p++) rows.hit[p] = rows.hit[p] ? COMPUTED : 0;
    }
    share((int)min64(nt, T), T, [&](int64_t t, int) {
        if (walks[t].winner < 0) return;
        float *const x = out + t * os, logit = x[walks[t].winner];
        for (int64_t p = 0; p < panels; p++)
            if (rows.hit[p]) std::fill(x + p * PANEL, x + min64(s.n, (p + 1) * PANEL), -INFINITY);
        x[walks[t].winner] = logit;
    });
    s.screen->computed = have;
}

} // namespace
