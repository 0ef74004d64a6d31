"""How many tokens a task gets, and how a stretch is divided; pure arithmetic."""

from __future__ import annotations

import hashlib
import math
from typing import Final

#: Local steps of the first task of a worker that nobody has measured yet.
PROBE_STEPS: Final = 4
#: A task claimed late in a round still gets this share of the round time.
MIN_ROUND_SHARE: Final = 0.3
#: A task holds at most so many times the tokens of the largest one that its worker
#: trained lately. A probe is too short to trust its speed, and a clock or a worker may
#: be wrong.
MAX_GROWTH: Final = 4
#: Given-back work that exceeds the claimer's size by this factor is divided.
DIVIDE_FACTOR: Final = 2


def task_tokens(
    tokens_per_s: float | None,
    *,
    seconds: float,
    batch_tokens: int,
    seq_len: int,
    largest: int | None = None,
) -> int:
    """Return the size of a task that should take `seconds` on this worker.

    A multiple of `seq_len`, at least one sequence. Without a measurement: a probe.
    `largest` is what the worker trained at most in one of its recent tasks.
    """
    if tokens_per_s is None:
        return PROBE_STEPS * batch_tokens
    num_sequences = round(tokens_per_s * seconds / seq_len)
    if largest is not None:
        num_sequences = min(num_sequences, MAX_GROWTH * largest // seq_len)
    return max(1, num_sequences) * seq_len


def predicted_s(
    num_tokens: int, tokens_per_s: float | None, *, fleet: float | None
) -> float | None:
    """Return how long a task should take by measured speed; None before any.

    A worker's own speed counts, else the mean of the `fleet`, in tokens per second.
    """
    speed = tokens_per_s or fleet
    return num_tokens / speed if speed else None


def step_s(tokens_per_s: float | None, *, batch_tokens: int) -> float | None:
    """Return how long a local step takes by measured speed; None before any."""
    return batch_tokens / tokens_per_s if tokens_per_s else None


def seconds_left(round_s: float, *, round_age_s: float) -> float:
    """Return how long a task claimed now may take, so that the round ends on time."""
    return max(round_s - round_age_s, MIN_ROUND_SHARE * round_s)


def cut(num_tokens: int, size: int) -> int:
    """Return how much of a stretch to take; a remnant under half a task goes along."""
    return num_tokens if num_tokens < size + size // 2 else size


def divided(num_tokens: int, size: int, *, quorum: float = 1.0) -> int:
    """Return the head that a claimer gets of given-back work of `num_tokens`.

    A round with a quorum would go on without whoever takes much more than its size.
    """
    factor = DIVIDE_FACTOR if quorum >= 1.0 else 1
    return size if num_tokens > factor * size else num_tokens


def num_steps(num_tokens: int, *, seq_len: int, batch_size: int) -> int:
    """Return the local steps of a task: batches of whole sequences, rounded up."""
    return math.ceil(math.ceil(num_tokens / seq_len) / batch_size)


def task_seed(run_seed: int, *, epoch: int, shard_id: str, start_token: int) -> int:
    """Return the seed of a stretch: a function of run, epoch and place alone."""
    text = f"{run_seed}\n{epoch}\n{shard_id}\n{start_token}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
