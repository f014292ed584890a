// The team behind team.h: one job at a time, published in one word, so that a claim is one compare-and-swap.
#include "team.h"

#include <atomic>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace {

enum { ITEMS_MAX = (1 << 22) - 1 };
const int64_t IDLE_NS = 2000000; // how long a worker looks for the next job before it sleeps

// generation:12 threads:8 items:22 next:22. A claim adds 1 to next; while an item is claimed and not done
// the job cannot end, so what a claimer reads of the job afterwards is the job it claimed from.
struct Word {
    uint64_t bits;
    uint64_t generation() const { return bits >> 52; }
    int threads() const { return (int)(bits >> 44 & 255); }
    int64_t items() const { return (int64_t)(bits >> 22 & ITEMS_MAX); }
    int64_t next() const { return (int64_t)(bits & ITEMS_MAX); }
};

std::atomic<uint64_t> word{0};
std::atomic<int64_t> done{0};
std::atomic<int> sleepers{0}, epoch{0};
std::atomic<bool> taken{false};
TeamWork job;
const void *job_context;
int workers = 0;
bool watched = false;

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}
int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
void futex(int operation, int value) {
    syscall(SYS_futex, (int *)&epoch, operation | FUTEX_PRIVATE_FLAG, value, (void *)0, (void *)0, 0);
}

// the items of the job in `word` that are left; true if there was one
bool work_on(int me) {
    bool any = false;
    for (Word w = {word.load()}; me < w.threads() && w.next() < w.items();) {
        if (!word.compare_exchange_weak(w.bits, w.bits + 1)) continue;
        job(job_context, w.next(), me);
        done.fetch_add(1);
        any = true;
        w.bits = word.load();
    }
    return any;
}

void sleep_until(const Word &seen) {
    const int at = epoch.load();
    sleepers.fetch_add(1);
    if (word.load() >> 52 == seen.generation()) futex(FUTEX_WAIT, at);
    sleepers.fetch_sub(1);
}

void *worker(void *number) {
    const int me = (int)(intptr_t)number;
    for (;;) {
        const Word seen = {word.load()};
        int64_t until = 0;
        if (work_on(me)) continue;
        for (int spins = 0; word.load() >> 52 == seen.generation(); spins++) {
            relax();
            if (spins % 64) continue;
            const int64_t now = now_ns();
            if (!until) until = now + IDLE_NS;
            if (now > until) {
                sleep_until(seen);
                break;
            }
        }
    }
    return 0;
}

// a forked child has the words but not the threads
void forget() {
    workers = 0;
    sleepers = 0;
    word = 0;
    taken = false;
}

void hire(int count) {
    if (!watched) watched = pthread_atfork(0, 0, forget) == 0;
    while (workers < count) {
        pthread_t id;
        if (pthread_create(&id, 0, worker, (void *)(intptr_t)(workers + 1))) return;
        pthread_detach(id);
        workers++;
    }
}

} // namespace

void team_run(int nt, int64_t items, TeamWork work, const void *context) {
    if (nt < 2 || items > ITEMS_MAX || taken.exchange(true)) { // alone: the team stays free for others
        for (int64_t i = 0; i < items; i++) work(context, i, 0);
        return;
    }
    if (nt > TEAM_MAX) nt = TEAM_MAX;
    hire(nt - 1);
    job = work, job_context = context;
    done = 0;
    const uint64_t generation = (word.load() >> 52) + 1;
    word = generation << 52 | (uint64_t)nt << 44 | (uint64_t)items << 22;
    if (sleepers.load()) {
        epoch.fetch_add(1);
        futex(FUTEX_WAKE, INT_MAX);
    }
    work_on(0);
    for (int spins = 0; done.load() < items; spins++)
        if (spins < 4096) relax();
        else sched_yield();
    taken = false;
}
