# The head of a training step in int8; a part of _kernels.pyx.

cdef extern from "kernels_head.h" nogil:
    cdef struct head_table:
        const float *values
        const float *word_scale
        const int8_t *q
        const uint8_t *forward
        const uint8_t *backward
        Py_ssize_t num_v
        Py_ssize_t num_h

    cdef struct head_tokens:
        float *at_target
        float *scale
        int8_t *q
        int8_t *blocks
        float *word_scale
        int32_t *start
        Py_ssize_t num_m

    void c_pack_table "pack_table"(
        const head_table *table, float *word_scale, int8_t *q, uint8_t *forward,
        uint8_t *backward, int threads
    )
    int c_head_loss "head_loss"(
        const head_table *table, const float *hidden, const int64_t *targets,
        float scale, head_tokens *tokens, float *nats, float *dhidden, int threads
    )
    int c_head_table_gradient "head_table_gradient"(
        const head_tokens *tokens, const float *hidden, const int64_t *targets,
        Py_ssize_t num_v, Py_ssize_t num_h, float factor, float *into, int threads
    )


cdef class HeadTable:
    """Embeddings (V, H) and their int8 forms; keeps the arrays that it points at."""

    cdef head_table table
    cdef object kept

    def __init__(
        self,
        const float[:, ::1] values not None,
        float[::1] word_scale not None,
        int8_t[:, ::1] q not None,
        uint8_t[::1] forward not None,
        uint8_t[::1] backward not None,
        int threads,
    ):
        cdef Py_ssize_t num_v = values.shape[0]
        cdef Py_ssize_t num_h = values.shape[1]
        _must(num_v > 0 and num_h > 0, "table")
        _must(word_scale.shape[0] == num_v, "word_scale")
        _must(q.shape[0] == num_v and q.shape[1] == 4 * _up(num_h, 4), "q")
        _must(forward.shape[0] == _tile_bytes(num_v, num_h), "forward")
        _must(backward.shape[0] == _tile_bytes(num_h, num_v), "backward")
        self.kept = (values, word_scale, q, forward, backward)
        self.table.values, self.table.word_scale = &values[0, 0], &word_scale[0]
        self.table.q = &q[0, 0]
        self.table.forward, self.table.backward = &forward[0], &backward[0]
        self.table.num_v, self.table.num_h = num_v, num_h
        with nogil:
            c_pack_table(
                &self.table, &word_scale[0], &q[0, 0], &forward[0], &backward[0],
                threads
            )


cdef class HeadTokens:
    """What the gradient of a table needs of M tokens, one or more."""

    cdef head_tokens tokens
    cdef Py_ssize_t num_v, num_h
    cdef object kept

    def __init__(
        self,
        Py_ssize_t num_v,
        Py_ssize_t num_h,
        float[::1] at_target not None,
        float[::1] scale not None,
        int8_t[:, ::1] q not None,
        int8_t[::1] blocks not None,
        float[:, ::1] word_scale not None,
        int32_t[:, ::1] start not None,
    ):
        cdef Py_ssize_t num_m = q.shape[0]
        cdef Py_ssize_t num_groups = _up(num_m, TOKENS)
        _must(num_m > 0 and q.shape[1] == 4 * _up(num_h, 4) > 0, "q")
        _must(at_target.shape[0] == num_m and scale.shape[0] == num_m, "tokens")
        _must(
            num_v > 0
            and blocks.shape[0] == _up(num_v, LEFT_ROWS) * _up(num_m, 4) * LEFT_BYTES,
            "blocks",
        )
        _must(
            word_scale.shape[0] == num_v and word_scale.shape[1] == num_groups
            and start.shape[0] == num_v and start.shape[1] == num_groups,
            "scales",
        )
        self.kept = (at_target, scale, q, blocks, word_scale, start)
        self.tokens.at_target, self.tokens.scale = &at_target[0], &scale[0]
        self.tokens.q, self.tokens.blocks = &q[0, 0], &blocks[0]
        self.tokens.word_scale, self.tokens.start = &word_scale[0, 0], &start[0, 0]
        self.tokens.num_m, self.num_v, self.num_h = num_m, num_v, num_h


cdef inline Py_ssize_t _tile_bytes(Py_ssize_t rows, Py_ssize_t columns) noexcept nogil:
    return _up(rows, TILE_N) * _up(columns, 4) * TILE_BYTES


cdef int _check_tokens(
    const float[:, ::1] hidden, const int64_t[::1] targets,
    Py_ssize_t num_m, Py_ssize_t num_v, Py_ssize_t num_h,
) except -1:
    """Refuse rows of another length, and targets that are no words."""
    cdef Py_ssize_t m
    _must(hidden.shape[0] == num_m and hidden.shape[1] == num_h, "hidden")
    _must(targets.shape[0] == num_m, "targets")
    for m in range(num_m):
        if targets[m] >= num_v:
            raise ValueError(f"targets must be below {num_v}, got {targets[m]}")
    return 0


def head_loss(
    HeadTable table not None,
    HeadTokens tokens not None,
    const float[:, ::1] hidden not None,
    const int64_t[::1] targets not None,
    float scale,
    float[::1] nats not None,
    float[:, ::1] dhidden not None,
    int threads,
):
    """Write nats (M), dhidden (M, H) and the tokens; return the status."""
    cdef Py_ssize_t num_m = tokens.tokens.num_m
    cdef Py_ssize_t num_v = table.table.num_v
    cdef Py_ssize_t num_h = table.table.num_h
    cdef int status
    _must(tokens.num_v == num_v and tokens.num_h == num_h, "tokens")
    _check_tokens(hidden, targets, num_m, num_v, num_h)
    _must(nats.shape[0] == num_m, "nats")
    _must(dhidden.shape[0] == num_m and dhidden.shape[1] == num_h, "dhidden")
    with nogil:
        status = c_head_loss(
            &table.table, &hidden[0, 0], &targets[0], scale, &tokens.tokens, &nats[0],
            &dhidden[0, 0], threads
        )
    return status


def head_table_gradient(
    HeadTokens tokens not None,
    const float[:, ::1] hidden not None,
    const int64_t[::1] targets not None,
    float factor,
    float[:, ::1] into not None,
    int threads,
):
    """Add factor times the gradient of the table to `into`; return the status."""
    cdef Py_ssize_t num_v = tokens.num_v
    cdef Py_ssize_t num_h = tokens.num_h
    cdef int status
    _must(into.shape[0] == num_v and into.shape[1] == num_h, "into")
    _check_tokens(hidden, targets, tokens.tokens.num_m, num_v, num_h)
    with nogil:
        status = c_head_table_gradient(
            &tokens.tokens, &hidden[0, 0], &targets[0], num_v, num_h, factor,
            &into[0, 0], threads
        )
    return status
