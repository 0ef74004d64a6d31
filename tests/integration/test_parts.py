"""Real processes: a worker that is told to stop in mid-task hands in what it has.

A proxy counts which tokens of the text were trained, whoever trained them.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from bitnet_ext.codecs import Codec
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.control import Seed
from tests.integration.fleet import (
    CoordinatorProcess,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)
from tests.integration.recorder import recording

#: Rounds that one task of the whole epoch does not outlast by its prediction alone.
SETTINGS = {"ROUND_S": 600, "EVALUATE_EVERY": 1000, "WARMUP_TOKENS": 0}
BATCH_TOKENS = 8 * 128
#: Far less than the whole task takes.
GRACE = {"BITNET_SHUTDOWN_SECONDS": "4"}


@pytest.mark.parametrize(
    ("kind", "codec"),
    [(RoundKind.DELTA, Codec.INT8), (RoundKind.GRADIENT, Codec.TERNARY)],
)
def test_told_to_stop_it_hands_in_its_steps_and_others_train_the_rest(
    tmp_path: Path, kind: RoundKind, codec: Codec
) -> None:
    manifest = make_corpus(tmp_path / "corpus", num_files=24, words=2000)
    epoch = sum(shard.num_tokens for shard in manifest.train_shards())
    chosen = {"ROUND_KIND": kind, "CODEC": codec, "TOKEN_BUDGET": epoch}
    with (
        coordinator(tmp_path, **SETTINGS, **chosen) as process,
        recording(process.port) as (url, seen),
    ):
        process.tell(Seed(tokens=epoch))
        with workers(tmp_path, url, "one", **GRACE) as (one,):
            wait_for("a step", lambda: tokens_done(process.status()))
            one.send_signal(signal.SIGTERM)
            assert one.wait(60.0) == 0
        ((tokens, num_steps),) = process.rows(
            "SELECT tokens, num_steps FROM submissions"
        )
        with workers(tmp_path, url, "two"):
            wait_for("the end of the run", lambda: is_over(process), timeout_s=240.0)
        tasks = process.rows("SELECT num_tokens FROM tasks WHERE kind = 'train'")

    assert 0 < tokens < epoch
    assert tokens == num_steps * BATCH_TOKENS
    for shard_id, count in seen.times_trained(manifest).items():
        assert (count == 1).all(), shard_id
    assert sum(num_tokens for (num_tokens,) in tasks) == epoch


def tokens_done(status: Any) -> int:
    return sum(worker["tokens_done"] or 0 for worker in status["workers"])


def is_over(process: CoordinatorProcess) -> bool:
    accepted, budget = process.rows("SELECT tokens_accepted, token_budget FROM runs")[0]
    return accepted == budget
