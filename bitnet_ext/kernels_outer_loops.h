/* One stretch of the outer step, compiled once for each vector level.

   Included by `kernels_codec.c` after the codecs. Every number goes through the same
   float32 operations in the same order, whatever the level and the threads. */

/* New weights and momentum of a piece; returns the bits of the largest size. */
TARGET static inline __attribute__((always_inline)) int32_t
NAME(step_part)(const struct outer *o, const float *mean, const float *weights,
                const float *momentum, ptrdiff_t count, float *new_weights,
                float *new_momentum)
{
    float rate = o->rate, decay = o->decay;
    int32_t largest = 0;
    for (ptrdiff_t i = 0; i < count; i++) {
        float velocity = momentum[i] * decay + mean[i];
        float weight = weights[i] - (velocity * decay + mean[i]) * rate;
        int32_t bits = bits_of(velocity) & SIZE_MASK, size = bits_of(weight) & SIZE_MASK;
        bits = size > bits ? size : bits;
        largest = bits > largest ? bits : largest;
        new_momentum[i] = velocity;
        new_weights[i] = weight;
    }
    return largest;
}

/* Adds the parts of one block to `mean`; returns the first bad status. */
TARGET static int NAME(merge_block)(const struct outer *o, ptrdiff_t start,
                                    ptrdiff_t size, float *mean)
{
    int worst = OK;
    for (ptrdiff_t i = 0; i < o->num_parts; i++) {
        const struct part *part = &o->parts[i];
        int status;
        if (part->is_int8) {
            const uint8_t *scales = part->payload + 4 * (start / BLOCK);
            const int8_t *q = (const int8_t *)part->payload +
                              4 * ((o->count + BLOCK - 1) / BLOCK) + start;
            status = NAME(check_int8)(scales, q, size);
            NAME(add_int8)(scales, q, size, part->share, mean);
        } else {
            status = NAME(check_fp32)(part->payload + 4 * start, size);
            NAME(add_fp32)(part->payload + 4 * start, size, part->share, mean);
        }
        worst = worst ? worst : status;
    }
    return worst;
}

TARGET static void NAME(outer_stretch)(struct outer *o, ptrdiff_t first, ptrdiff_t end)
{
    struct sink weights, momentum;
    float mean[STEP_BLOCK];
    int32_t largest = 0;
    int status = OK;
    sink_open(&weights, o->new_weights + first, sizeof(float) * (size_t)o->count);
    sink_open(&momentum, o->new_momentum + first, sizeof(float) * (size_t)o->count);
    for (ptrdiff_t start = first; start < end; start += STEP_BLOCK) {
        ptrdiff_t size = end - start < STEP_BLOCK ? end - start : STEP_BLOCK;
        if (o->mean)
            memcpy(mean, o->mean + start, sizeof(float) * (size_t)size);
        else
            memset(mean, 0, sizeof mean);
        int here = NAME(merge_block)(o, start, size, mean);
        status = status ? status : here;
        for (ptrdiff_t i = 0; i < size; i += BLOCK) {
            ptrdiff_t left = size - i < BLOCK ? size - i : BLOCK;
            const float *old = o->weights + start + i, *slow = o->momentum + start + i;
            NAME(fetch)(&weights, old, sizeof(float) * BLOCK);
            NAME(fetch)(&momentum, slow, sizeof(float) * BLOCK);
            int32_t bits = NAME(step_part)(o, mean + i, old, slow, left,
                                           sink_at(&weights), sink_at(&momentum));
            largest = bits > largest ? bits : largest;
            NAME(sink_move)(&weights, sizeof(float) * (size_t)left);
            NAME(sink_move)(&momentum, sizeof(float) * (size_t)left);
        }
    }
    NAME(sink_close)(&weights);
    NAME(sink_close)(&momentum);
    if (status)
        __atomic_store_n(&o->status, status, __ATOMIC_RELAXED);
    if (largest >= INFINITE)
        __atomic_store_n(&o->overflows, 1, __ATOMIC_RELAXED);
}

const struct codecs NAME(codecs) = {
    NAME(encode_int8), NAME(decode_int8), NAME(check_int8), NAME(add_int8),
    NAME(check_fp32),  NAME(add_fp32),    NAME(to_fp16),    NAME(from_fp16),
    NAME(pack2),       NAME(unpack2),     NAME(pack3),      NAME(unpack3),
    NAME(outer_stretch), NAME(dot),
};
