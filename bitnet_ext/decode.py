"""Decoding: a text grows by one token at a time, each one call of the C kernels.

Weights are at 2 bits a value. Keys and values of earlier positions are kept as float32,
for as many positions as training sequences have: beyond, no position was ever trained.
The head is the int8 one of training. All else is as in `infer`: a token gets the same
bits on every CPU and for every number of threads.

Letters in shapes: T tokens, H hidden, V words, C positions, L layers, K heads of keys,
D width of a head.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.infer import (
    GATES,
    Floats,
    Ids,
    Layer,
    Model,
    check_ids,
    out_of_range,
    rotary_angles,
)
from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import aligned
from bitnet_ext.operands import PackedTernary, tiles_of
from bitnet_ext.ternary import quantise_rows

#: Positions whose keys lie side by side.
_SIDE: Final = 16

#: Blocks of 2 bits a value, rows, columns, scale.
_Weight = tuple[NDArray[np.uint8], int, int, float]


class Decoder:
    """A text, and what its next token needs of it.

    When the text is as long as a training sequence, it goes on with its last half,
    which is read again.
    """

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        shape = model.shape
        self._model, self._threads = model, threads
        self._ids: list[int] = []
        num_c = _SIDE * -(-shape.seq_len // _SIDE)
        sides = num_c // _SIDE
        heads = shape.num_layers, shape.num_kv_heads
        self._keys = _zeros(*heads, sides, shape.head_dim, _SIDE)
        self._values = _zeros(*heads, num_c, shape.head_dim)
        self._logits = aligned(shape.vocab_size, np.float32)
        words = quantise_rows(model.embeddings)
        tiles = tiles_of(words.q.view(np.uint8) ^ np.uint8(128), fill=128)
        self._kernel = _kernels.Decoder(
            (
                shape.intermediate_size,
                shape.head_dim,
                shape.num_heads,
                shape.num_kv_heads,
            ),
            model.embeddings,
            (model.final_norm, tiles, words.scale.reshape(-1)),
            rotary_angles(shape, num_c),
            [_norms(layer) for layer in model.layers],
            _weights(model.layers),
            self._keys,
            self._values,
            shape.rms_norm_eps,
            GATES[shape.hidden_act],
        )

    def feed(self, ids: Ids) -> Floats:
        """Add ids to the text; return the logits of what follows, float32 (V,).

        They are valid until the next call. The text is read as training reads it, of
        one that is too long the end. Raises ValueError for no ids or one out of range.
        """
        shape = self._model.shape
        self._ids += check_ids(ids, shape.vocab_size).tolist()
        return self._read(shape.seq_len)

    def clear(self) -> None:
        """Begin a new text."""
        self._ids.clear()

    def step(self, token: int) -> Floats:
        """Add one id to the text; as `feed`, and as fast as decoding is."""
        shape, position = self._model.shape, len(self._ids)
        if not 0 <= token < shape.vocab_size:
            raise out_of_range(token, shape.vocab_size)
        self._ids.append(token)
        if position == shape.seq_len:
            return self._read(max(1, shape.seq_len // 2))
        _check(self._kernel.step(token, position, self._logits, self._threads))
        return self._logits

    def _read(self, most: int) -> Floats:
        """Go on with at most so many of the last ids."""
        del self._ids[:-most]
        hidden_H = self._model.start(self._ids, self._keep, threads=self._threads)
        _check(self._kernel.head(hidden_H, self._logits, self._threads))
        return self._logits

    def _keep(self, number: int, keys: Floats, values: Floats) -> None:
        """Keep what a layer made of the whole text; both are float32 (T, K * D)."""
        _, num_heads, num_c, width = self._values.shape
        num_tokens = len(keys)
        heads = num_tokens, num_heads, width
        self._values[number, :, :num_tokens] = values.reshape(heads).swapaxes(0, 1)
        rows = np.zeros((num_c, num_heads, width), dtype=np.float32)
        rows[:num_tokens] = keys.reshape(heads)
        sides = rows.reshape(-1, _SIDE, num_heads, width)
        self._keys[number] = sides.transpose(2, 0, 3, 1)


def _norms(layer: Layer) -> tuple[Floats, ...]:
    return layer.attn_norm, layer.attn_sub_norm, layer.ffn_norm, layer.ffn_sub_norm


def _weights(layers: tuple[Layer, ...]) -> list[tuple[_Weight, ...]]:
    """Return the seven weights of each layer at 2 bits a value.

    They lie one behind the other in the order of their use: what is fetched ahead past
    the end of one is the beginning of the next.
    """
    linears = [
        (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
        for layer in layers
    ]
    rest = aligned(sum(w.narrow_bytes for seven in linears for w in seven), np.uint8)

    def packed(weight: PackedTernary) -> _Weight:
        nonlocal rest
        own, rest = rest[: weight.narrow_bytes], rest[weight.narrow_bytes :]
        weight.write_narrow(own)
        return own, weight.num_rows, weight.num_columns, weight.scale

    return [tuple(map(packed, seven)) for seven in linears]


def _zeros(*shape: int) -> Floats:
    memory = aligned(int(np.prod(shape)), np.float32)
    memory.fill(0)
    return memory.reshape(shape)


def _check(status: int) -> None:
    if status:
        raise MemoryError("decoding found no memory for a token")
