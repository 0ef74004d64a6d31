/* Walks the tokens of a head in items that keep to themselves, group by group. */
#include "kernels_head.h"

#include "kernels_bits.h"
#include "kernels_fused.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Tokens whose logits and int8 rows stay in L2 together. */
enum { ITEM_TOKENS = 4 * LEFT_ROWS };
/* Columns that one call quantises, as in `kernels_gradient.c`. */
enum { ITEM_COLUMNS = 4 * LEFT_ROWS };

#define LOOPS "kernels_head_loops.h"
#include "kernels_levels.h"

static const struct head_loops *active_head(void)
{
#if defined(__x86_64__)
    if (active_loops() == &loops_avx512)
        return &head_avx512;
    if (active_loops() == &loops_avx2)
        return &head_avx2;
#endif
    return &head_portable;
}

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

/* Rows (M, H) as int8 rows of whole words of four, the last filled with zeros. */
static void quantise_padded(const float *x, ptrdiff_t num_m, ptrdiff_t num_h, int8_t *q,
                            float *scale)
{
    ptrdiff_t width = up(num_h, TILE_K) * TILE_K;
    for (ptrdiff_t m = 0; m < num_m; m++, q += width) {
        active_loops()->quantise_rows(x + m * num_h, 1, num_h, num_h, q, scale + m);
        memset(q + num_h, 0, (size_t)(width - num_h));
    }
}

struct packing {
    const struct head_table *table;
    float *word_scale;
    int8_t *q;
    uint8_t *forward;
};

static void pack_item(void *context, ptrdiff_t panel)
{
    const struct packing *job = context;
    const struct head_table *table = job->table;
    ptrdiff_t width = up(table->num_h, TILE_K) * TILE_K, v = panel * TILE_N;
    ptrdiff_t count = least(TILE_N, table->num_v - v);
    quantise_padded(table->values + v * table->num_h, count, table->num_h,
                    job->q + v * width, job->word_scale + v);
    active_head()->weave_rows(job->q + v * width, count, width, job->forward + v * width);
}

void pack_table(const struct head_table *table, float *word_scale, int8_t *q,
                uint8_t *forward, uint8_t *backward, int threads)
{
    struct packing job = {table, word_scale, q, forward};
    run_parallel(pack_item, &job, up(table->num_v, TILE_N), threads);
    pack_tokens(q, table->num_v, up(table->num_h, TILE_K) * TILE_K, backward, threads);
}

struct loss_job {
    const struct head_table *table;
    const float *hidden;
    const int64_t *targets;
    struct head_tokens *tokens;
    float *nats, *dhidden;
    float scale;
    int failed;
};

/* What one item works in. */
struct workplace {
    float *logits;             /* (TOKENS, V), then probabilities */
    int8_t *high, *low;        /* (ITEM_TOKENS, 4 * V4) */
    float *scale;              /* (ITEM_TOKENS, groups of words) */
    int32_t *high_start, *low_start;
    int32_t *start;            /* (ITEM_TOKENS) */
};

static size_t lay_out(struct workplace *place, char *at, ptrdiff_t num_v)
{
    ptrdiff_t width = up(num_v, TILE_K) * TILE_K, groups = up(num_v, WORDS);
    size_t row = (size_t)(ITEM_TOKENS * groups) * 4, used = 0;
    place->logits = (float *)(void *)(at + used);
    used += (size_t)(TOKENS * num_v) * 4;
    place->scale = (float *)(void *)(at + used);
    place->high_start = (int32_t *)(void *)(at + used + row);
    place->low_start = (int32_t *)(void *)(at + used + 2 * row);
    place->start = (int32_t *)(void *)(at + used + 3 * row);
    used += 3 * row + ITEM_TOKENS * 4;
    place->high = (int8_t *)(at + used);
    place->low = place->high + ITEM_TOKENS * width;
    return used + (size_t)(2 * ITEM_TOKENS * width);
}

static void find_logits(const struct loss_job *job, const struct workplace *place,
                        ptrdiff_t m, ptrdiff_t count, float *logits)
{
    const struct head_table *table = job->table;
    ptrdiff_t num_h4 = up(table->num_h, TILE_K), width = num_h4 * TILE_K;
    int8_t *q = job->tokens->q + m * width;
    float *scale = job->tokens->scale + m;
    quantise_padded(job->hidden + m * table->num_h, count, table->num_h, q, scale);
    active_loops()->row_starts(q, count, width, width, place->start);
    for (ptrdiff_t i = 0; i < count; i++)
        place->start[i] *= 128;
    struct product p = {
        .q = q, .row_scale = scale, .row_start = place->start, .tiles = table->forward,
        .out = logits, .num_m = count, .num_n = table->num_v, .num_k4 = num_h4,
        .group_k4 = num_h4, .num_groups = 1, .scale = 1.0f, .any_byte = 1,
    };
    run_product(&p, 1);
}

