"""The C kernels, as functions of contiguous arrays; they run without the GIL.

Callers go through `ternary`, `packing` and `codecs`. Here lengths are checked once
more, because a wrong one would read or write foreign memory. Statuses are returned.
"""

from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t


cdef extern from "kernels_core.h" nogil:
    cdef enum:
        TILE_N
        TILE_BYTES
        BLOCK

    cdef struct product:
        const int8_t *q
        const float *row_scale
        const uint8_t *tiles
        float *out
        Py_ssize_t num_m
        Py_ssize_t num_n
        Py_ssize_t num_k4
        Py_ssize_t group_k4
        Py_ssize_t num_groups
        float scale
        int accumulate

    cdef struct loops:
        void (*quantise_rows)(
            const float *, Py_ssize_t, Py_ssize_t, Py_ssize_t, int8_t *, float *
        ) noexcept nogil
        int (*encode_int8)(
            const float *, const float *, Py_ssize_t, uint8_t *, float *
        ) noexcept nogil
        int (*check_int8)(const uint8_t *, Py_ssize_t) noexcept nogil
        void (*add_int8)(const uint8_t *, Py_ssize_t, float, float *) noexcept nogil
        int (*check_fp32)(const uint8_t *, Py_ssize_t) noexcept nogil
        void (*add_fp32)(const uint8_t *, Py_ssize_t, float, float *) noexcept nogil
        void (*to_bf16)(const float *, Py_ssize_t, uint16_t *) noexcept nogil
        void (*from_bf16)(const uint16_t *, Py_ssize_t, float *) noexcept nogil
        int (*pack)(
            const int8_t *, Py_ssize_t, Py_ssize_t, uint8_t *
        ) noexcept nogil
        int (*unpack)(
            const uint8_t *, Py_ssize_t, Py_ssize_t, int8_t *
        ) noexcept nogil

    int isa_count()
    const char *isa_name(int index)
    int isa_supported(int index)
    int isa_active()
    void isa_select(int index)
    const loops *active_loops()
    int c_multiply "multiply"(product *p, int threads)
    void c_pack_tokens "pack_tokens"(
        const int8_t *q, Py_ssize_t num_m, Py_ssize_t num_k, uint8_t *tiles, int threads
    )
    int c_weight_gradient "weight_gradient"(
        const float *dy, const float *token_scale, const uint8_t *tiles,
        Py_ssize_t num_m, Py_ssize_t num_n, Py_ssize_t num_k, float *out,
        int accumulate, int threads
    )
    int c_quantise_weight "quantise_weight"(
        const float *w, Py_ssize_t num_n, Py_ssize_t num_k, float *scale,
        uint8_t *forward, uint8_t *backward
    )


def known_isas():
    """Return the names of all variants of this build, best last."""
    return [isa_name(i).decode() for i in range(isa_count())]


def supported_isas():
    """Return the names of the variants that this machine can run, best last."""
    return [isa_name(i).decode() for i in range(isa_count()) if isa_supported(i)]


def selected_isa():
    """Return the name of the variant that runs."""
    return isa_name(isa_active()).decode()


def select_isa(str name not None):
    """Run this variant from now on; raises ValueError where it can't."""
    for i in range(isa_count()):
        if isa_name(i).decode() == name and isa_supported(i):
            isa_select(i)
            return
    raise ValueError(f"no such variant on this machine: {name!r}")


cdef inline int _must(bint fits, str what) except -1:
    if not fits:
        raise ValueError(f"{what} has the wrong length")
    return 0


cdef inline Py_ssize_t _up(Py_ssize_t count, Py_ssize_t step) noexcept nogil:
    return (count + step - 1) // step


def multiply(
    const int8_t[:, ::1] q not None,
    const float[:, ::1] row_scale not None,
    Py_ssize_t group_k4,
    const uint8_t[::1] tiles not None,
    float scale,
    float[:, ::1] out not None,
    bint accumulate,
    int threads,
):
    """Write or add the product to `out` (M, N); q is (M, 4 * K4), scales (M, G)."""
    cdef product p
    cdef int status
    p.num_m, p.num_n = out.shape[0], out.shape[1]
    p.num_k4, p.group_k4, p.num_groups = q.shape[1] // 4, group_k4, row_scale.shape[1]
    _must(q.shape[1] % 4 == 0 and q.shape[0] == p.num_m, "q")
    _must(group_k4 > 0, "group")
    _must(
        row_scale.shape[0] == p.num_m and p.num_groups == _up(p.num_k4, group_k4),
        "scale",
    )
    _must(tiles.shape[0] == _up(p.num_n, TILE_N) * p.num_k4 * TILE_BYTES, "tiles")
    if p.num_m == 0 or p.num_n == 0 or p.num_k4 == 0:
        return 0
    p.q, p.row_scale, p.tiles = &q[0, 0], &row_scale[0, 0], &tiles[0]
    p.out, p.scale, p.accumulate = &out[0, 0], scale, accumulate
    with nogil:
        status = c_multiply(&p, threads)
    return status


