"""The text of a shard that a task needs, fetched by Range and checked.

A shard is int32 little-endian. What is needed is followed by one token more where
the shard has one: the target of the last input.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode
from worker.client import Download
from worker.errors import BadDownloadError, BadShardError, RefusedError
from worker.order import TOKEN_BYTES, text_window

_SHARD_IS_WRONG: Final = frozenset({ErrorCode.UNKNOWN_SHARD, ErrorCode.BAD_RANGE})

#: Latest windows that are kept: what is trained, and the held-out text.
KEPT: Final = 2


@dataclass(frozen=True, slots=True)
class _Window:
    """Tokens `first` to `end` of a shard, and the one after."""

    shard_sha256: str
    vocab_size: int
    first: int
    end: int
    tokens: NDArray[np.int32]


class TextCache:
    """The text of the latest tasks: one task after another lies in the same block.

    `fetch` fills a Download or raises; it does the retrying.
    """

    def __init__(self, fetch: Callable[[Download], None]) -> None:
        self._fetch = fetch
        self._kept: deque[_Window] = deque(maxlen=KEPT)

    def get(
        self, task: Task, vocab_size: int, on_bytes: Callable[[int], None]
    ) -> NDArray[np.int32]:
        """Return what `fetch_tokens` does, read-only; errors as there."""
        first, end = text_window(task)
        window = self._holding(task, vocab_size, first, end)
        if window is None:
            tokens = fetch_tokens(self._fetch, task, vocab_size, on_bytes)
            # Shared by all tasks of this window.
            tokens.flags.writeable = False
            window = _Window(task.shard_sha256, vocab_size, first, end, tokens)
        else:
            self._kept.remove(window)
        self._kept.append(window)
        follows = TOKEN_BYTES * end < task.shard_bytes
        return window.tokens[first - window.first : end - window.first + follows]

    def _holding(
        self, task: Task, vocab_size: int, first: int, end: int
    ) -> _Window | None:
        """Return the window that is kept and holds these tokens."""
        for window in self._kept:
            of = (window.shard_sha256, window.vocab_size)
            is_its = of == (task.shard_sha256, vocab_size)
            if is_its and window.first <= first and end <= window.end:
                return window
        return None


def fetch_tokens(
    fetch: Callable[[Download], None],
    task: Task,
    vocab_size: int,
    on_bytes: Callable[[int], None],
) -> NDArray[np.int32]:
    """Return the tokens of the task's `text_window`, int32 (n,) or (n + 1,).

    `fetch` fills a Download or raises; it does the retrying. Raises BadShardError
    when the stretch does not fit the shard, the coordinator serves text or other
    bytes than asked for, or an id lies outside the vocabulary.
    """
    first, end = text_window(task)
    follows = TOKEN_BYTES * end < task.shard_bytes
    window = bytearray(TOKEN_BYTES * (end - first + follows))
    try:
        fetch(
            Download(
                path=f"/corpus/{task.shard_id}",
                start=TOKEN_BYTES * first,
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


def _check_hash(window: bytearray, task: Task) -> None:
    """Check the shard's hash, where all of the shard is needed."""
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
