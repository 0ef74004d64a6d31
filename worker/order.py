"""The order in which an epoch trains the sequences of a shard: shuffled in blocks.

A block is `block_size` sequences that follow each other in the text. A task is a
stretch of the order, not of the text. So whatever part of it was trained first, what is
left is a stretch of the same order; any worker can go on with it, and nothing is
trained twice.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.wire.messages import Task
from worker.errors import BadShardError, TaskError

TOKEN_BYTES: Final = 4


def text_window(task: Task) -> tuple[int, int]:
    """Return first token and end of all the text that a task needs.

    In training that is every block it reaches into. An evaluation has no blocks: its
    stretch is one of the text. Raises BadShardError for a stretch beyond the shard.
    """
    first, end, shard_tokens = _stretch(task)
    block = task.block_size * task.seq_len
    if block:
        first, end = first // block * block, -(-end // block) * block
    return first, min(end, shard_tokens)


def sequence_starts(task: Task) -> NDArray[np.int64]:
    """Return the first token of each sequence of a task, int64, in the order to train.

    All have `seq_len` tokens, but for the last of a shard. Raises TaskError for a
    stretch that is not made of whole sequences.
    """
    first, end, shard_tokens = _stretch(task)
    ends_whole = end == shard_tokens or end % task.seq_len == 0
    if not task.block_size or first % task.seq_len or not ends_whole:
        raise TaskError(
            f"a task must be whole sequences of {task.seq_len} tokens in blocks, got "
            f"tokens {first} to {end}, block_size {task.block_size}"
        )
    places = np.arange(first // task.seq_len, -(-end // task.seq_len))
    blocks = range(places[0] // task.block_size, places[-1] // task.block_size + 1)
    order = np.concatenate([_block(task, block) for block in blocks])
    return task.seq_len * order[places - blocks.start * task.block_size]


def _block(task: Task, block: int) -> NDArray[np.int64]:
    """Return the sequences of a block, as numbers within the shard, in their order.

    A sequence that is shorter, at the end of the shard, goes last: so each place of
    the order has the length of that place in the text. Sorted are raw draws, because
    NumPy may change what `permutation` makes of them.
    """
    num_full, rest = divmod(task.shard_bytes // TOKEN_BYTES, task.seq_len)
    first = block * task.block_size
    count = min(task.block_size, num_full - first)
    draws = np.random.PCG64([task.seed, block]).random_raw(count)
    order = first + np.argsort(draws, kind="stable")
    is_last = rest and first + task.block_size > num_full
    return np.append(order, num_full) if is_last else order


def _stretch(task: Task) -> tuple[int, int, int]:
    """Return where a task begins and ends, and the length of its shard, in tokens."""
    for field in ("byte_offset", "byte_length", "shard_bytes"):
        if getattr(task, field) % TOKEN_BYTES:
            raise BadShardError(
                f"shard {task.shard_id}: {field} must be a multiple of "
                f"{TOKEN_BYTES}, got {getattr(task, field)}"
            )
    end = task.byte_offset + task.byte_length
    if end > task.shard_bytes:
        raise BadShardError(
            f"shard {task.shard_id}: the stretch must end within its "
            f"{task.shard_bytes} bytes, got {end}"
        )
    return (
        task.byte_offset // TOKEN_BYTES,
        end // TOKEN_BYTES,
        task.shard_bytes // TOKEN_BYTES,
    )
