"""How many tokens a task gets, and how a stretch is divided; pure arithmetic."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

#: Local steps of the first task of a worker that nobody has measured yet.
PROBE_STEPS: Final = 4
#: A task claimed late in a round still gets this share of the round time.
MIN_ROUND_SHARE: Final = 0.3
#: A task holds at most so many times the tokens of the largest one that its worker
#: trained lately: a clock or a worker may be wrong. One that was too large after all is
#: handed in as far as it came.
MAX_GROWTH: Final = 100
#: Sequences in a block of a shard, within which their order is shuffled. A worker
#: fetches whole blocks: half a megabyte, of 128 tokens a sequence.
BLOCK_SIZE: Final = 1024
#: A task is handed in as far as it is after so many times what it should take ...
STOP_FACTOR: Final = 1.25
#: ... and in good time before its lease ends for good.
STOP_SHARE: Final = 0.7
#: Given-back work goes to a worker for which it is between so much and so much of the
#: size that it should get ...
FITTING: Final = (0.8, 1.25)
#: ... for so many rounds, then to whoever claims.
MAX_WAIT_ROUNDS: Final = 3
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


def stop_after_s(
    *, meant_s: float, predicted_s: float | None, limit_s: float, fixed_size: bool
) -> float:
    """Return after how long a worker should hand in what it has trained so far.

    `meant_s` is how long a task cut now may take, `predicted_s` how long this one
    should by measured speed, and `limit_s` what is left of its lease at most. What an
    operator gave a fixed size is not cut short by the round, only by the limit.
    """
    most = STOP_SHARE * limit_s
    if fixed_size:
        return most
    return min(STOP_FACTOR * max(meant_s, predicted_s or 0.0), most)


def is_part(tokens: int, num_tokens: int, *, batch_tokens: int) -> bool:
    """Return whether so many tokens of a task may be handed in: all, or whole steps."""
    return tokens == num_tokens or (
        0 < tokens < num_tokens and tokens % batch_tokens == 0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenBack:
    """Work that came back untrained, or was made with a size that stays."""

    num_tokens: int
    #: Rounds since it came back; None: it is not to wait for anybody.
    num_rounds: int | None


def chosen(waiting: Sequence[GivenBack], size: int, *, quorum: float) -> int | None:
    """Return which piece goes to a claimer that should get `size` tokens; None: none.

    The oldest that has waited long enough, or is of about that size, by itself or
    divided. So hardly a round waits for a task that was cut for a faster worker, and
    hardly anybody idles for want of work, having had a crumb.
    """
    low, high = FITTING
    for place, piece in enumerate(waiting):
        head = divided(piece.num_tokens, size, quorum=quorum)
        is_due = piece.num_rounds is None or piece.num_rounds >= MAX_WAIT_ROUNDS
        if is_due or low * size <= head <= high * size:
            return place
    return None


def num_steps(num_tokens: int, *, seq_len: int, batch_size: int) -> int:
    """Return the local steps of a task: batches of whole sequences, rounded up."""
    return math.ceil(math.ceil(num_tokens / seq_len) / batch_size)


def order_seed(run_seed: int, *, epoch: int, shard_id: str) -> int:
    """Return the seed of the order in which an epoch trains a shard."""
    text = f"{run_seed}\n{epoch}\n{shard_id}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
