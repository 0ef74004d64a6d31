/* The gradient of a weight: the transpose of dy times the tokens, both in int8.

   The scales of the tokens go into dy, which then gets one scale for each of its
   columns and 128 tokens; so only dy is rounded. The tokens, int8 already, are the
   bytes of the tiles. The kernels are those of every other product. */
#include "kernels_core.h"

#include <stdlib.h>
#include <string.h>

/* Columns that one item of work quantises. */
enum { ITEM_COLUMNS = 4 * LEFT_ROWS };
/* Groups of four tokens that one item of work packs. */
enum { ITEM_K4 = 16 };
/* Below this many elements a second thread doesn't pay. */
enum { MIN_SHARED = 1 << 16 };

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

/* One buffer waits between calls; others that are in use at once are freed. */
static void *kept;

struct header {
    size_t size;
    char gap[56];
};

void *take_scratch(size_t size)
{
    struct header *header = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQ_REL);
    if (header && header->size >= size)
        return header + 1;
    free(header);
    size = (size_t)up((ptrdiff_t)size, 4096) * 4096;
    header = aligned_alloc(64, sizeof *header + size);
    if (!header)
        return NULL;
    header->size = size;
    return header + 1;
}

void give_scratch(void *scratch)
{
    free(__atomic_exchange_n(&kept, (struct header *)scratch - 1, __ATOMIC_ACQ_REL));
}

struct packing {
    const int8_t *q;
    ptrdiff_t num_m, num_k;
    uint8_t *tiles;
};

/* What lies at the edges: columns of the last panel, or fewer than four tokens. */
static void pack_edge(const struct packing *job, ptrdiff_t k4, ptrdiff_t k,
                      uint8_t *tile)
{
    uint8_t rows[TILE_K][TILE_N] = {{0}};
    ptrdiff_t left = job->num_k - k, size = left < TILE_N ? left : TILE_N;
    for (ptrdiff_t row = 0; row < TILE_K && 4 * k4 + row < job->num_m; row++)
        memcpy(rows[row], job->q + (4 * k4 + row) * job->num_k + k, (size_t)size);
    active_loops()->interleave(rows[0], TILE_N, 1, 128, tile, 0);
}

static void pack_item(void *context, ptrdiff_t item)
{
    const struct packing *job = context;
    ptrdiff_t num_k4 = up(job->num_m, 4), end = (item + 1) * ITEM_K4;
    for (ptrdiff_t k4 = item * ITEM_K4; k4 < end && k4 < num_k4; k4++) {
        ptrdiff_t whole = 4 * k4 + 4 <= job->num_m ? job->num_k / TILE_N : 0;
        uint8_t *tiles = job->tiles + k4 * TILE_BYTES;
        active_loops()->interleave((const uint8_t *)job->q + 4 * k4 * job->num_k,
                                   job->num_k, whole, 128, tiles, num_k4 * TILE_BYTES);
        for (ptrdiff_t panel = whole; panel * TILE_N < job->num_k; panel++)
            pack_edge(job, k4, panel * TILE_N, tiles + panel * num_k4 * TILE_BYTES);
    }
}

static int useful(ptrdiff_t count, int threads) { return count < MIN_SHARED ? 1 : threads; }

void pack_tokens(const int8_t *q, ptrdiff_t num_m, ptrdiff_t num_k, uint8_t *tiles,
                 int threads)
{
    struct packing job = {q, num_m, num_k, tiles};
    run_parallel(pack_item, &job, up(up(num_m, 4), ITEM_K4),
                 useful(num_m * num_k, threads));
}

struct rounding {
    const float *dy, *token_scale;
    ptrdiff_t num_m, num_n, num_groups;
    int8_t *blocks;
    float *scale;
    int32_t *start;
    const struct rounded_rows *rows; /* may be NULL */
};

/* One group of tokens: the rows first, which brings them to L2, then the columns. */
static void round_item(void *context, ptrdiff_t g)
{
    const struct rounding *job = context;
    ptrdiff_t num_n = job->num_n, num_k4 = up(job->num_m, 4), m = g * TOKENS;
    ptrdiff_t tokens = job->num_m - m < TOKENS ? job->num_m - m : TOKENS;
    const float *dy = job->dy + m * num_n;
    if (job->rows)
        active_loops()->quantise_rows(dy, tokens, num_n, job->rows->group,
                                      job->rows->q + m * num_n,
                                      job->rows->scale + m * up(num_n, job->rows->group));
    for (ptrdiff_t n = 0; n < num_n; n += ITEM_COLUMNS)
        active_loops()->quantise_columns(
            dy + n, num_n, num_n - n < ITEM_COLUMNS ? num_n - n : ITEM_COLUMNS,
            job->token_scale + m, tokens,
            job->blocks + (n / LEFT_ROWS * num_k4 + m / 4) * LEFT_BYTES,
            num_k4 * LEFT_BYTES, job->scale + n * job->num_groups + g,
            job->start + n * job->num_groups + g, job->num_groups);
}

int weight_gradient(const float *dy, const float *token_scale, const uint8_t *tiles,
                    ptrdiff_t num_m, ptrdiff_t num_n, ptrdiff_t num_k, float *out,
                    int accumulate, const struct rounded_rows *rows, int threads)
{
    ptrdiff_t num_groups = up(num_m, TOKENS), num_k4 = up(num_m, 4);
    ptrdiff_t size = up(num_n, LEFT_ROWS) * num_k4 * LEFT_BYTES;
    int8_t *blocks = take_scratch((size_t)(size + 8 * num_n * num_groups));
    if (!blocks)
        return NO_MEMORY;
    float *scale = (float *)(blocks + size);
    int32_t *start = (int32_t *)(scale + num_n * num_groups);
    struct rounding job = {dy,     token_scale, num_m, num_n, num_groups,
                           blocks, scale,       start, rows};
    run_parallel(round_item, &job, num_groups, useful(num_m * num_n, threads));
    struct product p = {
        .q = blocks, .row_scale = scale, .row_start = start, .tiles = tiles, .out = out,
        .num_m = num_n, .num_n = num_k, .num_k4 = num_k4,
        .group_k4 = TOKENS / TILE_K, .num_groups = num_groups, .scale = 1.0f,
        .accumulate = accumulate, .in_blocks = 1, .any_byte = 1,
    };
    run_product(&p, threads);
    give_scratch(blocks);
    return OK;
}