def pack_tokens(const int8_t[:, ::1] q not None, uint8_t[::1] tiles not None, int threads):
    """Write tokens (M, K) as tiles (ceil(K / 32), ceil(M / 4), 32, 4)."""
    cdef Py_ssize_t num_m = q.shape[0]
    cdef Py_ssize_t num_k = q.shape[1]
    _must(tiles.shape[0] == _up(num_k, TILE_N) * _up(num_m, 4) * TILE_BYTES, "tiles")
    if num_m == 0 or num_k == 0:
        return
    with nogil:
        c_pack_tokens(&q[0, 0], num_m, num_k, &tiles[0], threads)


def weight_gradient(
    const float[:, ::1] dy not None,
    const float[::1] token_scale not None,
    const uint8_t[::1] tiles not None,
    float[:, ::1] into not None,
    bint accumulate,
    int threads,
):
    """Write or add the gradient to `into` (N, K), for dy (M, N); return the status."""
    cdef Py_ssize_t num_m = dy.shape[0]
    cdef Py_ssize_t num_n = into.shape[0]
    cdef Py_ssize_t num_k = into.shape[1]
    cdef int status
    _must(dy.shape[1] == num_n and token_scale.shape[0] == num_m, "dy")
    _must(tiles.shape[0] == _up(num_k, TILE_N) * _up(num_m, 4) * TILE_BYTES, "tiles")
    if num_m == 0 or num_n == 0 or num_k == 0:
        return 0
    with nogil:
        status = c_weight_gradient(
            &dy[0, 0], &token_scale[0], &tiles[0], num_m, num_n, num_k, &into[0, 0],
            accumulate, threads,
        )
    return status


def quantise_rows(
    const float[:, ::1] x not None,
    Py_ssize_t group,
    int8_t[:, ::1] q not None,
    float[:, ::1] scale not None,
):
    """Write int8 values (M, K) and scales (M, G)."""
    cdef Py_ssize_t num_m = x.shape[0]
    cdef Py_ssize_t num_k = x.shape[1]
    _must(q.shape[0] == num_m and q.shape[1] == num_k, "q")
    _must(group > 0, "group")
    _must(scale.shape[0] == num_m and scale.shape[1] == _up(num_k, group), "scale")
    if num_m == 0 or num_k == 0:
        return
    with nogil:
        active_loops().quantise_rows(
            &x[0, 0], num_m, num_k, group, &q[0, 0], &scale[0, 0]
        )


def quantise_weight(
    const float[:, ::1] w not None,
    uint8_t[::1] forward not None,
    uint8_t[::1] backward not None,
):
    """Write the tiles of w (N, K) and of its transpose; return (status, scale)."""
    cdef Py_ssize_t num_n = w.shape[0]
    cdef Py_ssize_t num_k = w.shape[1]
    cdef float scale = 0
    cdef int status
    _must(
        forward.shape[0] == _up(num_n, TILE_N) * _up(num_k, 4) * TILE_BYTES, "forward"
    )
    _must(
        backward.shape[0] == _up(num_k, TILE_N) * _up(num_n, 4) * TILE_BYTES, "backward"
    )
    if num_n == 0 or num_k == 0:
        return 0, 1e-5
    with nogil:
        status = c_quantise_weight(
            &w[0, 0], num_n, num_k, &scale, &forward[0], &backward[0]
        )
    return status, scale


