/* Threads that stay awake between the phases of one call.

   A token is a hundred phases of a few microseconds. The pool would sleep and wake
   between them for longer than they take, so here followers wait busily, but only while
   the call runs. Nobody waits for a thread to come: who is late, or never comes, finds
   his items done by others. */
#include "kernels_team.h"

#include <sched.h>

/* Looks at a counter before the core is offered to others. */
enum { PATIENCE = 4000 };

static void wait_a_little(int *looks)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (++*looks % PATIENCE == 0)
        sched_yield();
}

static int next_item(uint64_t ticket, ptrdiff_t *item)
{
    *item = (ptrdiff_t)(ticket & UINT32_MAX);
    return (uint64_t)*item < ticket >> 32;
}

/* The second look decides: between the two, a phase may have ended and another begun.
   While an item is not done its phase can't end. */
static void take_items(struct team *team)
{
    ptrdiff_t item;
    while (next_item(__atomic_load_n(&team->ticket, __ATOMIC_RELAXED), &item) &&
           next_item(__atomic_fetch_add(&team->ticket, 1, __ATOMIC_ACQUIRE), &item)) {
        team->work(team->context, item);
        __atomic_fetch_add(&team->num_done, 1, __ATOMIC_RELEASE);
    }
}

void share(struct team *team, void (*work)(void *context, ptrdiff_t item), void *context,
           uint32_t count)
{
    if (team->threads < 2) {
        for (ptrdiff_t item = 0; item < (ptrdiff_t)count; item++)
            work(context, item);
        return;
    }
    int looks = 0;
    team->work = work;
    team->context = context;
    __atomic_store_n(&team->num_done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->ticket, (uint64_t)count << 32, __ATOMIC_RELEASE);
    take_items(team);
    while (__atomic_load_n(&team->num_done, __ATOMIC_ACQUIRE) < count)
        wait_a_little(&looks);
}

/* Whoever takes the first item leads. */
static void take_part(void *context, ptrdiff_t item)
{
    struct team *team = context;
    int looks = 0;
    if (item == 0) {
        team->lead(team, team->lead_context);
        __atomic_store_n(&team->is_over, 1, __ATOMIC_RELEASE);
    }
    while (!__atomic_load_n(&team->is_over, __ATOMIC_ACQUIRE)) {
        take_items(team);
        wait_a_little(&looks);
    }
}

void run_team(void (*lead)(struct team *team, void *context), void *context, int threads)
{
    struct team team = {.lead = lead, .lead_context = context, .threads = threads};
    run_parallel(take_part, &team, threads, threads);
}
