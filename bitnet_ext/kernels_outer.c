/* The coordinator's outer step, spread over threads in stretches of whole blocks. */
#include "kernels_codec.h"

enum { STRETCH = 16 * STEP_BLOCK };

static void step_stretch(void *context, ptrdiff_t item)
{
    struct outer *o = context;
    ptrdiff_t first = item * STRETCH, end = first + STRETCH;
    active_codecs()->outer_stretch(o, first, end < o->count ? end : o->count);
}

void outer_step(struct outer *o, int threads)
{
    o->status = OK;
    o->overflows = 0;
    run_parallel(step_stretch, o, (o->count + STRETCH - 1) / STRETCH, threads);
}
