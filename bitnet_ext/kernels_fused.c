/* Instances of `kernels_fused_loops.h`, and the walks over rows on several threads. */
#include "kernels_fused.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Sums have so many lanes, and so the same bits, on every machine. */
enum { LANES = 16 };
/* Adding 1.5 * 2^23 leaves the nearest integer in the low bits. */
#define ROUNDER 12582912.0f
/* Numbers by which long walks ask memory for what they will need. */
enum { AHEAD = 512 };

#define LOOPS "kernels_fused_loops.h"
#include "kernels_levels.h"

const struct fused_loops *active_fused(void)
{
#if defined(__x86_64__)
    if (active_loops() == &loops_avx512)
        return &fused_avx512;
    if (active_loops() == &loops_avx2)
        return &fused_avx2;
#endif
    return &fused_portable;
}

/* Rows of one item of work; also the rows whose gain gradients are summed first, so
   that sums do not depend on threads. */
enum { ITEM_ROWS = 32 };
/* Numbers of one item where there are no rows. */
enum { ITEM_NUMBERS = 4096, ADAMW_NUMBERS = 1 << 16 };
/* Waking a thread costs more than work on this many numbers. */
enum { MIN_PARALLEL = 1 << 15 };

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

static int enough(double numbers, int threads)
{
    return numbers < MIN_PARALLEL ? 1 : threads;
}

struct norm_job {
    struct norm norm;
    const struct fused_loops *loops;
    const float *dy;
    float *y, *dx, *dup, *dgains;
    int8_t *q;
    float *scale;
    int add, failed;
};

static void norm_item(void *context, ptrdiff_t item)
{
    struct norm_job *job = context;
    ptrdiff_t m = item * ITEM_ROWS, num_k = job->norm.num_k;
    job->loops->norm_rows(&job->norm, m, least(ITEM_ROWS, job->norm.num_m - m),
                          job->y + m * num_k);
}

