/* Walks one token through the layers of a model, phase by phase.

   What is short runs on the leading thread alone; products are shared panel by panel,
   attention head by head. */
#include "kernels_decode.h"

#include "kernels_fused.h"
#include "kernels_gemv.h"
#include "kernels_team.h"

#include <math.h>
#include <string.h>

/* Width of the widest head. */
enum { MOST_D = 1024 };

typedef float v16 __attribute__((vector_size(64)));

#define LOOPS "kernels_decode_loops.h"
#include "kernels_levels.h"

/* Multiply-adds of one item: far above what it costs to take one. */
enum { ITEM_WORK = 1 << 16 };
/* Weights that read the same row. */
enum { MOST_READERS = 3 };

static ptrdiff_t up(ptrdiff_t count, ptrdiff_t step) { return (count + step - 1) / step; }

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

static const struct decode_loops *active_decode(void)
{
#if defined(__x86_64__)
    if (active_loops() == &loops_avx512)
        return &decode_avx512;
    if (active_loops() == &loops_avx2)
        return &decode_avx2;
#endif
    return &decode_portable;
}

/* What one token works in. */
struct room {
    float *x;            /* (H): the residual stream */
    float *row;          /* (max(H, F)): what a norm wrote */
    float *q, *k, *v;    /* (N * D), (K * D) twice */
    float *mixed;        /* (N * D) */
    float *gate, *open;  /* (F) twice */
    float *scores;       /* (K, score_step) */
    int8_t *rounded;     /* the row in int8, with zeros up to whole blocks */
    ptrdiff_t score_step;
};

static size_t lay_out(const struct decoder *d, struct room *r, float *at)
{
    ptrdiff_t widest = d->num_h > d->num_f ? d->num_h : d->num_f;
    ptrdiff_t num_kv = d->num_shared * d->num_d, used = 0;
    r->score_step = d->num_c + SIDE;
    float **parts[] = {&r->x,     &r->row,  &r->q,    &r->k,     &r->v,
                       &r->mixed, &r->gate, &r->open, &r->scores};
    ptrdiff_t sizes[] = {d->num_h, widest,   d->num_h, num_kv, num_kv,
                         d->num_h, d->num_f, d->num_f, d->num_shared * r->score_step};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i] = at + used;
        used += up(sizes[i], SIDE) * SIDE;
    }
    r->rounded = (int8_t *)(at + used);
    return (size_t)used * sizeof *at + (size_t)(up(widest, BLOCK_K) * BLOCK_K);
}

struct token {
    const struct decoder *decoder;
    const struct decode_loops *loops;
    const struct decoder_layer *layer;
    struct team *team;
    struct room room;
    int64_t id;
    ptrdiff_t position;
    const float *hidden; /* the final state, where it is known */
    float *logits;
    /* The row that products read. */
    ptrdiff_t num_k;
    float scale;
    int32_t start;
};

/* `row` as int8, with its scale and minus its sum. */
static void round_row(struct token *t, const float *row, ptrdiff_t num_k)
{
    int8_t *q = t->room.rounded;
    active_loops()->quantise_rows(row, 1, num_k, num_k, q, &t->scale);
    memset(q + num_k, 0, (size_t)(up(num_k, BLOCK_K) * BLOCK_K - num_k));
    active_loops()->row_starts(q, 1, num_k, num_k, &t->start);
    t->num_k = num_k;
}

/* RMSNorm of x, or of act(x) * up behind a gate; `y` is float32. */
static void norm(const struct token *t, const float *x, const float *up, int gate,
                 const float *gain, ptrdiff_t num_k, float *y)
{
    float inverse;
    struct norm n = {.x = x, .up = up, .gain = gain, .inverse = &inverse, .num_m = 1,
                     .num_k = num_k, .eps = t->decoder->eps, .gate = gate};
    active_fused()->norm_rows(&n, 0, 1, y);
}

static void norm_and_round(struct token *t, const float *x, const float *gain)
{
    norm(t, x, NULL, NO_GATE, gain, t->decoder->num_h, t->room.row);
    round_row(t, t->room.row, t->decoder->num_h);
}

/* A weight that reads the row, and where its product goes. */
struct reader {
    const struct packed *weight;
    float *out;
    ptrdiff_t first, item_panels; /* its first item; panels of an item */
};

struct products {
    const struct token *token;
    narrow_kernel *kernel;
    struct reader readers[MOST_READERS];
    int add; /* to what `out` holds */
};

static void multiply_panel(const struct products *job, const struct reader *reader,
                           ptrdiff_t n)
{
    const struct token *t = job->token;
    const struct packed *w = reader->weight;
    struct narrow p = {.num_m = 1, .num_n = w->num_n, .num_k = w->num_k,
                       .num_k16 = up(w->num_k, BLOCK_K), .padded = t->room.rounded};
    int32_t sums[PANEL_N];
    ptrdiff_t count = least(PANEL_N, w->num_n - n);
    job->kernel(&p, w->blocks + n / BLOCK_N * p.num_k16 * NARROW_BYTES,
                up(count, BLOCK_N), sums);
    float scale = t->scale * w->scale, *out = reader->out + n;
    for (ptrdiff_t i = 0; i < count; i++) {
        float part = (float)(sums[i] + t->start) * scale;
        out[i] = job->add ? out[i] + part : part;
    }
}

