// Threads that share out the items of one piece of work. Knows no kernels.
//
// Items are claimed one by one, so the work is done when every claimed item is, not when every thread has
// arrived: a thread that another process keeps off its core delays nothing but the item it holds.
#pragma once
#include <stdint.h>

enum { TEAM_MAX = 255 }; // threads

typedef void (*TeamWork)(const void *context, int64_t item, int thread);

// work(context, item, thread) for every item in [0, items), on up to `nt` threads numbered from 0, the
// caller among them; returns when all are done. While one caller has the team, another works alone.
void team_run(int nt, int64_t items, TeamWork work, const void *context);

template <class F> static inline void share(int nt, int64_t items, const F &f) {
    if (nt > 1 && items > 1)
        return team_run(nt, items, [](const void *c, int64_t i, int t) { (*(const F *)c)(i, t); }, &f);
    for (int64_t i = 0; i < items; i++) f(i, 0);
}
