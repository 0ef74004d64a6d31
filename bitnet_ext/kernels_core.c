/* Chooses the variants for this machine, and drives the kernels through a product. */
#include "kernels_codec.h"
#include "kernels_gemv.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct variant {
    const char *name;
    const struct loops *loops;
    const struct codecs *codecs;
    panel_kernel *panels;
    narrow_kernel *narrow;
    panel_kernel *any_byte, *no_negative; /* for tiles of any byte: see `struct product` */
};

/* Best last. */
static const struct variant variants[] = {
    {"portable", &loops_portable, &codecs_portable, panels_portable, narrow_portable, panels_portable,
     panels_portable},
#if defined(__x86_64__)
    {"avx2", &loops_avx2, &codecs_avx2, panels_avx2, narrow_avx2, panels_avx2_any,
     panels_avx2_positive},
    {"avxvnni", &loops_avx2, &codecs_avx2, panels_avxvnni, narrow_avx2, panels_avxvnni,
     panels_avxvnni},
    {"avx512vnni", &loops_avx512, &codecs_avx512, panels_avx512vnni, narrow_avx512vnni,
     panels_avx512vnni, panels_avx512vnni},
#endif
};

static int active = 0;

int isa_count(void) { return (int)(sizeof variants / sizeof *variants); }

const char *isa_name(int index) { return variants[index].name; }

int isa_supported(int index)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
    switch (index) {
    case 1:
        return avx2;
    case 2:
        return avx2 && __builtin_cpu_supports("avxvnni");
    case 3:
        return avx2 && __builtin_cpu_supports("avx512vnni") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
    }
#endif
    return index == 0;
}

int isa_active(void) { return __atomic_load_n(&active, __ATOMIC_RELAXED); }

void isa_select(int index) { __atomic_store_n(&active, index, __ATOMIC_RELAXED); }

const struct loops *active_loops(void) { return variants[isa_active()].loops; }

const struct codecs *active_codecs(void) { return variants[isa_active()].codecs; }

narrow_kernel *active_narrow(void) { return variants[isa_active()].narrow; }

/* Panels of one item of work: they stay in L2. Fewer where threads would have less than
   a few items each, and wait for each other's last. */
enum { ITEM_PANELS = 8, ITEMS_A_THREAD = 4 };
/* Waking a thread costs more than this many multiply-adds. */
#define MIN_PARALLEL 500000.0

struct job {
    const struct product *product;
    panel_kernel *panels;
    ptrdiff_t num_panels, item_panels, num_chunks;
};

static void multiply_item(void *context, ptrdiff_t item)
{
    const struct job *job = context;
    ptrdiff_t m = item / job->num_chunks * PRODUCT_ROWS;
    ptrdiff_t first = item % job->num_chunks * job->item_panels;
    ptrdiff_t end = first + job->item_panels, num_m = job->product->num_m - m;
    job->panels(job->product, m, num_m < PRODUCT_ROWS ? num_m : PRODUCT_ROWS, first,
                end < job->num_panels ? end : job->num_panels);
}

static panel_kernel *kernel_of(const struct product *p)
{
    const struct variant *variant = &variants[isa_active()];
    if (!p->any_byte)
        return variant->panels;
    return p->no_negative ? variant->no_negative : variant->any_byte;
}

void run_product(const struct product *p, int threads)
{
    ptrdiff_t num_blocks = (p->num_m + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
    struct job job = {p, kernel_of(p), (p->num_n + TILE_N - 1) / TILE_N, 2 * ITEM_PANELS, 0};
    do {
        job.item_panels /= 2;
        job.num_chunks = (job.num_panels + job.item_panels - 1) / job.item_panels;
    } while (job.item_panels > 1 && num_blocks * job.num_chunks < ITEMS_A_THREAD * threads);
    double work = 4.0 * (double)p->num_m * (double)p->num_n * (double)p->num_k4;
    run_parallel(multiply_item, &job, num_blocks * job.num_chunks,
                 work < MIN_PARALLEL ? 1 : threads);
}

int multiply(struct product *p, int threads)
{
    int32_t *starts = take_scratch((size_t)(p->num_m * p->num_groups) * sizeof *starts);
    if (!starts)
        return NO_MEMORY;
    active_loops()->row_starts(p->q, p->num_m, TILE_K * p->num_k4,
                               TILE_K * p->group_k4, starts);
    p->row_start = starts;
    p->in_blocks = p->any_byte = p->no_negative = 0;
    run_product(p, threads);
    give_scratch(starts);
    return OK;
}

static float absmean_scale(const float *w, ptrdiff_t count)
{
    double mean = count ? active_loops()->sum_of_sizes(w, count) / (double)count : 0.0;
    if (!isfinite(mean))
        return NAN;
    return (float)mean < 1e-5f ? 1e-5f : (float)mean;
}

/* Spreads 4 rows of codes (4, width), rows n..n+3, over both orientations. */
static void place_strip(const uint8_t *strip, ptrdiff_t n, ptrdiff_t num_k,
                        ptrdiff_t width, uint8_t *forward, uint8_t *backward,
                        ptrdiff_t num_n4)
{
    ptrdiff_t num_k4 = (num_k + 3) / 4;
    uint8_t *to = forward + n / TILE_N * num_k4 * TILE_BYTES + n % TILE_N * TILE_K;
    for (ptrdiff_t k4 = 0; k4 < num_k4; k4++)
        for (int row = 0; row < 4; row++)
            memcpy(to + k4 * TILE_BYTES + 4 * row, strip + row * width + 4 * k4, 4);
    if (n / 4 >= num_n4)
        return;
    active_loops()->interleave(strip, width, width / TILE_N, 0,
                               backward + n / 4 * TILE_BYTES, num_n4 * TILE_BYTES);
}

int quantise_weight(const float *w, ptrdiff_t num_n, ptrdiff_t num_k, float *scale,
                    uint8_t *forward, uint8_t *backward)
{
    ptrdiff_t width = (num_k + TILE_N - 1) / TILE_N * TILE_N;
    uint8_t *strip = calloc((size_t)width + 1, 4);
    if (!strip)
        return NO_MEMORY;
    *scale = absmean_scale(w, num_n * num_k);
    /* Past the last row stand codes of no meaning: there the products are dropped, or
       meet zeros of `q`. */
    for (ptrdiff_t n = 0; n < (num_n + TILE_N - 1) / TILE_N * TILE_N; n += 4) {
        for (ptrdiff_t row = n; row < num_n && row < n + 4; row++)
            active_loops()->ternary_strip(w + row * num_k, num_k, *scale / 2,
                                          strip + (row - n) * width);
        place_strip(strip, n, num_k, width, forward, backward, (num_n + 3) / 4);
    }
    free(strip);
    return OK;
}
