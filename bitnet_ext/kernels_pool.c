/* A small pool of threads that take items one by one, and sleep when jobs are far apart.

   One job runs at a time; a caller that finds the pool busy works alone, so callers
   never wait for each other. Items are taken from a counter, so a thread that lost
   its core holds up one item and not a share. */
#include "kernels_core.h"

#include <pthread.h>
#include <signal.h>

enum { MAX_HELPERS = 255 };
/* Looks for the next job, or for the end of one, before a thread sleeps: some 30
   microseconds. To be woken takes as long, and the products of a step follow each other
   sooner than that. */
enum { PATIENCE = 2000 };

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;
static pthread_once_t fork_guard = PTHREAD_ONCE_INIT;

/* Under `lock`, but for `next_item`; the first looks of `await` go without it. */
static int num_helpers, num_tickets, num_busy;
static void (*job_work)(void *, ptrdiff_t);
static void *job_context;
static ptrdiff_t job_count, next_item;

static void take_items(void (*work)(void *, ptrdiff_t), void *context, ptrdiff_t count)
{
    for (;;) {
        ptrdiff_t item = __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED);
        if (item >= count)
            return;
        work(context, item);
    }
}

/* Waits until a count is zero, or is not; returns with the lock. */
static void await(const int *count, int zero, pthread_cond_t *changed)
{
    for (int looks = 0; looks < PATIENCE; looks++) {
        if ((__atomic_load_n(count, __ATOMIC_RELAXED) == 0) == zero)
            break;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    pthread_mutex_lock(&lock);
    while ((*count == 0) != zero)
        pthread_cond_wait(changed, &lock);
}

static void *help(void *unused)
{
    (void)unused;
    for (;;) {
        await(&num_tickets, 0, &wanted);
        num_tickets--;
        num_busy++;
        void (*work)(void *, ptrdiff_t) = job_work;
        void *context = job_context;
        ptrdiff_t count = job_count;
        pthread_mutex_unlock(&lock);
        take_items(work, context, count);
        pthread_mutex_lock(&lock);
        if (--num_busy == 0)
            pthread_cond_signal(&finished);
        pthread_mutex_unlock(&lock);
    }
    return NULL;
}

/* A child has none of its parent's threads. */
static void forget_helpers(void)
{
    pthread_mutex_init(&owner, NULL);
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&wanted, NULL);
    pthread_cond_init(&finished, NULL);
    num_helpers = num_tickets = num_busy = 0;
}

static void guard_forks(void) { pthread_atfork(NULL, NULL, forget_helpers); }

/* Under `lock`. Fewer than asked for is no error: the caller works too. */
static void start_helpers(int count)
{
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    /* Signals are for the threads that the program knows. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    while (num_helpers < count && !pthread_create(&thread, &attributes, help, NULL))
        num_helpers++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static void run_shared(void (*work)(void *, ptrdiff_t), void *context, ptrdiff_t count,
                       int helpers)
{
    pthread_once(&fork_guard, guard_forks);
    pthread_mutex_lock(&lock);
    start_helpers(helpers);
    job_work = work;
    job_context = context;
    job_count = count;
    __atomic_store_n(&next_item, 0, __ATOMIC_RELAXED);
    num_tickets = helpers;
    pthread_cond_broadcast(&wanted);
    pthread_mutex_unlock(&lock);
    take_items(work, context, count);
    pthread_mutex_lock(&lock);
    /* Whoever has not come by now finds nothing left to do. */
    num_tickets = 0;
    pthread_mutex_unlock(&lock);
    await(&num_busy, 1, &finished);
    pthread_mutex_unlock(&lock);
}

void run_parallel(void (*work)(void *context, ptrdiff_t item), void *context,
                  ptrdiff_t count, int threads)
{
    ptrdiff_t most = count < MAX_HELPERS + 1 ? count : MAX_HELPERS + 1;
    int helpers = (int)(threads < most ? threads : most) - 1;
    if (helpers > 0 && pthread_mutex_trylock(&owner) == 0) {
        run_shared(work, context, count, helpers);
        pthread_mutex_unlock(&owner);
        return;
    }
    for (ptrdiff_t item = 0; item < count; item++)
        work(context, item);
}