def encode_int8(
    const float[::1] x not None,
    const float[::1] residual,
    uint8_t[::1] payload not None,
    float[::1] new_residual,
):
    """Write the payload and, where given, the new residual; return the status."""
    cdef Py_ssize_t count = x.shape[0]
    cdef const float *old = NULL
    cdef float *new = NULL
    cdef int status
    _must(payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    _must(residual is None or residual.shape[0] == count, "residual")
    _must(new_residual is None or new_residual.shape[0] == count, "new_residual")
    if count == 0:
        return 0
    if residual is not None:
        old = &residual[0]
    if new_residual is not None:
        new = &new_residual[0]
    with nogil:
        status = active_loops().encode_int8(&x[0], old, count, &payload[0], new)
    return status


def check_int8(const uint8_t[::1] payload not None, Py_ssize_t count):
    """Return the status of the int8 payload of `count` values."""
    cdef int status
    _must(count >= 0 and payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    if count == 0:
        return 0
    with nogil:
        status = active_loops().check_int8(&payload[0], count)
    return status


def add_int8(
    const uint8_t[::1] payload not None, float weight, float[::1] into not None
):
    """Add weight times the decoded values to `into`."""
    cdef Py_ssize_t count = into.shape[0]
    _must(payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    if count == 0:
        return
    with nogil:
        active_loops().add_int8(&payload[0], count, weight, &into[0])


def check_fp32(const uint8_t[::1] values not None):
    """Return the status of float32 values, given as bytes."""
    cdef int status
    _must(values.shape[0] % 4 == 0, "values")
    if values.shape[0] == 0:
        return 0
    with nogil:
        status = active_loops().check_fp32(&values[0], values.shape[0] // 4)
    return status


def add_fp32(
    const uint8_t[::1] values not None, float weight, float[::1] into not None
):
    """Add weight times the values, given as bytes, to `into`."""
    cdef Py_ssize_t count = into.shape[0]
    _must(values.shape[0] == 4 * count, "values")
    if count == 0:
        return
    with nogil:
        active_loops().add_fp32(&values[0], count, weight, &into[0])


def to_bf16(const float[::1] x not None, uint16_t[::1] out not None):
    """Write the bf16 bits of x."""
    _must(out.shape[0] == x.shape[0], "out")
    if x.shape[0] == 0:
        return
    with nogil:
        active_loops().to_bf16(&x[0], x.shape[0], &out[0])


def from_bf16(const uint16_t[::1] x not None, float[::1] out not None):
    """Write the floats of bf16 bits."""
    _must(out.shape[0] == x.shape[0], "out")
    if x.shape[0] == 0:
        return
    with nogil:
        active_loops().from_bf16(&x[0], x.shape[0], &out[0])


def pack(const int8_t[:, ::1] values not None, uint8_t[:, ::1] out not None):
    """Write 2-bit codes (N, ceil(K / 4)) of values (N, K); return the status."""
    cdef Py_ssize_t num_n = values.shape[0]
    cdef Py_ssize_t num_k = values.shape[1]
    cdef int status
    _must(out.shape[0] == num_n and out.shape[1] == _up(num_k, 4), "out")
    if num_n == 0 or num_k == 0:
        return 0
    with nogil:
        status = active_loops().pack(&values[0, 0], num_n, num_k, &out[0, 0])
    return status


def unpack(const uint8_t[:, ::1] codes not None, int8_t[:, ::1] out not None):
    """Write values (N, K) of 2-bit codes (N, ceil(K / 4)); return the status."""
    cdef Py_ssize_t num_n = out.shape[0]
    cdef Py_ssize_t num_k = out.shape[1]
    cdef int status
    _must(codes.shape[0] == num_n and codes.shape[1] == _up(num_k, 4), "codes")
    if num_n == 0 or num_k == 0:
        return 0
    with nogil:
        status = active_loops().unpack(&codes[0, 0], num_n, num_k, &out[0, 0])
    return status


cdef extern from "kernels_fused.h" nogil:
    cdef struct norm:
        const float *x
        const float *up
        const float *gain
        float *inverse
        Py_ssize_t num_m
        Py_ssize_t num_k
        float eps
        int gate

    cdef struct adamw:
        float *value
        float *mean
        float *square
        const float *grad
        float clip
        float keep
        float rate
        float root
        float beta1
        float beta2
        float eps

    int c_norm_quantise "norm_quantise"(
        norm *n, int8_t *q, float *scale, int threads
    )
    int c_norm_forward "norm_forward"(norm *n, float *y, int threads)
    int c_norm_backward "norm_backward"(
        const norm *n, const float *dy, float *dx, float *dup, int add, float *dgain,
        int threads
    )
    void c_rotate_rows "rotate_rows"(
        float *x, Py_ssize_t num_m, Py_ssize_t num_heads, Py_ssize_t half,
        const float *cosines, const float *sines, Py_ssize_t num_t, float sign,
        int threads
    )
    cdef enum:
        LOGITS_FP32
        LOGITS_BF16
        LOGITS_INT32

    cdef struct c_logits "logits":
        void *values
        const float *row_scale
        const float *column_scale
        Py_ssize_t num_m
        Py_ssize_t num_v
        int kind

    int c_softmax_backward "softmax_backward"(
        const c_logits *logits, const int64_t *targets, float scale, float *nats,
        int threads
    )
    int c_square_sum "square_sum"(
        const float *x, Py_ssize_t count, double *sum, int threads
    )
    void c_adamw_step "adamw_step"(const adamw *a, Py_ssize_t count, int threads)
    void c_add_rows "add_rows"(
        const float *x, const int64_t *ids, Py_ssize_t num_m, Py_ssize_t num_k,
        float *into
    )


cdef int _fill_norm(
    norm *n,
    const float[:, ::1] x,
    const float[:, ::1] up,
    const float[::1] gain,
    const float[::1] inverse,
    float eps,
    int gate,
) except -1:
    """Point at the arrays of a norm; they hold at least one number."""
    _must((gate == 0) == (up is None) and 0 <= gate <= 2, "gate")
    _must(gain.shape[0] == x.shape[1], "gain")
    _must(inverse.shape[0] == x.shape[0], "inverse")
    _must(
        up is None or (up.shape[0] == x.shape[0] and up.shape[1] == x.shape[1]), "up"
    )
    n.num_m, n.num_k, n.eps, n.gate = x.shape[0], x.shape[1], eps, gate
    n.x, n.gain, n.inverse = &x[0, 0], &gain[0], <float *>&inverse[0]
    n.up = NULL if up is None else &up[0, 0]
    return 0


def norm_quantise(
    const float[:, ::1] x not None,
    const float[:, ::1] up,
    const float[::1] gain not None,
    float eps,
    int gate,
    float[::1] inverse not None,
    int8_t[:, ::1] q not None,
    float[:, ::1] scale not None,
    int threads,
):
    """Write the int8 rows of a norm, their scales (M, 1) and `inverse`."""
    cdef norm n
    cdef int status
    _must(q.shape[0] == x.shape[0] and q.shape[1] == x.shape[1], "q")
    _must(scale.shape[0] == x.shape[0] and scale.shape[1] == 1, "scale")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return 0
    _fill_norm(&n, x, up, gain, inverse, eps, gate)
    with nogil:
        status = c_norm_quantise(&n, &q[0, 0], &scale[0, 0], threads)
    return status


def norm_forward(
    const float[:, ::1] x not None,
    const float[::1] gain not None,
    float eps,
    float[::1] inverse not None,
    float[:, ::1] y not None,
    int threads,
):
    """Write the rows of a norm and `inverse`."""
    cdef norm n
    cdef int status
    _must(y.shape[0] == x.shape[0] and y.shape[1] == x.shape[1], "y")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return 0
    _fill_norm(&n, x, None, gain, inverse, eps, 0)
    with nogil:
        status = c_norm_forward(&n, &y[0, 0], threads)
    return status


def norm_backward(
    const float[:, ::1] dy not None,
    const float[:, ::1] x not None,
    const float[:, ::1] up,
    const float[::1] gain not None,
    const float[::1] inverse not None,
    int gate,
    float[:, ::1] dx not None,
    float[:, ::1] dup,
    bint add,
    float[::1] dgain not None,
    int threads,
):
    """Write (or add) dx and write dup; add to dgain. They may be x and up."""
    cdef norm n
    cdef float *to_up = NULL
    cdef int status
    _must(dy.shape[0] == x.shape[0] and dy.shape[1] == x.shape[1], "dy")
    _must(dx.shape[0] == x.shape[0] and dx.shape[1] == x.shape[1], "dx")
    _must((dup is None) == (up is None), "dup")
    _must(
        dup is None or (dup.shape[0] == x.shape[0] and dup.shape[1] == x.shape[1]),
        "dup",
    )
    _must(dgain.shape[0] == x.shape[1], "dgain")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return 0
    _fill_norm(&n, x, up, gain, inverse, 0.0, gate)
    if dup is not None:
        to_up = &dup[0, 0]
    with nogil:
        status = c_norm_backward(
            &n, &dy[0, 0], &dx[0, 0], to_up, add, &dgain[0], threads
        )
    return status


def rotate_rows(
    float[:, ::1] x not None,
    const float[:, ::1] cosines not None,
    const float[:, ::1] sines not None,
    float sign,
    int threads,
):
    """Turn rows (M, heads * 2 * half) in place by angles (T, half), T by T rows."""
    cdef Py_ssize_t num_t = cosines.shape[0]
    cdef Py_ssize_t half = cosines.shape[1]
    _must(sines.shape[0] == num_t and sines.shape[1] == half, "sines")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    _must(num_t > 0 and half > 0 and x.shape[1] % (2 * half) == 0, "x")
    with nogil:
        c_rotate_rows(
            &x[0, 0], x.shape[0], x.shape[1] // (2 * half), half, &cosines[0, 0],
            &sines[0, 0], num_t, sign, threads
        )


def softmax_backward_fp32(
    float[:, ::1] logits not None,
    const int64_t[::1] targets not None,
    float scale,
    float[::1] nats not None,
    int threads,
):
    """Turn logits (M, V) into their gradient and write nats (M); return the status."""
    cdef c_logits which
    which.num_m, which.num_v, which.kind = logits.shape[0], logits.shape[1], LOGITS_FP32
    if which.num_m == 0 or which.num_v == 0:
        return 0
    which.values = &logits[0, 0]
    return _softmax(&which, targets, scale, nats, threads)


def softmax_backward_bf16(
    uint16_t[:, ::1] logits not None,
    const int64_t[::1] targets not None,
    float scale,
    float[::1] nats not None,
    int threads,
):
    """The same for the bits of bf16."""
    cdef c_logits which
    which.num_m, which.num_v, which.kind = logits.shape[0], logits.shape[1], LOGITS_BF16
    if which.num_m == 0 or which.num_v == 0:
        return 0
    which.values = &logits[0, 0]
    return _softmax(&which, targets, scale, nats, threads)


def softmax_backward_int32(
    int32_t[:, ::1] products not None,
    const float[::1] row_scale not None,
    const float[::1] column_scale not None,
    const int64_t[::1] targets not None,
    float scale,
    float[::1] nats not None,
    int threads,
):
    """The same for products of int8, whose memory holds float32 afterwards."""
    cdef c_logits which
    which.num_m, which.num_v = products.shape[0], products.shape[1]
    which.kind = LOGITS_INT32
    _must(row_scale.shape[0] == which.num_m, "row_scale")
    _must(column_scale.shape[0] == which.num_v, "column_scale")
    if which.num_m == 0 or which.num_v == 0:
        return 0
    which.values = &products[0, 0]
    which.row_scale, which.column_scale = &row_scale[0], &column_scale[0]
    return _softmax(&which, targets, scale, nats, threads)


cdef _softmax(
    const c_logits *logits,
    const int64_t[::1] targets,
    float scale,
    float[::1] nats,
    int threads,
):
    """Check lengths and targets, then run."""
    cdef Py_ssize_t m
    cdef int status
    _must(targets.shape[0] == logits.num_m, "targets")
    _must(nats.shape[0] == logits.num_m, "nats")
    for m in range(logits.num_m):
        if targets[m] >= logits.num_v:
            raise ValueError(f"targets must be below {logits.num_v}, got {targets[m]}")
    with nogil:
        status = c_softmax_backward(logits, &targets[0], scale, &nats[0], threads)
    return status


def square_sum(const float[::1] x not None, int threads):
    """Return the status and the sum of squares."""
    cdef double total = 0
    cdef int status
    if x.shape[0] == 0:
        return 0, 0.0
    with nogil:
        status = c_square_sum(&x[0], x.shape[0], &total, threads)
    return status, total


def adamw_step(
    float[::1] value not None,
    const float[::1] grad not None,
    float[::1] mean not None,
    float[::1] square not None,
    float clip,
    float keep,
    float rate,
    float root,
    float beta1,
    float beta2,
    float eps,
    int threads,
):
    """Update value, mean and square, all of one length."""
    cdef adamw a
    cdef Py_ssize_t count = value.shape[0]
    _must(grad.shape[0] == count, "grad")
    _must(mean.shape[0] == count and square.shape[0] == count, "moments")
    if count == 0:
        return
    a.value, a.mean, a.square, a.grad = &value[0], &mean[0], &square[0], &grad[0]
    a.clip, a.keep, a.rate, a.root = clip, keep, rate, root
    a.beta1, a.beta2, a.eps = beta1, beta2, eps
    with nogil:
        c_adamw_step(&a, count, threads)


def add_rows(
    const float[:, ::1] x not None,
    const int64_t[::1] ids not None,
    float[:, ::1] into not None,
):
    """Add row m of x to row ids[m] of `into`."""
    cdef Py_ssize_t m
    _must(ids.shape[0] == x.shape[0], "ids")
    _must(into.shape[1] == x.shape[1], "into")
    for m in range(ids.shape[0]):
        if not 0 <= ids[m] < into.shape[0]:
            raise ValueError(f"ids must be below {into.shape[0]}, got {ids[m]}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    with nogil:
        c_add_rows(&x[0, 0], &ids[0], x.shape[0], x.shape[1], &into[0, 0])
