"""The head of a training step in int8: the door to its C kernels.

Logits are int8 tokens times an int8 table, with a scale for each token and word.
Their gradient goes back to both factors in int8 too, but for the entry of each
token's target, which stays float32: it stands a hundred times above the others and
would round them away. For the tokens the rest is rounded twice, the second time 254
times finer; for the table once, by word and 128 tokens. Softmax and loss are float32.

Results have the same bits on every CPU and for every number of threads. What is not
finite goes through visibly.

Letters in shapes: M tokens, H hidden, V words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.isa import kernels as _kernels
from bitnet_ext.memory import aligned
from bitnet_ext.ternary import TOKENS, tile_memory

Floats = NDArray[np.float32]

#: Words that share a scale in the gradient of the tokens.
WORDS = 256
#: Steps of its second rounding in one of the first.
FINER = 254
_LEFT_ROWS = 12


class Table:
    """The embeddings (V, H) as both products read them; made anew when they change."""

    def __init__(self, values_VH: Floats, *, threads: int = 1) -> None:
        num_words, num_hidden = values_VH.shape
        #: float32 (V, H); read again where targets are.
        self.values = values_VH
        self.packed = _kernels.HeadTable(
            values_VH,
            np.empty(num_words, dtype=np.float32),
            _rows(num_words, num_hidden),
            tile_memory(num_words, num_hidden),
            tile_memory(num_hidden, num_words),
            threads,
        )


@dataclass(frozen=True, slots=True)
class TableGradient:
    """The gradient of a table, in the factors it is made of."""

    _tokens: _kernels.HeadTokens
    _hidden_MH: Floats
    _targets_M: NDArray[np.int64]

    def add_to(self, into_VH: Floats, *, factor: float = 1.0, threads: int = 1) -> None:
        """Add `factor` times the gradient to float32 (V, H)."""
        _check(
            _kernels.head_table_gradient(
                self._tokens, self._hidden_MH, self._targets_M, factor, into_VH, threads
            )
        )


def loss(
    table: Table,
    hidden_MH: Floats,
    targets_M: NDArray[np.int64],
    scale: float,
    *,
    threads: int = 1,
) -> tuple[float, Floats, TableGradient]:
    """Return the summed cross-entropy in nats, and both gradients times `scale`.

    The gradient of the hidden states is float32 (M, H). A negative target takes no
    part. Raises ValueError for a target of V or more, or a `scale` below zero.
    """
    if not scale >= 0.0:
        raise ValueError(f"scale must be zero or more, got {scale}")
    nats_M = np.zeros(len(hidden_MH), dtype=np.float32)
    tokens = _tokens(len(hidden_MH), *table.values.shape)
    dhidden_MH = np.empty_like(hidden_MH)
    _check(
        _kernels.head_loss(
            table.packed,
            tokens,
            hidden_MH,
            targets_M,
            scale,
            nats_M,
            dhidden_MH,
            threads,
        )
    )
    gradient = TableGradient(tokens, hidden_MH, targets_M)
    return float(nats_M.sum(dtype=np.float64)), dhidden_MH, gradient


def _tokens(num_tokens: int, num_words: int, num_hidden: int) -> _kernels.HeadTokens:
    """Return memory for what the gradient of a table needs."""
    num_blocks = -(-num_words // _LEFT_ROWS) * -(-num_tokens // 4)
    groups = num_words, -(-num_tokens // TOKENS)
    return _kernels.HeadTokens(
        num_words,
        num_hidden,
        np.empty(num_tokens, dtype=np.float32),
        np.empty(num_tokens, dtype=np.float32),
        _rows(num_tokens, num_hidden),
        aligned(num_blocks * 4 * _LEFT_ROWS, np.int8),
        np.empty(groups, dtype=np.float32),
        np.empty(groups, dtype=np.int32),
    )


def _rows(num_rows: int, num_columns: int) -> NDArray[np.int8]:
    """Return memory for int8 rows of whole words of four."""
    width = 4 * -(-num_columns // 4)
    return aligned(num_rows * width, np.int8).reshape(num_rows, width)


def _check(status: int) -> None:
    if status:
        raise MemoryError("a kernel of the head found no memory for its rows")
