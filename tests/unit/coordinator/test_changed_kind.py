"""A run whose rounds become of the other kind: what goes on, and what starts anew."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from sqlalchemy import select

from bitnet_ext.frames import FrameKind, decode_frame
from bitnet_ext.layout import layout_hash, segments
from bitnet_ext.wire.verdicts import ErrorCode, RoundKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.guards import NUM_RECENT
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import step_sizes
from coordinator.domain.rollback import Rollback
from coordinator.service.closing import RoundCloser
from coordinator.service.pacing import recently_measured
from coordinator.service.rolling_back import ask_for_rollback
from coordinator.service.roster import plan_of
from coordinator.service.stepping import Closing, next_state
from coordinator.service.training import training_view
from coordinator.service.version_blobs import read_state, write_version
from coordinator.store import rounds, versions
from coordinator.store.blobs import BlobKind, Blobs, version_blob
from coordinator.store.system import OsFs
from coordinator.store.tables import submissions
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World, open_world
from tests.unit.coordinator.test_accept_late import STALE, next_round, out_of_touch
from tests.unit.coordinator.test_arrivals import ARRIVALS
from tests.unit.coordinator.test_replanning import ask, hashes, made_of, recorded

DELTA, GRADIENT = RoundKind.DELTA, RoundKind.GRADIENT
RATES = {DELTA: 0.002, GRADIENT: 0.02}
#: Durability calls of a version: two blobs of three parts each.
NUM_CALLS = 2 * 9


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=NUM_PARAMS).astype(np.float32)


def change(world: World, kind: RoundKind):
    return ask(world, round_kind=kind, learning_rate=RATES[kind])


def train(world: World, *kinds: RoundKind) -> None:
    """Make a version by a round of each of these kinds."""
    for kind in kinds:
        if plan_of(world.run_row()).round_kind is not kind:
            assert change(world, kind).at_once
        train_one(world)


def train_one(world: World) -> None:
    task = world.claimed()
    world.submit(task, value=noise(task.base_version))
    assert world.close_round()
    world.set_speed("w1", 64 / 60)


def go_back(world: World, to: int) -> int:
    world.do(ask_for_rollback(world.fleet, to))
    assert world.close_round()
    return world.live_round().base_version


def after_gradients(world: World, version: int, *, step: int, anew: bool = False):
    """Return the state that the gradient of a version leads to, by its own numbers."""
    base = world.state(version)
    zeros = np.zeros_like(base.weights)
    rows = world.read(lambda c: versions.versions_of(c, "r-1"))
    before, after = (rows[n].tokens_total for n in (version - 1, version))
    plan = recorded(world)[version - 1]
    sizes = step_sizes(plan, tokens_before=before, tokens=after - before, step=step)
    known = OptimiserState(
        weights=base.weights,
        momentum=zeros if anew else base.momentum,
        square=zeros if anew else base.square,
    )
    return gradient_step(known, noise(version), segments(SHAPE), sizes)


def assert_is(state, due) -> None:
    for name in ("weights", "momentum", "square"):
        np.testing.assert_array_equal(getattr(state, name), getattr(due, name))


@pytest.fixture
def running(world: World) -> World:
    world.start_run(msgspec.structs.replace(PLAN, warmup_tokens=16))
    world.register("w1")
    return world


def state_kind(world: World, version: int) -> FrameKind:
    data = world.fleet.blobs.read(BlobKind.STATE, version_blob(version))
    return decode_frame(data)[0].kind


# -- the optimiser of the coordinator ---------------------------------------------


def test_after_outer_steps_a_gradient_step_begins_with_no_moments_and_as_the_first(
    running: World,
):
    train(running, DELTA, DELTA, GRADIENT, GRADIENT)

    assert running.state(3).momentum.any()
    assert_is(running.state(4), after_gradients(running, 3, step=1, anew=True))
    assert_is(running.state(5), after_gradients(running, 4, step=2))
    assert [state_kind(running, n) for n in (3, 4)] == [
        FrameKind.SERVER_STATE,
        FrameKind.GRADIENT_STATE,
    ]


def test_after_gradient_steps_an_outer_step_begins_with_no_momentum(running: World):
    """The memory of the new state is one of gradients, whose squares go."""
    train(running, GRADIENT, GRADIENT, DELTA, DELTA)

    for version, momentum in ((3, np.zeros(NUM_PARAMS, np.float32)), (4, None)):
        base, after = running.state(version), running.state(version + 1)
        known = base.momentum if momentum is None else momentum
        np.testing.assert_array_equal(
            after.momentum, np.float32(0.8) * known + noise(version)
        )
        assert base.weights - after.weights == pytest.approx(
            0.9 * (0.8 * after.momentum + noise(version)), rel=1e-4, abs=1e-6
        )
        assert after.square is None
        assert state_kind(running, version + 1) is FrameKind.SERVER_STATE


def test_steps_are_counted_from_the_newest_change(running: World):
    train(running, GRADIENT, GRADIENT, DELTA, GRADIENT, GRADIENT, GRADIENT)

    assert_is(running.state(3), after_gradients(running, 2, step=2))
    assert_is(running.state(5), after_gradients(running, 4, step=1, anew=True))
    assert_is(running.state(7), after_gradients(running, 6, step=3))


def test_the_root_of_a_run_is_a_base_for_either_kind(running: World):
    train(running, GRADIENT)

    assert_is(running.state(2), after_gradients(running, 1, step=1, anew=True))


def test_a_run_that_goes_back_over_a_change_starts_anew_from_there(running: World):
    train(running, DELTA, DELTA, GRADIENT, GRADIENT)  # versions 2 to 5

    assert go_back(running, 3) == 6
    train(running, GRADIENT, GRADIENT)

    assert state_kind(running, 6) is FrameKind.SERVER_STATE
    assert_is(running.state(7), after_gradients(running, 6, step=1, anew=True))
    assert_is(running.state(8), after_gradients(running, 7, step=2))


def test_a_run_that_goes_back_to_a_state_of_its_kind_goes_on_with_it(running: World):
    train(running, GRADIENT, GRADIENT, DELTA, GRADIENT)  # versions 2 to 5

    assert go_back(running, 3) == 6
    train(running, GRADIENT)

    assert_is(running.state(7), after_gradients(running, 6, step=3))


def test_outer_steps_go_on_from_a_version_before_the_change(running: World):
    train(running, DELTA, DELTA, GRADIENT, DELTA)  # versions 2 to 5

    assert go_back(running, 3) == 6
    train(running, DELTA)

    np.testing.assert_array_equal(
        running.state(7).momentum,
        np.float32(0.8) * running.state(3).momentum + noise(6),
    )


# -- crashes and replays ----------------------------------------------------------


def with_change(folder: Path, kinds, ordinal: int | None) -> list[tuple[str, str]]:
    """Return the versions of rounds of these kinds; the last is the first of its kind.

    It is closed in one go by who has made all of them, or over a crash by another.
    """
    folder.mkdir()
    with open_world(folder) as world:
        world.start_run()
        world.register("w1")
        train(world, *kinds[:-1])
        assert change(world, kinds[-1]).at_once
        task = world.claimed()
        world.submit(task, value=noise(task.base_version))
        if ordinal is None:
            assert world.close_round()
        else:
            world.close_over_a_crash(ordinal)
        train_one(world)
        return hashes(world)


@pytest.mark.parametrize("before", [DELTA, GRADIENT])
def test_the_first_round_of_another_kind_is_closed_again_with_the_same_bytes(
    tmp_path: Path, before
):
    kinds = (before, before, GRADIENT if before is DELTA else DELTA)
    calm = with_change(tmp_path / "calm", kinds, None)

    for ordinal in (1, 5, 10, NUM_CALLS):
        assert with_change(tmp_path / f"{ordinal}", kinds, ordinal) == calm


def test_a_version_is_the_same_whether_the_change_waited_or_not(tmp_path: Path):
    found = []
    for waits in (False, True):
        folder = tmp_path / str(waits)
        folder.mkdir()
        with open_world(folder) as world:
            world.start_run()
            world.register("w1")
            task = world.claimed()
            if waits:
                assert not change(world, GRADIENT).at_once
            world.submit(task, value=noise(1))
            world.close_round()
            world.set_speed("w1", 64 / 60)
            train(world, GRADIENT)
            assert [one.round_kind for one in recorded(world)] == [DELTA, GRADIENT]
            found.append(hashes(world))
    assert found[0] == found[1]


def test_every_version_can_be_made_again_by_the_rows(running: World, tmp_path: Path):
    train(running, DELTA, GRADIENT, GRADIENT, DELTA, GRADIENT)  # versions 2 to 6
    go_back(running, 4)
    train(running, GRADIENT, DELTA)
    go_back(running, 3)
    train(running, DELTA, GRADIENT)

    rows = running.read(lambda c: versions.versions_of(c, "r-1"))
    blobs = Blobs(tmp_path / "again", OsFs(), running.rng)
    write_version(blobs, running.state(1), layout_hash(SHAPE))
    rollbacks: list[Rollback] = []
    for before, row in pairwise(rows):
        if row.rolled_back_to is not None:
            rollbacks.append(Rollback(row.version, row.rolled_back_to))
            state = read_state(blobs, row.rolled_back_to)
            state = dataclasses.replace(state, version=row.version)
        else:
            closing = closing_of(running, before, row, rollbacks)
            base = read_state(blobs, before.version)
            state = next_state(running.fleet.blobs, closing, base, None)
        made = write_version(blobs, state, layout_hash(SHAPE))
        assert made.state.sha256 == row.state_sha256, row.version
    assert len(rows) == 12


def closing_of(world: World, before, row, rollbacks) -> Closing:
    """Return a round by the rows up to its version."""
    merged = world.read(lambda c: made_of(c, row.version))
    run = msgspec.structs.replace(world.run_row(), plan_json=row.plan_json)
    kind = plan_of(run).round_kind
    others = world.read(lambda c: versions.of_other_kind(c, "r-1", kind))
    return Closing(
        run=run,
        live=world.read(lambda c: rounds.find_round(c, row.round_id)),
        submissions=merged,
        version=row.version,
        tokens_before=before.tokens_total,
        factors=[found.factor for found in merged],
        rollbacks=rollbacks,
        of_other_kind=others,
    )


def test_plans_from_before_there_were_kinds_are_of_delta_rounds(running: World):
    train(running, DELTA, GRADIENT, DELTA)
    running.write(
        lambda c: c.exec_driver_sql(
            "UPDATE versions SET plan_json = json_remove(plan_json, '$.round_kind') "
            "WHERE version = 2"
        )
    )

    def others(kind, since=0):
        return running.read(
            lambda c: versions.of_other_kind(c, "r-1", kind, since=since)
        )

    assert (others(DELTA), others(GRADIENT)) == ([3], [2, 4])
    assert others(GRADIENT, since=3) == [4]
    go_back(running, 3)  # made by no round, whatever its plan
    assert (others(DELTA), others(GRADIENT)) == ([3], [2, 4])


# -- who is out while the kind changes --------------------------------------------


@pytest.mark.parametrize(("back", "joins"), [(False, False), (True, True)])
def test_a_late_result_does_not_join_a_round_of_the_other_kind(
    world: World, back, joins
):
    late, other = out_of_touch(world, STALE)
    change(world, GRADIENT)
    next_round(world, other)
    if back:
        assert change(world, DELTA).at_once
    before = world.everything()

    if joins:
        assert world.submit(late, "w1").state == "accepted"
        return
    with pytest.raises(RefusedError) as caught:
        world.submit(late, "w1")

    assert caught.value.code is ErrorCode.LEASE_LOST
    after = world.everything()
    assert after["submissions"] == before["submissions"]
    assert after["runs"] == before["runs"]


def test_a_change_at_once_leaves_out_what_came_late_and_is_of_the_other_kind(
    world: World,
):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    world.submit(late, "w1")  # waits for something fresh
    assert world.run_row().tokens_accepted == 128

    assert change(world, GRADIENT).at_once

    assert world.run_row().tokens_accepted == 64
    query = select(submissions.c.state, submissions.c.reason).where(
        submissions.c.worker_id == "w1"
    )
    assert [tuple(row) for row in world.read(lambda c: c.execute(query).all())] == [
        ("filtered", "its round has become one of the other kind")
    ]
    task = world.claimed("w2")
    world.submit(task, "w2", noise(2))
    assert world.close_round()
    assert_is(world.state(3), after_gradients(world, 2, step=1, anew=True))


def test_any_other_change_at_once_leaves_a_late_result_in(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    world.submit(late, "w1")

    assert ask(world, outer_rate=0.1).at_once

    assert world.run_row().tokens_accepted == 128


def test_a_task_of_the_kind_before_ends_with_its_round(running: World):
    task = running.claimed()
    assert task.round_kind is DELTA
    change(running, GRADIENT)

    running.submit(task, value=noise(1))
    assert running.close_round()

    assert running.claimed().round_kind is GRADIENT
    assert [one.round_kind for one in recorded(running)] == [DELTA]


# -- what is compared with what was before -----------------------------------------


def test_sizes_of_the_other_kind_are_not_compared_with(running: World):
    train(running, *[DELTA] * 8)
    sizes = running.read(lambda c: recent(c, after=0))
    assert len(sizes) == 8
    assert change(running, GRADIENT).at_once

    # A thousand times the norm of what was before, and of gradients what is usual.
    task = running.claimed()
    running.submit(task, value=1000 * noise(9))
    assert running.close_round()

    query = select(submissions.c.factor).where(submissions.c.version == 10)
    assert running.read(lambda c: c.execute(query).scalar_one()) == 1.0


def test_since_the_change_sizes_are_compared_with(running: World):
    train(running, GRADIENT, *[DELTA] * 8)
    task = running.claimed()
    running.submit(task, value=1000 * noise(9))
    assert running.close_round()

    query = select(submissions.c.factor).where(submissions.c.version == 11)
    assert running.read(lambda c: c.execute(query).scalar_one()) < 0.1


def recent(connection, *, after: int) -> list[float]:
    return rounds.recent_sizes(connection, "r-1", after=after, newest=NUM_RECENT)


def test_the_round_time_goes_by_rounds_of_its_own_kind(running: World):
    train(running, DELTA, DELTA, GRADIENT)

    def measured():
        return running.read(lambda c: recently_measured(c, running.run_row()))

    assert len(measured()) == 1
    change(running, DELTA)
    assert len(measured()) == 2


def test_the_view_shows_local_steps_of_a_round_that_had_some(running: World):
    def view():
        return running.read(lambda c: training_view(c, running.run_row()))

    train(running, DELTA)
    change(running, GRADIENT)
    assert view().round_kind is GRADIENT
    assert view().last_round.num_steps == 4

    train(running, GRADIENT)
    change(running, DELTA)
    assert view().last_round.num_steps is None


def test_a_run_by_arrivals_stays_one_of_local_steps(world: World):
    world.start_run(ARRIVALS)

    with pytest.raises(RefusedError, match="round_kind must be delta with aggregation"):
        change(world, GRADIENT)


def test_a_new_process_goes_on_after_the_change(running: World):
    train(running, DELTA, GRADIENT)
    running.closer = RoundCloser(running.fleet)
    train(running, GRADIENT, DELTA)
    assert_is(running.state(4), after_gradients(running, 3, step=2))
    assert running.state(5).square is None
