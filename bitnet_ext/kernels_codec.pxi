# Payloads and their products, conversions, packings, the outer step; a part of _kernels.pyx.

cdef extern from "kernels_codec.h" nogil:
    cdef enum:
        BLOCK

    cdef struct codecs:
        int (*encode_int8)(
            const float *, const float *, const float *, Py_ssize_t, uint8_t *, float *
        ) noexcept nogil
        int (*decode_int8)(const uint8_t *, Py_ssize_t, float *) noexcept nogil
        int (*check_int8)(const uint8_t *, const int8_t *, Py_ssize_t) noexcept nogil
        void (*add_int8)(
            const uint8_t *, const int8_t *, Py_ssize_t, float, float *
        ) noexcept nogil
        int (*check_fp32)(const uint8_t *, Py_ssize_t) noexcept nogil
        void (*add_fp32)(const uint8_t *, Py_ssize_t, float, float *) noexcept nogil
        int (*to_fp16)(const float *, Py_ssize_t, uint16_t *) noexcept nogil
        int (*from_fp16)(const uint16_t *, Py_ssize_t, float *) noexcept nogil
        int (*pack2)(
            const int8_t *, Py_ssize_t, Py_ssize_t, uint8_t *
        ) noexcept nogil
        int (*unpack2)(
            const uint8_t *, Py_ssize_t, Py_ssize_t, int8_t *
        ) noexcept nogil
        int (*pack3)(const int8_t *, Py_ssize_t, uint8_t *) noexcept nogil
        int (*unpack3)(const uint8_t *, Py_ssize_t, int8_t *) noexcept nogil

    cdef struct part:
        const uint8_t *payload
        float share
        int is_int8

    cdef struct outer:
        const part *parts
        Py_ssize_t num_parts
        Py_ssize_t count
        const float *mean
        const float *weights
        const float *momentum
        float rate
        float decay
        float *new_weights
        float *new_momentum
        int status
        int overflows

    cdef enum:
        MOST_LARGE

    int c_encode_trits "encode_trits"(
        const float *, const float *, const float *, Py_ssize_t, uint8_t *, float *
    )
    int c_check_trits "check_trits"(const uint8_t *, Py_ssize_t)
    void c_add_trits "add_trits"(
        const uint8_t *, Py_ssize_t, Py_ssize_t, Py_ssize_t, float, float *
    )
    double c_dot_int8 "dot_int8"(const uint8_t *, Py_ssize_t, const float *)
    double c_dot_fp32 "dot_fp32"(const uint8_t *, Py_ssize_t, const float *)
    double c_dot_trits "dot_trits"(const uint8_t *, Py_ssize_t, const float *)
    const codecs *active_codecs()
    void c_outer_step "outer_step"(outer *o, int threads)

# Parts of one outer step; a caller with more adds the first ones up.
cdef enum:
    MOST_PARTS = 8


cdef inline const float *_or_null(const float[::1] x) noexcept:
    return NULL if x is None or x.shape[0] == 0 else &x[0]


