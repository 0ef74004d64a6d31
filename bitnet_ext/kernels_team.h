/* Threads that go through many short phases of one call together; see `kernels_team.c`. */
#ifndef BITNET_KERNELS_TEAM_H
#define BITNET_KERNELS_TEAM_H

#include "kernels_core.h"

struct team {
    void (*lead)(struct team *team, void *context);
    void *lead_context;
    int threads;
    /* The phase: work(context, i) for i in 0..count. */
    void (*work)(void *context, ptrdiff_t item);
    void *context;
    /* Count in the upper half, next item in the lower: both are taken as one. */
    uint64_t ticket __attribute__((aligned(64)));
    uint64_t num_done __attribute__((aligned(64)));
    int is_over __attribute__((aligned(64)));
};

/* Runs lead(team, context), whose phases up to `threads` threads share. */
void run_team(void (*lead)(struct team *team, void *context), void *context, int threads);
/* Called by `lead`: a phase; returns when all its items are done. */
void share(struct team *team, void (*work)(void *context, ptrdiff_t item), void *context,
           uint32_t count);

#endif
