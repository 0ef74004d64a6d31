"""A plan that changes under real processes: nobody is refused, no byte is wrong."""

from __future__ import annotations

import json
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path

from bitnet_ext.codecs import Codec
from bitnet_ext.frames import FrameKind, decode_frame, frame_bytes
from bitnet_ext.layout import num_params
from coordinator.control import Seed, SetPlan
from coordinator.store.blobs import version_blob
from tests.integration.fleet import (
    CoordinatorProcess,
    Hand,
    coordinator,
    make_corpus,
    wait_for,
    workers,
)
from tests.integration.test_chain import Holder, train

SETTINGS = {"BROADCAST": "exact", "EVALUATE_EVERY": 1000, "HEARTBEAT_S": 60, "SEED": 7}


def test_each_version_comes_as_it_was_published_over_a_kill(tmp_path: Path) -> None:
    """What is downloaded has the SHA-256 of the task, or `hold` raises."""
    manifest = make_corpus(tmp_path / "corpus", num_files=12, words=300)
    asked = {1: "ternary", 3: "int8", 5: "exact"}
    with coordinator(tmp_path, **SETTINGS) as process:
        process.tell(Seed(tokens=1024))
        holder = Holder(Hand(process.url, manifest))
        hand = holder.hand
        hand.register()
        for version in range(1, 8):
            task = hand.claim_training()
            assert task.base_version == version
            holder.hold(task)
            if version in asked:
                said = process.tell(SetPlan(words={"broadcast": asked[version]}))
                assert said.startswith(f"from version {version + 1} on")
            train(hand, task, version)
            if version == 3:
                process.kill()
                process.start()
                hand.move_to(process.url)
            process.wait_for_version(version + 1)

    size = num_params(hand.shape)
    whole, ternary, int8 = (
        frame_bytes(codec, size) for codec in (Codec.FP32, Codec.TERNARY, Codec.INT8)
    )
    assert holder.fetched == [
        ("/weights/1", whole),
        ("/weights/2", whole),
        ("/weights/3?from=2", ternary),
        ("/weights/4?from=3", ternary),
        ("/weights/5?from=4", int8),
        ("/weights/6?from=5", int8),
        ("/weights/7", whole),
    ]


def test_a_worker_goes_on_by_another_codec_optimiser_and_batch(tmp_path: Path) -> None:
    """There and back; its moments and what its codec rounded away are kept."""
    make_corpus(tmp_path / "corpus", num_files=12, words=300)
    there = {
        "codec": "ternary",
        "broadcast": "ternary",
        "local_optimiser": "adamw",
        "batch_size": "4",
        "learning_rate": "0.001",
    }
    back = {
        "codec": "int8",
        "broadcast": "exact",
        "local_optimiser": "muon",
        "batch_size": "8",
        "learning_rate": "0.002",
    }
    with coordinator(tmp_path, **SETTINGS | {"ROUND_S": 1}) as process:
        process.tell(Seed())
        with workers(tmp_path, process.url, "one"):
            for words in (there, back):
                train_on(process)
                process.tell(SetPlan(words=words))
            train_on(process)
        made = process.rows(
            "SELECT submissions.codec, submissions.state, versions.plan_json FROM "
            "submissions JOIN versions ON versions.version = submissions.version "
            "ORDER BY submissions.version"
        )
        bad = process.rows(
            "SELECT kind, body_json FROM events WHERE kind IN ('submission.refused', "
            "'submission.filtered', 'lease.failed', 'lease.expired')"
        )

    assert bad == []
    codecs = [codec for codec, _, _ in made]
    assert [json.loads(plan)["codec"] for _, _, plan in made] == codecs
    assert {state for _, state, _ in made} == {"applied"}
    # One after another, and each of them for some rounds.
    assert [
        codec for n, codec in enumerate(codecs) if codecs[n - 1 : n] != [codec]
    ] == [
        "int8",
        "ternary",
        "int8",
    ]
    log = (tmp_path / "one.log").read_text()
    assert "cannot do this task" not in log
    assert "is of no use" not in log
    assert "work dropped" not in log


def test_a_run_goes_to_gradient_rounds_and_back_and_goes_on_learning(
    tmp_path: Path,
) -> None:
    """Killed after each change; 0.02 is too high for rounds as small as these."""
    make_corpus(tmp_path / "corpus", num_files=48, words=400)
    small = {"ROUND_S": 1, "WARMUP_TOKENS": 2000}
    settings = SETTINGS | small | {"CODEC": "ternary", "BROADCAST": "int8"}
    with coordinator(tmp_path, **settings) as process:
        process.tell(Seed())
        with workers(tmp_path, process.url, "one"):
            train_on(process)
            for kind, rate in (("gradient", "0.005"), ("delta", "0.002")):
                words = {"round_kind": kind, "learning_rate": rate}
                process.tell(SetPlan(words=words))
                train_on(process)
                process.kill()
                process.start_again()
                train_on(process)
        made = process.rows(
            "SELECT version, json_extract(plan_json, '$.round_kind'), train_loss "
            "FROM versions WHERE parent IS NOT NULL ORDER BY version"
        )
        filtered = process.rows("SELECT reason FROM submissions WHERE reason != ''")
        bad = process.rows(
            "SELECT kind, body_json FROM events WHERE kind IN ('submission.refused', "
            "'submission.filtered', 'round.filtered', 'round.stuck', 'lease.failed')"
        )

    assert (bad, filtered) == ([], [])
    stretches = [list(rows) for _, rows in groupby(made, key=itemgetter(1))]
    assert [rows[0][1] for rows in stretches] == ["delta", "gradient", "delta"]
    losses = [[loss for _, _, loss in rows] for rows in stretches]
    for before, after in pairwise(losses):
        assert min(after) < min(before), losses
    states = {"delta": FrameKind.SERVER_STATE, "gradient": FrameKind.GRADIENT_STATE}
    for version, kind, _ in made:
        name = version_blob(version)
        state, _ = decode_frame((process.data / "state" / name).read_bytes())
        link, _ = decode_frame((process.data / "link" / name).read_bytes())
        assert (state.kind, link.codec) == (states[kind], Codec.INT8)
    log = (tmp_path / "one.log").read_text()
    assert "cannot do this task" not in log
    assert "is of no use" not in log
    assert "work dropped" not in log


def train_on(process: CoordinatorProcess) -> None:
    """Wait until three versions more are made."""
    due = process.status()["run"]["newest_version"] + 3
    wait_for(
        f"version {due}",
        lambda: process.status()["run"]["newest_version"] >= due,
        timeout_s=120.0,
    )
