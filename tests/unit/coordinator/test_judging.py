"""Judged rounds: what is left out has no effect but on its worker."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.codecs import Codec
from bitnet_ext.wire.verdicts import RoundKind, Verdict
from coordinator.domain.errors import RefusedError
from coordinator.service.closing import RoundCloser
from coordinator.service.looking import look
from coordinator.service.starting import reconcile
from coordinator.service.tending import readmit_worker
from coordinator.store import rounds, runs, workers
from coordinator.store.tables import events, ranges, submissions
from tests.unit.coordinator.fleets import (
    NUM_PARAMS,
    PLAN,
    World,
    body,
    frame,
    open_world,
)

NAMES = ("w1", "w2", "w3", "w4")


def noise(seed):
    return np.random.default_rng(seed).normal(size=NUM_PARAMS)


def an_honest(seed):
    return (noise(0) + 0.5 * noise(seed)).astype(np.float32)


HONEST = {name: an_honest(seed) for seed, name in enumerate(NAMES, start=1)}
ZERO = np.zeros(NUM_PARAMS, dtype=np.float32)


def begun(world: World, plan=PLAN):
    world.start_run(plan)
    for name in NAMES:
        world.register(name)
    return world


@pytest.fixture
def four(world: World) -> World:
    return begun(world)


def handed_in(world: World, values, codec=Codec.FP32):
    """Let each worker train a small task; return the tokens of each."""
    for name in NAMES:
        world.set_speed(name, 0.5)
    held = {name: task for name in NAMES if (task := world.claim(name)) is not None}
    world.clock.advance(10.0)
    for name in NAMES:
        world.heartbeat(worker_id=name)
    for name, task in held.items():
        value = values.get(name, HONEST[name])
        sent = frame(task, value, codec=codec)
        world.send(body(world.meta(task, name), sent))
    return {name: task.byte_length // 4 for name, task in held.items()}


def rows(world: World):
    found = world.read(lambda c: list(c.execute(select(submissions))))
    return {row.worker_id: row for row in found}


def kinds_of_events(world: World):
    return [row.kind for row in world.read(lambda c: list(c.execute(select(events))))]


def view_of(world: World, worker_id):
    view = world.read(
        lambda c: look(
            c,
            world.fleet,
            now=world.clock.now(),
            loop_lag_ms=0.0,
            insecure_http=False,
            history=False,
        )
    )
    return next(w for w in view.workers if w.worker_id == worker_id)


@pytest.mark.parametrize("kind", list(RoundKind))
@pytest.mark.parametrize("codec", list(Codec))
@pytest.mark.parametrize("bad", [-5 * HONEST["w4"], ZERO, 1e6 * HONEST["w4"]])
def test_a_bad_submission_leaves_no_trace_in_the_weights(tmp_path, kind, codec, bad):
    plan = msgspec.structs.replace(PLAN, round_kind=kind, codec=codec)
    states = []
    for folder, is_asked in ((tmp_path / "a", True), (tmp_path / "b", False)):
        folder.mkdir()
        with open_world(folder) as world:
            begun(world, plan)
            if not is_asked:
                world.write(lambda c: workers.change_worker(c, "w4", draining=True))
            handed_in(world, {"w4": bad.astype(np.float32)}, codec)
            assert world.close_round()
            states.append(world.state(2))

    np.testing.assert_array_equal(states[0].weights, states[1].weights)
    np.testing.assert_array_equal(states[0].momentum, states[1].momentum)


def test_what_is_left_out_goes_back_to_a_range_and_is_counted_out(four: World):
    ranges = four.read(lambda c: runs.range_tokens(c, "r-1"))
    sent = handed_in(four, {"w2": -HONEST["w2"]})
    four.close_round()

    row = rows(four)["w2"]
    assert row.state == "filtered"
    assert "against the rest of its round" in row.reason
    assert row.cosine < -0.5
    kept = sum(sent.values()) - sent["w2"]
    assert four.run_row().tokens_accepted == kept
    assert four.read(lambda c: runs.range_tokens(c, "r-1")) == ranges - kept
    (point,) = [body for kind, body in four.told if kind == "version.published"]
    assert (point.tokens_total, point.num_submissions) == (kept, 3)
    assert "submission.filtered" in kinds_of_events(four)


def test_the_numbers_of_every_ruling_are_stored(four: World):
    handed_in(four, {"w3": 4 * HONEST["w3"]})
    four.close_round()

    found = rows(four)
    assert {row.state for row in found.values()} == {"applied"}
    assert found["w3"].norm == pytest.approx(4 * np.linalg.norm(HONEST["w3"]), 1e-6)
    assert found["w3"].factor == pytest.approx(0.5, rel=0.1)
    assert [found[name].factor for name in ("w1", "w2", "w4")] == [1.0] * 3
    assert all(row.cosine > 0.5 for row in found.values())
    sizes = four.read(lambda c: rounds.recent_sizes(c, "r-1", after=0, newest=32))
    assert sorted(sizes) == sorted(row.size for row in found.values())


def test_what_is_clipped_counts_for_its_factor_in_the_step(four: World):
    values = HONEST | {"w3": 4 * HONEST["w3"]}
    sent = handed_in(four, values)
    four.close_round()

    found, total = rows(four), sum(sent.values())
    mean = sum(sent[name] / total * found[name].factor * values[name] for name in NAMES)
    np.testing.assert_allclose(four.state(2).momentum, mean, rtol=1e-4, atol=1e-5)


def test_a_round_that_is_judged_again_after_a_crash_gives_the_same_bytes(
    tmp_path: Path,
):
    kept = []
    for folder, crashes in ((tmp_path / "a", False), (tmp_path / "b", True)):
        folder.mkdir()
        with open_world(folder) as world:
            begun(world)
            for _ in range(3):
                handed_in(world, {"w1": -2 * HONEST["w1"], "w3": 3 * HONEST["w3"]})
                if crashes:
                    reconcile(world.fleet)
                    world.closer = RoundCloser(world.fleet)
                world.close_round()
            kept.append({k: v for k, v in world.blobs().items() if "frame" not in k})

    assert kept[0] == kept[1]


def test_a_worker_that_keeps_failing_gets_no_more_work(four: World):
    for _ in range(4):
        handed_in(four, {"w4": -HONEST["w4"]})
        four.close_round()
    assert view_of(four, "w4").verdict != Verdict.QUARANTINED
    handed_in(four, {"w4": -HONEST["w4"]})
    four.close_round()

    assert four.claim("w4") is None
    assert four.claim("w1") is not None
    shown = view_of(four, "w4")
    assert shown.verdict == Verdict.QUARANTINED
    assert "5 of its last 5 left out" in shown.evidence
    assert "cosine -" in shown.evidence
    assert kinds_of_events(four).count("worker.quarantined") == 1


def test_an_operator_readmits_a_worker_and_its_past_is_forgotten(four: World):
    for _ in range(5):
        handed_in(four, {"w4": -HONEST["w4"]})
        four.close_round()

    four.do(readmit_worker(four.fleet, "w4"))

    assert view_of(four, "w4").verdict == Verdict.IDLE
    handed_in(four, {"w4": -HONEST["w4"]})
    four.close_round()
    assert four.worker("w4").quarantined_at is None
    assert "worker.readmitted" in kinds_of_events(four)


@pytest.mark.parametrize("worker_id", ["w1", "nobody"])
def test_only_a_quarantined_worker_can_be_readmitted(four: World, worker_id):
    with pytest.raises(RefusedError, match=worker_id):
        four.do(readmit_worker(four.fleet, worker_id))


def test_a_stretch_that_was_left_out_has_used_up_an_attempt(four: World):
    sizes = handed_in(four, {"w2": -HONEST["w2"]})
    four.close_round()

    found = four.read(lambda c: list(c.execute(select(ranges))))

    (back,) = [row for row in found if row.attempt]
    assert (back.num_tokens, back.attempt) == (sizes["w2"], 1)


def test_filtered_tokens_are_trained_once_by_somebody_in_the_end(four: World):
    handed_in(four, {"w2": -HONEST["w2"]})
    four.close_round()
    while four.run_row().epoch == 1:
        handed_in(four, {})
        four.close_round()

    assert four.epoch_tokens(1) == 1504
