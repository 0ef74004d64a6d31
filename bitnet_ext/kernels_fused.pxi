# What surrounds the products of a training step; a part of _kernels.pyx.

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
        float *grad
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
    cdef enum:
        LOGITS_FP32
        LOGITS_BF16

    cdef struct c_logits "logits":
        void *values
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
    float[::1] grad not None,
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
    """Update value, mean and square, all of one length; write zeros to grad."""
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