/* One row of logits becomes probabilities times `scale`, but for its target. */
static void turn_row(const struct loss_job *job, ptrdiff_t m, float *row)
{
    const struct head_table *table = job->table;
    ptrdiff_t target = (ptrdiff_t)job->targets[m];
    job->nats[m] = job->tokens->at_target[m] = 0.0f;
    if (target < 0) {
        memset(row, 0, (size_t)table->num_v * sizeof *row);
        return;
    }
    active_head()->scale_row(row, table->word_scale, table->num_v);
    job->nats[m] = active_fused()->softmax(row, table->num_v, target, job->scale);
    job->tokens->at_target[m] = row[target];
    row[target] = 0.0f;
}

/* The gradient of `count` tokens from the rows of place->high and low. */
static void find_dhidden(const struct loss_job *job, const struct workplace *place,
                         ptrdiff_t m, ptrdiff_t count)
{
    const struct head_table *table = job->table;
    ptrdiff_t num_h = table->num_h;
    float *out = job->dhidden + m * num_h;
    struct product p = {
        .q = place->high, .row_scale = place->scale, .row_start = place->high_start,
        .tiles = table->backward, .out = out, .num_m = count, .num_n = num_h,
        .num_k4 = up(table->num_v, TILE_K), .group_k4 = WORDS / TILE_K,
        .num_groups = up(table->num_v, WORDS), .scale = 1.0f, .any_byte = 1,
        .no_negative = 1, /* probabilities, and zeros for targets */
    };
    run_product(&p, 1);
    p.q = place->low;
    p.no_negative = 0;
    p.row_start = place->low_start;
    p.scale = 1.0f / FINER;
    p.accumulate = 1;
    run_product(&p, 1);
    for (ptrdiff_t i = 0; i < count; i++)
        if (job->targets[m + i] >= 0)
            active_head()->add_row(table->values + job->targets[m + i] * num_h,
                                   job->tokens->at_target[m + i], num_h,
                                   out + i * num_h);
}

/* Probabilities of one group of tokens as the left operand of the table's gradient. */
static void keep_columns(const struct loss_job *job, const float *p, ptrdiff_t m,
                         ptrdiff_t count)
{
    const struct head_tokens *tokens = job->tokens;
    ptrdiff_t num_v = job->table->num_v, num_m4 = up(tokens->num_m, TILE_K);
    ptrdiff_t num_groups = up(tokens->num_m, TOKENS), g = m / TOKENS;
    for (ptrdiff_t v = 0; v < num_v; v += ITEM_COLUMNS)
        active_loops()->quantise_columns(
            p + v, num_v, least(ITEM_COLUMNS, num_v - v), tokens->scale + m, count,
            tokens->blocks + (v / LEFT_ROWS * num_m4 + m / TILE_K) * LEFT_BYTES,
            num_m4 * LEFT_BYTES, tokens->word_scale + v * num_groups + g,
            tokens->start + v * num_groups + g, num_groups);
}

static void loss_item(void *context, ptrdiff_t item)
{
    struct loss_job *job = context;
    struct workplace place;
    ptrdiff_t num_v = job->table->num_v, groups = up(num_v, WORDS);
    ptrdiff_t width = up(num_v, TILE_K) * TILE_K, m = item * TOKENS;
    ptrdiff_t count = least(TOKENS, job->tokens->num_m - m);
    char *scratch = take_scratch(lay_out(&place, NULL, num_v));
    if (!scratch) {
        __atomic_store_n(&job->failed, NO_MEMORY, __ATOMIC_RELAXED);
        return;
    }
    lay_out(&place, scratch, num_v);
    for (ptrdiff_t i = 0; i < count; i += ITEM_TOKENS) {
        ptrdiff_t some = least(ITEM_TOKENS, count - i);
        float *logits = place.logits + i * num_v;
        find_logits(job, &place, m + i, some, logits);
        for (ptrdiff_t row = 0; row < some; row++) {
            turn_row(job, m + i + row, logits + row * num_v);
            active_head()->split(logits + row * num_v, job->table->word_scale, num_v,
                                 place.high + row * width, place.low + row * width,
                                 place.scale + row * groups,
                                 place.high_start + row * groups,
                                 place.low_start + row * groups);
        }
        find_dhidden(job, &place, m + i, some);
    }
    keep_columns(job, place.logits, m, count);
    give_scratch(scratch);
}