static void products_item(void *context, ptrdiff_t item)
{
    const struct products *job = context;
    const struct reader *reader = job->readers;
    while (reader + 1 < job->readers + MOST_READERS && reader[1].weight &&
           item >= reader[1].first)
        reader++;
    ptrdiff_t step = reader->item_panels * PANEL_N, n = (item - reader->first) * step;
    ptrdiff_t end = least(n + step, reader->weight->num_n);
    for (; n < end; n += PANEL_N)
        multiply_panel(job, reader, n);
}

/* The row times `count` weights from `which` on. */
static void multiply_row(struct token *t, enum layer_weight which, int count,
                         float *const *out, int add)
{
    struct products job = {.token = t, .kernel = active_narrow(), .add = add};
    ptrdiff_t items = 0, panels = 1 + ITEM_WORK / (PANEL_N * (t->num_k + 1));
    for (int i = 0; i < count; i++) {
        const struct packed *w = &t->layer->weights[which + i];
        job.readers[i] = (struct reader){w, out[i], items, panels};
        items += up(w->num_n, panels * PANEL_N);
    }
    share(t->team, products_item, &job, (uint32_t)items);
}

static void attend_item(void *context, ptrdiff_t shared)
{
    const struct token *t = context;
    const struct room *r = &t->room;
    t->loops->attend(t->decoder, t->layer, shared, t->position, r->q, r->k, r->v,
                     r->scores + shared * r->score_step, r->mixed);
}

static void run_layer(struct token *t)
{
    const struct decoder *d = t->decoder;
    const struct room *r = &t->room;
    const float *const *norms = t->layer->norms;
    norm_and_round(t, r->x, norms[ATTN_NORM]);
    multiply_row(t, W_Q, 3, (float *const[]){r->q, r->k, r->v}, 0);
    share(t->team, attend_item, t, (uint32_t)d->num_shared);
    norm_and_round(t, r->mixed, norms[ATTN_SUB_NORM]);
    multiply_row(t, W_O, 1, &r->x, 1);
    norm_and_round(t, r->x, norms[FFN_NORM]);
    multiply_row(t, W_GATE, 2, (float *const[]){r->gate, r->open}, 0);
    norm(t, r->gate, r->open, d->gate, norms[FFN_SUB_NORM], d->num_f, r->row);
    round_row(t, r->row, d->num_f);
    multiply_row(t, W_DOWN, 1, &r->x, 1);
}

static void words_item(void *context, ptrdiff_t item)
{
    const struct token *t = context;
    const struct decoder *d = t->decoder;
    ptrdiff_t num_k4 = up(d->num_h, TILE_K), step = 1 + ITEM_WORK / (TILE_BYTES * num_k4);
    ptrdiff_t v = item * step * TILE_N, count = least(step * TILE_N, d->num_v - v);
    int32_t start = 128 * t->start;
    struct product p = {.q = t->room.rounded, .row_scale = &t->scale, .row_start = &start,
                        .tiles = d->words + v / TILE_N * num_k4 * TILE_BYTES,
                        .out = t->logits + v, .num_m = 1, .num_n = count,
                        .num_k4 = num_k4, .group_k4 = num_k4, .num_groups = 1,
                        .scale = 1.0f, .any_byte = 1};
    run_product(&p, 1);
    for (ptrdiff_t i = v; i < v + count; i++)
        t->logits[i] *= d->word_scale[i];
}

static void lead(struct team *team, void *context)
{
    struct token *t = context;
    const struct decoder *d = t->decoder;
    t->team = team;
    if (!t->hidden) {
        memcpy(t->room.x, d->embeddings + t->id * d->num_h,
               (size_t)d->num_h * sizeof *t->room.x);
        for (ptrdiff_t i = 0; i < d->num_layers; i++) {
            t->layer = d->layers + i;
            run_layer(t);
        }
        norm(t, t->room.x, NULL, NO_GATE, d->final_norm, d->num_h, t->room.row);
        t->hidden = t->room.row;
    }
    round_row(t, t->hidden, d->num_h);
    ptrdiff_t num_k4 = up(d->num_h, TILE_K), step = 1 + ITEM_WORK / (TILE_BYTES * num_k4);
    share(team, words_item, t, (uint32_t)up(d->num_v, step * TILE_N));
}

static int run(struct token *t, int threads)
{
    float *space = take_scratch(lay_out(t->decoder, &t->room, NULL));
    if (!space)
        return NO_MEMORY;
    lay_out(t->decoder, &t->room, space);
    t->loops = active_decode();
    run_team(lead, t, threads);
    give_scratch(space);
    return OK;
}

int decode(const struct decoder *d, int64_t id, ptrdiff_t position, float *logits,
           int threads)
{
    struct token t = {.decoder = d, .id = id, .position = position, .logits = logits};
    return run(&t, threads);
}

int decode_head(const struct decoder *d, const float *hidden, float *logits, int threads)
{
    struct token t = {.decoder = d, .hidden = hidden, .logits = logits};
    return run(&t, threads);
}