static void norm_quantise_item(void *context, ptrdiff_t item)
{
    struct norm_job *job = context;
    ptrdiff_t m = item * ITEM_ROWS, num_k = job->norm.num_k;
    ptrdiff_t count = least(ITEM_ROWS, job->norm.num_m - m);
    float *row = malloc((size_t)num_k * sizeof *row);
    if (!row) {
        __atomic_store_n(&job->failed, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (ptrdiff_t i = m; i < m + count; i++) {
        job->loops->norm_rows(&job->norm, i, 1, row);
        active_loops()->quantise_rows(row, 1, num_k, num_k, job->q + i * num_k,
                                      job->scale + i);
    }
    free(row);
}

static int run_norm(struct norm_job *job, void (*work)(void *, ptrdiff_t), int threads)
{
    job->loops = active_fused();
    double numbers = (double)job->norm.num_m * (double)job->norm.num_k;
    run_parallel(work, job, up(job->norm.num_m, ITEM_ROWS), enough(numbers, threads));
    return job->failed;
}

int norm_quantise(struct norm *n, int8_t *q, float *scale, int threads)
{
    struct norm_job job = {.norm = *n, .q = q, .scale = scale};
    return run_norm(&job, norm_quantise_item, threads);
}

int norm_forward(struct norm *n, float *y, int threads)
{
    struct norm_job job = {.norm = *n, .y = y};
    return run_norm(&job, norm_item, threads);
}

static void norm_backward_item(void *context, ptrdiff_t item)
{
    struct norm_job *job = context;
    ptrdiff_t num_k = job->norm.num_k, m = item * ITEM_ROWS;
    ptrdiff_t end = least(m + ITEM_ROWS, job->norm.num_m);
    float *scratch = malloc(2 * (size_t)num_k * sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&job->failed, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (; m < end; m++)
        job->loops->norm_row_backward(
            &job->norm, m, job->dy + m * num_k, job->dx + m * num_k,
            job->dup ? job->dup + m * num_k : NULL, job->add, scratch,
            job->dgains + item * num_k);
    free(scratch);
}

int norm_backward(const struct norm *n, const float *dy, float *dx, float *dup, int add,
                  float *dgain, int threads)
{
    ptrdiff_t num_items = up(n->num_m, ITEM_ROWS);
    float *dgains = calloc((size_t)(num_items * n->num_k) + 1, sizeof *dgains);
    if (!dgains)
        return NO_MEMORY;
    struct norm_job job = {.norm = *n, .dy = dy,         .dx = dx,
                           .dup = dup, .dgains = dgains, .add = add};
    int status = run_norm(&job, norm_backward_item, threads);
    for (ptrdiff_t item = 0; item < num_items; item++)
        for (ptrdiff_t k = 0; k < n->num_k; k++)
            dgain[k] += dgains[item * n->num_k + k];
    free(dgains);
    return status;
}

struct softmax_job {
    struct logits logits;
    const int64_t *targets;
    float *nats;
    const struct fused_loops *loops;
    float scale;
    int failed;
};

/* Makes one row of floats in `row`, turns it, and writes it back. */
static float softmax_row(const struct softmax_job *job, ptrdiff_t m, float *row)
{
    const struct logits *logits = &job->logits;
    ptrdiff_t num_v = logits->num_v, target = (ptrdiff_t)job->targets[m];
    size_t width = (size_t)num_v * (logits->kind == LOGITS_BF16 ? 2 : 4);
    char *values = (char *)logits->values + (size_t)m * width;
    if (target < 0) {
        memset(values, 0, width);
        return 0.0f;
    }
    if (logits->kind == LOGITS_FP32)
        return job->loops->softmax((float *)(void *)values, num_v, target, job->scale);
    active_loops()->from_bf16((const uint16_t *)(void *)values, num_v, row);
    float nats = job->loops->softmax(row, num_v, target, job->scale);
    active_loops()->to_bf16(row, num_v, (uint16_t *)(void *)values);
    return nats;
}

static void softmax_item(void *context, ptrdiff_t item)
{
    struct softmax_job *job = context;
    ptrdiff_t m = item * ITEM_ROWS, end = least(m + ITEM_ROWS, job->logits.num_m);
    float *scratch = malloc((size_t)job->logits.num_v * sizeof *scratch);
    if (!scratch) {
        __atomic_store_n(&job->failed, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    for (; m < end; m++)
        job->nats[m] = softmax_row(job, m, scratch);
    free(scratch);
}

int softmax_backward(const struct logits *logits, const int64_t *targets, float scale,
                     float *nats, int threads)
{
    struct softmax_job job = {*logits, targets, nats, active_fused(), scale, OK};
    double numbers = (double)logits->num_m * (double)logits->num_v;
    run_parallel(softmax_item, &job, up(logits->num_m, ITEM_ROWS),
                 enough(numbers, threads));
    return job.failed;
}

struct flat_job {
    const struct fused_loops *loops;
    const float *x;
    double *sums;
    struct adamw adamw;
    ptrdiff_t count;
};

static void square_sum_item(void *context, ptrdiff_t item)
{
    const struct flat_job *job = context;
    ptrdiff_t start = item * ITEM_NUMBERS;
    job->sums[item] = job->loops->sum_of_squares(
        job->x + start, least(ITEM_NUMBERS, job->count - start));
}

int square_sum(const float *x, ptrdiff_t count, double *sum, int threads)
{
    ptrdiff_t num_items = up(count, ITEM_NUMBERS);
    double *sums = malloc((size_t)num_items * sizeof *sums + 1);
    if (!sums)
        return NO_MEMORY;
    struct flat_job job = {active_fused(), x, sums, {0}, count};
    run_parallel(square_sum_item, &job, num_items, enough((double)count, threads));
    *sum = 0;
    for (ptrdiff_t item = 0; item < num_items; item++)
        *sum += sums[item];
    free(sums);
    return OK;
}

static void adamw_item(void *context, ptrdiff_t item)
{
    const struct flat_job *job = context;
    ptrdiff_t start = item * ADAMW_NUMBERS;
    job->loops->adamw(&job->adamw, start, least(ADAMW_NUMBERS, job->count - start));
}

void adamw_step(const struct adamw *a, ptrdiff_t count, int threads)
{
    struct flat_job job = {active_fused(), NULL, NULL, *a, count};
    run_parallel(adamw_item, &job, up(count, ADAMW_NUMBERS),
                 enough((double)count, threads));
}

void add_rows(const float *x, const int64_t *ids, ptrdiff_t num_m, ptrdiff_t num_k,
              float *into)
{
    for (ptrdiff_t m = 0; m < num_m; m++) {
        float *row = into + ids[m] * num_k;
        for (ptrdiff_t k = 0; k < num_k; k++)
            row[k] += x[m * num_k + k];
    }
}