struct pull_job {
    const struct head_table *table;
    const struct head_tokens *tokens;
    float *pulls; /* (items, H + 1): a sum of rests times weights, and of weights */
};

/* The mean token's weight of each word times what rounding the word took from it. */
static void pull_item(void *context, ptrdiff_t item)
{
    const struct pull_job *job = context;
    const struct head_table *table = job->table;
    const struct head_tokens *tokens = job->tokens;
    ptrdiff_t num_groups = up(tokens->num_m, TOKENS), num_h = table->num_h;
    ptrdiff_t width = up(num_h, TILE_K) * TILE_K;
    float *pull = job->pulls + item * (num_h + 1);
    memset(pull, 0, (size_t)(num_h + 1) * sizeof *pull);
    ptrdiff_t v = item * WORDS, end = least(v + WORDS, table->num_v);
    for (; v < end; v++) {
        float weight = 0.0f;
        for (ptrdiff_t g = v * num_groups; g < (v + 1) * num_groups; g++)
            weight -= tokens->word_scale[g] * (float)(tokens->start[g] / 128);
        active_head()->add_rest(table->values + v * num_h, table->q + v * width,
                                table->word_scale[v], weight, num_h, pull);
        pull[num_h] += weight;
    }
}

static int take_pull_back(const struct loss_job *loss, int threads)
{
    ptrdiff_t num_items = up(loss->table->num_v, WORDS), num_h = loss->table->num_h;
    float *pulls = take_scratch((size_t)(num_items * (num_h + 1)) * sizeof *pulls);
    if (!pulls)
        return NO_MEMORY;
    struct pull_job job = {loss->table, loss->tokens, pulls};
    run_parallel(pull_item, &job, num_items, threads);
    for (ptrdiff_t item = 1; item < num_items; item++)
        active_head()->add_row(pulls + item * (num_h + 1), 1.0f, num_h + 1, pulls);
    /* What a token gives to words together is minus what its target gets. */
    for (ptrdiff_t m = 0; pulls[num_h] != 0.0f && m < loss->tokens->num_m; m++)
        active_head()->add_row(pulls, -loss->tokens->at_target[m] / pulls[num_h], num_h,
                               loss->dhidden + m * num_h);
    give_scratch(pulls);
    return OK;
}

int head_loss(const struct head_table *table, const float *hidden,
              const int64_t *targets, float scale, struct head_tokens *tokens,
              float *nats, float *dhidden, int threads)
{
    struct loss_job job = {table, hidden, targets, tokens, nats, dhidden, scale, OK};
    run_parallel(loss_item, &job, up(tokens->num_m, TOKENS), threads);
    return job.failed ? job.failed : take_pull_back(&job, threads);
}

int head_table_gradient(const struct head_tokens *tokens, const float *hidden,
                        const int64_t *targets, ptrdiff_t num_v, ptrdiff_t num_h,
                        float factor, float *into, int threads)
{
    ptrdiff_t num_m = tokens->num_m, num_m4 = up(num_m, TILE_K);
    ptrdiff_t width = up(num_h, TILE_K) * TILE_K, num_panels = up(num_h, TILE_N);
    uint8_t *tiles = take_scratch((size_t)(num_panels * num_m4 * TILE_BYTES));
    if (!tiles)
        return NO_MEMORY;
    pack_tokens(tokens->q, num_m, width, tiles, threads);
    struct product p = {
        .q = tokens->blocks, .row_scale = tokens->word_scale, .row_start = tokens->start,
        .tiles = tiles, .out = into, .num_m = num_v, .num_n = num_h, .num_k4 = num_m4,
        .group_k4 = TOKENS / TILE_K, .num_groups = up(num_m, TOKENS), .scale = factor,
        .accumulate = 1, .in_blocks = 1, .any_byte = 1, .no_negative = 1,
    };
    run_product(&p, threads);
    give_scratch(tiles);
    for (ptrdiff_t m = 0; m < num_m; m++)
        if (targets[m] >= 0)
            active_head()->add_row(hidden + m * num_h, tokens->at_target[m] * factor,
                                   num_h, into + targets[m] * num_h);
    return OK;
}
