# One token at a time through a whole model; a part of _kernels.pyx.

from libc.stdlib cimport calloc, free


cdef extern from "kernels_decode.h" nogil:
    cdef enum:
        SIDE
        NUM_WEIGHTS
        NUM_NORMS

    cdef struct packed:
        const uint8_t *blocks
        Py_ssize_t num_n
        Py_ssize_t num_k
        float scale

    cdef struct decoder_layer:
        const float *norms[4]
        packed weights[7]
        float *keys
        float *values

    cdef struct decoder:
        const decoder_layer *layers
        const float *embeddings
        const float *final_norm
        const float *cosines
        const float *sines
        const uint8_t *words
        const float *word_scale
        Py_ssize_t num_layers
        Py_ssize_t num_h
        Py_ssize_t num_f
        Py_ssize_t num_v
        Py_ssize_t num_d
        Py_ssize_t num_heads
        Py_ssize_t num_shared
        Py_ssize_t num_c
        float eps
        int gate

    int c_decode "decode"(
        const decoder *d, int64_t id, Py_ssize_t position, float *logits, int threads
    )
    int c_decode_head "decode_head"(
        const decoder *d, const float *hidden, float *logits, int threads
    )


cdef class Decoder:
    """The arrays of a model that decodes; keeps those that it points at.

    `sizes` are F, D, N, K; `norms` (L, 4) and `weights` (L, 7) come in the order of the
    layout, a weight as (blocks, rows, columns, scale).
    """

    cdef decoder d
    cdef decoder_layer *layers
    cdef object kept

    def __cinit__(self):
        self.layers = NULL

    def __dealloc__(self):
        free(self.layers)

    def __init__(
        self,
        tuple sizes not None,
        const float[:, ::1] embeddings not None,
        tuple head not None,
        tuple angles not None,
        list norms not None,
        list weights not None,
        float[:, :, :, :, ::1] keys not None,
        float[:, :, :, ::1] values not None,
        float eps,
        int gate,
    ):
        cdef Py_ssize_t i
        d = &self.d
        d.num_v, d.num_h = embeddings.shape[0], embeddings.shape[1]
        d.num_f, d.num_d, d.num_heads, d.num_shared = sizes
        d.num_layers, d.num_c = values.shape[0], values.shape[2]
        d.eps, d.gate = eps, gate
        _must(d.num_v > 0 and d.num_f > 0 and d.num_layers > 0, "model")
        _must(0 < d.num_d <= 1024 and d.num_d % 2 == 0 and d.num_c % SIDE == 0, "head")
        _must(
            d.num_shared > 0 and d.num_heads % d.num_shared == 0
            and d.num_heads * d.num_d == d.num_h, "heads",
        )
        _must(
            values.shape[1] == d.num_shared and values.shape[3] == d.num_d
            and d.num_c > 0, "values",
        )
        _must(
            keys.shape[0] == d.num_layers and keys.shape[1] == d.num_shared
            and keys.shape[2] == d.num_c // SIDE and keys.shape[3] == d.num_d
            and keys.shape[4] == SIDE, "keys",
        )
        self._take_head(head, angles)
        _must(len(norms) == d.num_layers and len(weights) == d.num_layers, "layers")
        free(self.layers)
        self.layers = <decoder_layer *>calloc(d.num_layers, sizeof(decoder_layer))
        if self.layers == NULL:
            raise MemoryError("no memory for the layers of a decoder")
        for i in range(d.num_layers):
            self.layers[i].keys = &keys[i, 0, 0, 0, 0]
            self.layers[i].values = &values[i, 0, 0, 0]
            self._take_layer(&self.layers[i], norms[i], weights[i])
        d.layers, d.embeddings = self.layers, &embeddings[0, 0]
        self.kept = (embeddings, head, angles, norms, weights, keys, values)

    cdef int _take_head(self, tuple head, tuple angles) except -1:
        cdef const float[::1] final_norm = head[0]
        cdef const uint8_t[::1] words = head[1]
        cdef const float[::1] word_scale = head[2]
        cdef const float[:, ::1] cosines = angles[0]
        cdef const float[:, ::1] sines = angles[1]
        d = &self.d
        _must(final_norm.shape[0] == d.num_h, "final_norm")
        _must(words.shape[0] == _tile_bytes(d.num_v, d.num_h), "words")
        _must(word_scale.shape[0] == d.num_v, "word_scale")
        _must(
            cosines.shape[0] == d.num_c and 2 * cosines.shape[1] == d.num_d
            and sines.shape[0] == d.num_c and 2 * sines.shape[1] == d.num_d, "angles",
        )
        d.final_norm, d.words, d.word_scale = &final_norm[0], &words[0], &word_scale[0]
        d.cosines, d.sines = &cosines[0, 0], &sines[0, 0]
        return 0

    cdef int _take_layer(
        self, decoder_layer *layer, tuple norms, tuple weights
    ) except -1:
        cdef Py_ssize_t h = self.d.num_h
        cdef Py_ssize_t f = self.d.num_f
        cdef Py_ssize_t kv = self.d.num_shared * self.d.num_d
        cdef const float[::1] gain
        cdef int i
        _must(len(norms) == NUM_NORMS and len(weights) == NUM_WEIGHTS, "layer")
        for i, num_k in enumerate((h, h, h, f)):
            gain = norms[i]
            _must(gain.shape[0] == num_k, "norm")
            layer.norms[i] = &gain[0]
        shapes = ((h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f))
        for i, (num_n, num_k) in enumerate(shapes):
            _take_weight(&layer.weights[i], weights[i], num_n, num_k)
        return 0

    def step(
        self, int64_t token, Py_ssize_t position, float[::1] logits not None, int threads
    ):
        """Write the logits (V) after a token at a position; return the status."""
        cdef int status
        _must(0 <= token < self.d.num_v, "token")
        _must(0 <= position < self.d.num_c, "position")
        _must(logits.shape[0] == self.d.num_v, "logits")
        with nogil:
            status = c_decode(&self.d, token, position, &logits[0], threads)
        return status

    def head(
        self, const float[::1] hidden not None, float[::1] logits not None, int threads
    ):
        """Write the logits (V) of a final hidden state (H); return the status."""
        cdef int status
        _must(hidden.shape[0] == self.d.num_h, "hidden")
        _must(logits.shape[0] == self.d.num_v, "logits")
        with nogil:
            status = c_decode_head(&self.d, &hidden[0], &logits[0], threads)
        return status


cdef int _take_weight(
    packed *to, tuple weight, Py_ssize_t num_n, Py_ssize_t num_k
) except -1:
    cdef const uint8_t[::1] blocks = weight[0]
    _must(weight[1] == num_n and weight[2] == num_k <= NARROW_MOST_K, "weight")
    _must(blocks.shape[0] == _narrow_bytes(num_n, num_k), "blocks")
    to.blocks, to.num_n, to.num_k, to.scale = &blocks[0], num_n, num_k, weight[3]
    return 0