def encode_int8(
    const float[::1] x not None,
    const float[::1] minus,
    const float[::1] residual,
    uint8_t[::1] payload not None,
    float[::1] lost,
):
    """Write the payload of x - minus + residual and what is lost; return the status."""
    cdef Py_ssize_t count = x.shape[0]
    cdef const float *less = _or_null(minus)
    cdef const float *more = _or_null(residual)
    cdef float *rest = NULL
    cdef int status
    _must(payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    _must(minus is None or minus.shape[0] == count, "minus")
    _must(residual is None or residual.shape[0] == count, "residual")
    _must(lost is None or lost.shape[0] == count, "lost")
    if count == 0:
        return 0
    if lost is not None:
        rest = &lost[0]
    with nogil:
        status = active_codecs().encode_int8(
            &x[0], less, more, count, &payload[0], rest
        )
    return status


def decode_int8(const uint8_t[::1] payload not None, float[::1] out not None):
    """Write the numbers of a payload; return the status."""
    cdef Py_ssize_t count = out.shape[0]
    cdef int status
    _must(payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    if count == 0:
        return 0
    with nogil:
        status = active_codecs().decode_int8(&payload[0], count, &out[0])
    return status


def check_int8(const uint8_t[::1] payload not None, Py_ssize_t count):
    """Return the status of the int8 payload of `count` values."""
    cdef int status
    cdef Py_ssize_t start = 4 * _up(count, BLOCK)
    _must(count >= 0 and payload.shape[0] == count + start, "payload")
    if count == 0:
        return 0
    with nogil:
        status = active_codecs().check_int8(
            &payload[0], <const int8_t *>&payload[start], count
        )
    return status


def add_int8(
    const uint8_t[::1] payload not None, float weight, float[::1] into not None
):
    """Add weight times the decoded values to `into`."""
    cdef Py_ssize_t count = into.shape[0]
    cdef Py_ssize_t start = 4 * _up(count, BLOCK)
    _must(payload.shape[0] == count + start, "payload")
    if count == 0:
        return
    with nogil:
        active_codecs().add_int8(
            &payload[0], <const int8_t *>&payload[start], count, weight, &into[0]
        )


def check_fp32(const uint8_t[::1] values not None):
    """Return the status of float32 values, given as bytes."""
    cdef int status
    _must(values.shape[0] % 4 == 0, "values")
    if values.shape[0] == 0:
        return 0
    with nogil:
        status = active_codecs().check_fp32(&values[0], values.shape[0] // 4)
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
        active_codecs().add_fp32(&values[0], count, weight, &into[0])


def to_half(const float[::1] x not None, uint16_t[::1] out not None, bint is_bf16):
    """Write x as bf16 or fp16; return the status of what was written."""
    cdef Py_ssize_t count = x.shape[0]
    cdef int status
    _must(out.shape[0] == count, "out")
    if count == 0:
        return 0
    with nogil:
        if is_bf16:
            status = active_loops().to_bf16(&x[0], count, &out[0])
        else:
            status = active_codecs().to_fp16(&x[0], count, &out[0])
    return status


def from_half(const uint16_t[::1] x not None, float[::1] out not None, bint is_bf16):
    """Write the floats of bf16 or fp16 bits; return their status."""
    cdef Py_ssize_t count = x.shape[0]
    cdef int status
    _must(out.shape[0] == count, "out")
    if count == 0:
        return 0
    with nogil:
        if is_bf16:
            status = active_loops().from_bf16(&x[0], count, &out[0])
        else:
            status = active_codecs().from_fp16(&x[0], count, &out[0])
    return status


def pack2(const int8_t[:, ::1] values not None, uint8_t[:, ::1] out not None):
    """Write 2-bit codes (N, ceil(K / 4)) of values (N, K); return the status."""
    cdef Py_ssize_t num_n = values.shape[0]
    cdef Py_ssize_t num_k = values.shape[1]
    cdef int status
    _must(out.shape[0] == num_n and out.shape[1] == _up(num_k, 4), "out")
    if num_n == 0 or num_k == 0:
        return 0
    with nogil:
        status = active_codecs().pack2(&values[0, 0], num_n, num_k, &out[0, 0])
    return status


def unpack2(const uint8_t[:, ::1] codes not None, int8_t[:, ::1] out not None):
    """Write values (N, K) of 2-bit codes (N, ceil(K / 4)); return the status."""
    cdef Py_ssize_t num_n = out.shape[0]
    cdef Py_ssize_t num_k = out.shape[1]
    cdef int status
    _must(codes.shape[0] == num_n and codes.shape[1] == _up(num_k, 4), "codes")
    if num_n == 0 or num_k == 0:
        return 0
    with nogil:
        status = active_codecs().unpack2(&codes[0, 0], num_n, num_k, &out[0, 0])
    return status


def pack3(const int8_t[::1] values not None, uint8_t[::1] out not None):
    """Write base-3 codes, five values a byte; return the status."""
    cdef Py_ssize_t count = values.shape[0]
    cdef int status
    _must(out.shape[0] == _up(count, 5), "out")
    if count == 0:
        return 0
    with nogil:
        status = active_codecs().pack3(&values[0], count, &out[0])
    return status


def unpack3(const uint8_t[::1] codes not None, int8_t[::1] out not None):
    """Write the values of base-3 codes; return the status."""
    cdef Py_ssize_t count = out.shape[0]
    cdef int status
    _must(codes.shape[0] == _up(count, 5), "codes")
    if count == 0:
        return 0
    with nogil:
        status = active_codecs().unpack3(&codes[0], count, &out[0])
    return status


def most_parts():
    """Return how many payloads one outer step takes."""
    return MOST_PARTS


def outer_step(
    list payloads not None,
    list are_int8 not None,
    const float[::1] shares not None,
    const float[::1] mean,
    tuple before not None,
    float rate,
    float decay,
    tuple after not None,
    int threads,
):
    """Write new weights and momentum; return the payloads' status and whether the
    new numbers overflow. `before` and `after` are weights and momentum."""
    cdef part parts[MOST_PARTS]
    cdef outer o
    cdef const uint8_t[::1] payload
    cdef const float[::1] weights = before[0]
    cdef const float[::1] momentum = before[1]
    cdef float[::1] new_weights = after[0]
    cdef float[::1] new_momentum = after[1]
    cdef Py_ssize_t count = weights.shape[0]
    cdef Py_ssize_t i
    _must(len(payloads) <= MOST_PARTS, "payloads")
    _must(len(are_int8) == len(payloads) == shares.shape[0], "shares")
    _must(mean is None or mean.shape[0] == count, "mean")
    _must(momentum.shape[0] == count, "momentum")
    _must(new_weights.shape[0] == count and new_momentum.shape[0] == count, "after")
    for i in range(len(payloads)):
        payload = payloads[i]
        parts[i].is_int8, parts[i].share = are_int8[i], shares[i]
        _must(
            payload.shape[0]
            == (count + 4 * _up(count, BLOCK) if parts[i].is_int8 else 4 * count),
            "payload",
        )
        parts[i].payload = NULL if count == 0 else &payload[0]
    if count == 0:
        return 0, False
    o.parts, o.num_parts, o.count = parts, len(payloads), count
    o.mean, o.weights, o.momentum = _or_null(mean), &weights[0], &momentum[0]
    o.rate, o.decay = rate, decay
    o.new_weights, o.new_momentum = &new_weights[0], &new_momentum[0]
    with nogil:
        c_outer_step(&o, threads)
    return o.status, o.overflows != 0


cdef inline Py_ssize_t _trits_bytes(Py_ssize_t count) noexcept:
    return (2 + MOST_LARGE // 8) * _up(count, BLOCK) + _up(count, 8)


def encode_trits(
    const float[::1] x not None,
    const float[::1] minus,
    const float[::1] residual,
    uint8_t[::1] payload not None,
    float[::1] lost,
):
    """Write the payload of x - minus + residual and what is lost; return the status."""
    cdef Py_ssize_t count = x.shape[0]
    cdef const float *less = _or_null(minus)
    cdef const float *more = _or_null(residual)
    cdef float *rest = NULL
    cdef int status
    _must(payload.shape[0] == _trits_bytes(count), "payload")
    _must(minus is None or minus.shape[0] == count, "minus")
    _must(residual is None or residual.shape[0] == count, "residual")
    _must(lost is None or lost.shape[0] == count, "lost")
    if count == 0:
        return 0
    if lost is not None:
        rest = &lost[0]
    with nogil:
        status = c_encode_trits(&x[0], less, more, count, &payload[0], rest)
    return status


def check_trits(const uint8_t[::1] payload not None, Py_ssize_t count):
    """Return the status of a payload of so many numbers."""
    cdef int status
    _must(count >= 0 and payload.shape[0] == _trits_bytes(count), "payload")
    if count == 0:
        return 0
    with nogil:
        status = c_check_trits(&payload[0], count)
    return status


def add_trits(
    const uint8_t[::1] payload not None, float weight, float[::1] into not None
):
    """Add weight times the numbers of a checked payload to `into`."""
    cdef Py_ssize_t count = into.shape[0]
    _must(payload.shape[0] == _trits_bytes(count), "payload")
    if count == 0:
        return
    with nogil:
        c_add_trits(&payload[0], count, 0, count, weight, &into[0])


def dot_int8(const uint8_t[::1] payload not None, const float[::1] vector not None):
    """Return the sum of products of a checked payload with a vector."""
    cdef Py_ssize_t count = vector.shape[0]
    cdef double total
    _must(payload.shape[0] == count + 4 * _up(count, BLOCK), "payload")
    if count == 0:
        return 0.0
    with nogil:
        total = c_dot_int8(&payload[0], count, &vector[0])
    return total


def dot_fp32(const uint8_t[::1] values not None, const float[::1] vector not None):
    """Return the sum of products of finite values, given as bytes, with a vector."""
    cdef Py_ssize_t count = vector.shape[0]
    cdef double total
    _must(values.shape[0] == 4 * count, "values")
    if count == 0:
        return 0.0
    with nogil:
        total = c_dot_fp32(&values[0], count, &vector[0])
    return total


def dot_trits(const uint8_t[::1] payload not None, const float[::1] vector not None):
    """Return the sum of products of a checked payload with a vector."""
    cdef Py_ssize_t count = vector.shape[0]
    cdef double total
    _must(payload.shape[0] == _trits_bytes(count), "payload")
    if count == 0:
        return 0.0
    with nogil:
        total = c_dot_trits(&payload[0], count, &vector[0])
    return total
