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
        LEFT_ROWS
        LEFT_BYTES
        TOKENS

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
    cdef struct rounded_rows:
        int8_t *q
        float *scale
        Py_ssize_t group

    int c_weight_gradient "weight_gradient"(
        const float *dy, const float *token_scale, const uint8_t *tiles,
        Py_ssize_t num_m, Py_ssize_t num_n, Py_ssize_t num_k, float *out,
        int accumulate, const rounded_rows *rows, int threads
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
    int8_t[:, ::1] q,
    float[:, ::1] scale,
    Py_ssize_t group,
    int threads,
):
    """Write or add the gradient to `into` (N, K), for dy (M, N); return the status.

    Where `q` (M, N) is given it gets the rows of dy, and `scale` (M, G) theirs.
    """
    cdef Py_ssize_t num_m = dy.shape[0]
    cdef Py_ssize_t num_n = into.shape[0]
    cdef Py_ssize_t num_k = into.shape[1]
    cdef rounded_rows rows
    cdef int status
    _must(dy.shape[1] == num_n and token_scale.shape[0] == num_m, "dy")
    _must(tiles.shape[0] == _up(num_k, TILE_N) * _up(num_m, 4) * TILE_BYTES, "tiles")
    if num_m == 0 or num_n == 0:
        return 0
    if q is not None:
        _must(group > 0, "group")
        _must(q.shape[0] == num_m and q.shape[1] == num_n, "q")
        _must(
            scale is not None and scale.shape[0] == num_m
            and scale.shape[1] == _up(num_n, group),
            "scale",
        )
        rows.q, rows.scale, rows.group = &q[0, 0], &scale[0, 0], group
    if num_k == 0:
        if q is not None:
            quantise_rows(dy, group, q, scale)
        return 0
    with nogil:
        status = c_weight_gradient(
            &dy[0, 0], &token_scale[0], &tiles[0], num_m, num_n, num_k, &into[0, 0],
            accumulate, NULL if q is None else &rows, threads,
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


# One extension, so that there is one pool of threads and one chosen variant.
include "kernels_fused.pxi"
include "kernels_head.pxi"
include "kernels_attention.pxi"
