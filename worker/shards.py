"""The stretch of a shard that a task is about, fetched by Range and checked.

A shard is int32 little-endian. The stretch is followed by one token more where
the shard has one: the target of the last input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode
from worker.client import Download
from worker.errors import BadDownloadError, BadShardError, RefusedError

TOKEN_BYTES: Final = 4
_SHARD_IS_WRONG: Final = frozenset({ErrorCode.UNKNOWN_SHARD, ErrorCode.BAD_RANGE})


def fetch_tokens(
    fetch: Callable[[Download], None],
    task: Task,
    vocab_size: int,
    on_bytes: Callable[[int], None],
) -> NDArray[np.int32]:
    """Return the tokens of the task's stretch, int32 (n,) or (n + 1,).

    `fetch` fills a Download or raises; it does the retrying. Raises BadShardError
    when the stretch does not fit the shard, the coordinator serves text or other
    bytes than asked for, or an id lies outside the vocabulary.
    """
    window = bytearray(_window_bytes(task))
    try:
        fetch(
            Download(
                path=f"/corpus/{task.shard_id}",
                start=task.byte_offset,
                total=task.shard_bytes,
                sha256=task.shard_sha256,
                into=memoryview(window),
                on_bytes=on_bytes,
            )
        )
    except BadDownloadError as error:
        raise BadShardError(f"shard {task.shard_id}: {error}") from error
    except RefusedError as error:
        if error.code in _SHARD_IS_WRONG:
            raise BadShardError(f"shard {task.shard_id}: {error}") from error
        raise
    _check_hash(window, task)
    return _tokens(window, task, vocab_size)


def _window_bytes(task: Task) -> int:
    """Return the length of the stretch and of the token after it, in bytes."""
    end = task.byte_offset + task.byte_length
    for field in ("byte_offset", "byte_length", "shard_bytes"):
        if getattr(task, field) % TOKEN_BYTES:
            raise BadShardError(
                f"shard {task.shard_id}: {field} must be a multiple of "
                f"{TOKEN_BYTES}, got {getattr(task, field)}"
            )
    if end > task.shard_bytes:
        raise BadShardError(
            f"shard {task.shard_id}: the stretch must end within its "
            f"{task.shard_bytes} bytes, got {end}"
        )
    return task.byte_length + (TOKEN_BYTES if end < task.shard_bytes else 0)


def _check_hash(window: bytearray, task: Task) -> None:
    """Check the shard's hash, where the stretch is the whole shard."""
    if len(window) != task.shard_bytes:
        return
    found = hashlib.sha256(window).hexdigest()
    if found != task.shard_sha256:
        raise BadShardError(
            f"shard {task.shard_id} must have SHA-256 {task.shard_sha256}, got {found}"
        )


def _tokens(window: bytearray, task: Task, vocab_size: int) -> NDArray[np.int32]:
    tokens = np.frombuffer(window, dtype="<i4").astype(np.int32, copy=False)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise BadShardError(
            f"shard {task.shard_id}: token ids must be from 0 to {vocab_size - 1}, "
            f"got {low if low < 0 else high}"
        )
    return tokens
