"""A run goes back: one version more, which is an earlier one again."""

from __future__ import annotations

import itertools
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from sqlalchemy import delete, select

from bitnet_ext.chain import add_links
from bitnet_ext.layout import layout_hash, segments
from bitnet_ext.wire.verdicts import RoundKind, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import AcceptLate, step_sizes
from coordinator.domain.rollback import RollBack, Rollback
from coordinator.service import rolling_back
from coordinator.service.broadcast import publication
from coordinator.service.exporting import Pick
from coordinator.service.own_files import look_after
from coordinator.service.rolling_back import ask_for_rollback
from coordinator.service.roster import plan_of
from coordinator.service.serving import open_weights
from coordinator.service.stepping import Closing, next_state
from coordinator.service.sweeping import _end_run
from coordinator.service.version_blobs import (
    Published,
    first_state,
    read_published,
    read_state,
    write_version,
)
from coordinator.store import rounds, versions
from coordinator.store.blobs import BlobKind, Blobs, version_blob
from coordinator.store.system import OsFs
from coordinator.store.tables import events, submissions
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World
from tests.unit.coordinator.test_looking import looked

EVERY = msgspec.structs.replace(PLAN, evaluate_every=1)
GRADIENTS = msgspec.structs.replace(
    EVERY, round_kind=RoundKind.GRADIENT, learning_rate=0.02, warmup_tokens=1000
)
LINKS = msgspec.structs.replace(EVERY, broadcast="ternary")
#: Nats of versions 1 to 5: the second is the best, and then they rise.
RISE = (190.0, 186.0, 192.0, 195.0, 193.0)
#: Durability calls of a blob of three parts.
BLOB_CALLS = 9
#: Those of a version without a link: the state has four parts.
NUM_CALLS = BLOB_CALLS + 10


@pytest.fixture
def watched(world: World) -> World:
    """A fleet that may go back by itself, with version 1 to score."""
    world.fleet.roll_back = RollBack.ALARM
    begin(world)
    return world


def begin(world: World, plan=EVERY, **run) -> None:
    world.start_run(plan, scored=True, **run)
    for name in ("w1", "w2"):
        world.register(name)


def noise(seed):
    return np.random.default_rng(seed).normal(size=NUM_PARAMS).astype(np.float32)


def score(world: World, nats: float) -> None:
    world.clock.advance(100.0)  # a score that has waited goes first
    task = world.claimed()
    assert task.kind == TaskKind.EVALUATE
    world.score(task, nats)


def train(world: World) -> None:
    world.set_speed("w1", 64 / 60)  # 64 tokens
    world.submit(world.claimed(), value=noise(world.live_round().round_id))
    assert world.close_round()


def rise(world: World, *nats: float) -> None:
    """Score the newest version, and train and score one more for each number."""
    for number, each in enumerate(nats):
        if number:
            train(world)
        score(world, each)


def told(world: World, kind: str):
    found = world.read(
        lambda c: list(
            c.scalars(select(events.c.body_json).where(events.c.kind == kind))
        )
    )
    return [msgspec.json.decode(one) for one in found]


def row(world: World, version: int):
    return world.read(lambda c: versions.find_version(c, version))


def published(world: World, version: int) -> bytes:
    return read_published(world.fleet.blobs, version).tobytes()


def assert_again(world: World, version: int, to: int) -> None:
    """A version has weights and optimiser of another, and workers get the same."""
    made, due = world.state(version), world.state(to)
    for name in ("weights", "momentum"):
        np.testing.assert_array_equal(getattr(made, name), getattr(due, name))
    if due.square is not None:
        np.testing.assert_array_equal(made.square, due.square)
    assert published(world, version) == published(world, to)
    assert row(world, version).rolled_back_to == to


def test_once_loss_has_risen_the_next_version_is_the_best_again(watched: World):
    rise(watched, *RISE)
    accepted = watched.run_row().tokens_accepted

    assert watched.close_round()

    assert_again(watched, 6, 2)
    made = row(watched, 6)
    assert (made.parent, made.round_id, made.num_submissions) == (5, None, 0)
    assert made.tokens_total == row(watched, 5).tokens_total == accepted
    assert watched.run_row().tokens_accepted == accepted
    assert watched.live_round().base_version == 6
    assert watched.run_row().roll_back_to is None
    kind, point = watched.told[-1]
    assert (kind, point.version, point.rolled_back_to) == ("version.published", 6, 2)
    assert not watched.close_round()


def test_nothing_goes_back_where_nobody_has_allowed_it(watched: World):
    watched.fleet.roll_back = RollBack.NEVER

    rise(watched, *RISE)

    assert looked(watched).run.loss_alarm
    assert watched.run_row().roll_back_to is None
    assert not watched.close_round()


def test_every_token_is_trained_once_over_a_rollback(watched: World):
    rise(watched, *RISE)
    watched.close_round()
    watched.set_speed("w1", 1000.0)

    while watched.run_row().epoch == 1:
        watched.submit(watched.claimed("w1"))
        watched.close_round()
        watched.set_speed("w1", 1000.0)

    rows = watched.read(lambda c: list(c.execute(select(submissions))))
    pieces = sorted((r.shard_id, r.start_token, r.tokens) for r in rows)
    for shard, size in (("train-00000", 1000), ("train-00001", 504)):
        at = 0
        for _, start, tokens in (p for p in pieces if p[0] == shard):
            assert start == at
            at += tokens
        assert at == size
    assert {r.state for r in rows} == {"applied"}


def test_what_is_out_comes_back_first_and_nothing_more_is_given_out(watched: World):
    rise(watched, *RISE[:-1])
    train(watched)
    watched.clock.advance(100.0)
    scoring = watched.claimed("w2")
    held = watched.claimed("w1")
    watched.score(scoring, RISE[-1], worker_id="w2")

    assert watched.run_row().roll_back_to == 2
    assert watched.claim("w2") is None
    assert not watched.close_round()
    watched.submit(held, "w1")
    assert watched.close_round()
    assert row(watched, 6).num_submissions == 1
    assert watched.close_round()
    assert_again(watched, 7, 2)
    assert watched.claimed("w1").base_version in (6, 7)


def test_the_story_is_told_with_losses_and_versions(watched: World):
    rise(watched, *RISE)
    pending = looked(watched).run.rollback
    watched.close_round()
    made = looked(watched).run.rollback

    due = {
        "from_version": 5,
        "from_loss": 193.0 / 93,
        "to_version": 2,
        "to_loss": 186.0 / 93,
    }
    at = watched.clock.now()
    assert msgspec.to_builtins(pending) == due | {"version": None, "at": None}
    assert msgspec.to_builtins(made) == due | {"version": 6, "at": at}
    (decided,) = told(watched, "rollback.decided")
    assert decided["reason"].startswith("The last 3 evaluations are 3.2 % or more")
    assert decided.items() >= due.items()
    assert told(watched, "rollback.made") == [due | {"version": 6, "at": at}]
    # One version is scored where it would be anyway, and the page is quiet again.
    assert looked(watched).run.loss_alarm is None
    score(watched, 186.0)
    assert looked(watched).run.rollback is not None
    train(watched)
    score(watched, 185.0)
    assert looked(watched).run.rollback is None


def test_a_run_goes_back_to_one_version_twice_at_most(watched: World):
    rise(watched, *RISE)
    for made, to in ((6, 2), (10, 6)):
        assert watched.close_round()
        assert_again(watched, made, to)
        rise(watched, 186.0, 192.0, 195.0, 193.0)

    assert watched.run_row().roll_back_to is None
    assert not watched.close_round()
    assert "gone back there 2 times already" in looked(watched).run.loss_alarm


def test_a_run_that_trains_no_more_stays_as_it_is(watched: World):
    rise(watched, *RISE[:-1])
    train(watched)
    watched.change_run(token_budget=watched.run_row().tokens_accepted)

    score(watched, RISE[-1])

    assert watched.run_row().roll_back_to is None


def test_a_run_does_not_end_between_decision_and_version(watched: World):
    rise(watched, *RISE)
    watched.change_run(stop_at=watched.clock.now())

    watched.do(_end_run(watched.fleet))
    assert watched.run_row().state == "running"
    watched.close_round()
    score(watched, 186.0)
    watched.do(_end_run(watched.fleet))

    assert watched.run_row().state == "finished"
    assert_again(watched, 6, 2)


# Before and after each blob; `test_closing` crashes at every call of the same writing.
@pytest.mark.parametrize("ordinal", [1, BLOB_CALLS, BLOB_CALLS + 1, NUM_CALLS])
def test_after_a_crash_there_is_the_old_state_and_then_the_same_bytes(
    running: World, ordinal
):
    train(running)
    by_hand(running, 1)

    running.close_over_a_crash(ordinal)

    assert_again(running, 3, 1)


def test_those_calls_are_all_there_are(running: World):
    train(running)
    by_hand(running, 1)
    before = len(running.fs.calls)

    running.close_round()

    assert len(running.fs.calls) - before == NUM_CALLS


def test_a_gradient_step_after_a_rollback_is_counted_from_there(world: World):
    world.fleet.roll_back = RollBack.ALARM
    begin(world, GRADIENTS)
    rise(world, *RISE)
    world.close_round()
    score(world, 186.0)
    assert_again(world, 6, 2)
    base, before = world.state(2), row(world, 6).tokens_total

    gradient = noise(9)
    world.submit(world.claimed(), value=gradient)
    world.close_round()

    # The root is version 1, so version 2 is one step, and this is the second.
    tokens = row(world, 7).tokens_total - before
    sizes = step_sizes(GRADIENTS, tokens_before=before, tokens=tokens, step=2)
    known = OptimiserState(
        weights=base.weights, momentum=base.momentum, square=base.square
    )
    due = gradient_step(known, gradient, segments(SHAPE), sizes)
    for name in ("weights", "momentum", "square"):
        np.testing.assert_array_equal(getattr(world.state(7), name), getattr(due, name))


@pytest.mark.parametrize(
    "plan", [EVERY, GRADIENTS, LINKS], ids=["delta", "gradient", "links"]
)
def test_the_journal_leads_to_the_same_bytes(world: World, tmp_path, plan):
    world.fleet.roll_back = RollBack.ALARM
    begin(world, plan)
    rise(world, *RISE)
    world.close_round()
    rise(world, 186.0, 185.0)

    stored = world.read(lambda c: versions.versions_of(c, "r-1"))
    fresh = Blobs(tmp_path / "fresh", OsFs(), world.rng)

    assert [each.rolled_back_to for each in stored] == [None] * 5 + [2, None]
    assert [(each.state_sha256, each.published_sha256) for each in stored] == [
        (made.state.sha256, made.published.sha256)
        for made in replayed(world, stored, fresh)
    ]


def replayed(world: World, stored, blobs: Blobs):
    """Make each version anew: from the root, the rows and the payloads alone."""
    run, layout = world.run_row(), layout_hash(SHAPE)
    root = first_state(1, world.state(1).weights, plan_of(run).round_kind)
    yield write_version(blobs, root, layout)
    rollbacks = []
    for before, each in itertools.pairwise(stored):
        if each.rolled_back_to is not None:
            rollbacks.append(Rollback(each.version, each.rolled_back_to))
            state = replace(
                read_state(blobs, each.rolled_back_to), version=each.version
            )
            held = read_published(blobs, each.rolled_back_to)
            whole = Published(version=each.version, weights=held)
            yield write_version(blobs, state, layout, whole)
            continue
        closing = closing_of(world, each, before, tuple(rollbacks))
        base = read_state(blobs, before.version)
        state = next_state(world.fleet.blobs, closing, base, None)
        sent = publication(
            blobs,
            state,
            base_version=before.version,
            known=None,
            broadcast=closing.plan.broadcast,
        )
        yield write_version(blobs, state, layout, sent)


def closing_of(world: World, each, before, rollbacks) -> Closing:
    merged = world.read(lambda c: rounds.submissions_since(c, "r-1", each.round_id))
    merged = [found for found in merged if found.version == each.version]
    return Closing(
        run=world.run_row(),
        live=world.read(lambda c: rounds.find_round(c, each.round_id)),
        submissions=merged,
        version=each.version,
        tokens_before=before.tokens_total,
        factors=[found.factor for found in merged],
        rollbacks=rollbacks,
    )


@pytest.fixture
def linked(world: World) -> World:
    """A fleet on ternary links that has gone back: version 6 is version 2 again."""
    world.fleet.roll_back = RollBack.ALARM
    begin(world, LINKS)
    rise(world, *RISE)
    world.close_round()
    return world


def test_a_version_again_comes_whole_and_the_chain_goes_on_from_it(linked: World):
    assert_again(linked, 6, 2)
    assert published(linked, 6) != linked.state(6).weights.tobytes()
    for held in (5, 2):
        assert fetched(linked, 6, held) == fetched(linked, 6, None)
    score(linked, 186.0)

    train(linked)

    links = fetched(linked, 7, 6)
    weights = read_published(linked.fleet.blobs, 6)
    add_links(links, weights, layout_hash=layout_hash(SHAPE), held=6, version=7)
    assert weights.tobytes() == published(linked, 7)
    assert fetched(linked, 7, 5) == fetched(linked, 7, None)


def fetched(world: World, version: int, held: int | None) -> bytes:
    source = world.do(open_weights(world.fleet, version, held))
    try:
        return b"".join(iter(lambda: source.files[0].read(), b""))
    finally:
        source.close()


def test_the_frame_of_a_version_again_is_made_anew_when_it_breaks(linked: World):
    path = linked.fleet.blobs.path(BlobKind.PUBLISHED, version_blob(6))
    whole = path.read_bytes()
    path.write_bytes(b"noise")

    assert linked.do(look_after(linked.fleet, 6))

    assert path.read_bytes() == whole
    assert not linked.fleet.file_faults


@pytest.mark.parametrize("kind", [BlobKind.STATE, BlobKind.PUBLISHED])
def test_a_run_whose_best_version_is_damaged_goes_on_and_says_so(watched: World, kind):
    rise(watched, *RISE)
    watched.fleet.blobs.path(kind, version_blob(2)).write_bytes(b"noise")

    assert not watched.close_round()

    assert watched.run_row().roll_back_to is None
    (refused,) = told(watched, "rollback.refused")
    assert refused["to_version"] == 2
    assert str(kind) in refused["reason"]
    assert watched.claimed().base_version == 5


def damage(world: World, version: int) -> None:
    world.fleet.blobs.path(BlobKind.STATE, version_blob(version)).write_bytes(b"noise")


def test_of_a_damaged_version_an_operator_is_told_once(watched: World):
    rise(watched, *RISE)
    damage(watched, 2)
    assert not watched.close_round()

    for _ in range(2):  # less than 3 % above version 1, so there is no other to take
        train(watched)
        score(watched, 194.0)
        assert watched.run_row().roll_back_to is None

    assert len(told(watched, "rollback.refused")) == 1
    assert looked(watched).run.loss_alarm


def test_nor_is_one_told_again_once_the_event_is_forgotten(watched: World):
    rise(watched, *RISE)
    damage(watched, 2)
    assert not watched.close_round()
    watched.write(lambda c: c.execute(delete(events)))  # only the newest are kept

    train(watched)
    score(watched, 194.0)

    assert watched.run_row().roll_back_to is None


def test_a_run_goes_back_to_the_next_best_where_the_best_is_damaged(watched: World):
    rise(watched, *RISE)
    damage(watched, 2)
    assert not watched.close_round()

    for _ in range(3):  # until three in a row are 3 % above version 1
        train(watched)
        score(watched, 196.0)
    assert watched.close_round()

    assert_again(watched, 9, 1)
    assert (
        "3.2 % or more above version 1"
        in told(watched, "rollback.decided")[-1]["reason"]
    )


def test_once_the_best_is_found_damaged_the_next_best_is_kept(watched: World):
    watched.fleet.keep_versions = 1
    rise(watched, *RISE)
    damage(watched, 2)
    assert not watched.close_round()

    train(watched)
    score(watched, 196.0)
    train(watched)

    # Of all, the best is 2; of those that are neither damaged nor pruned, 5.
    kept = [each.version for each in watched.read(versions.kept_versions)]
    assert kept == [2, 5, 7]


def test_what_a_run_may_go_back_to_is_kept(watched: World):
    watched.fleet.keep_versions = 1
    rise(watched, *RISE)
    watched.close_round()
    rise(watched, 187.0, 188.0, 188.0)

    kept = watched.read(versions.kept_versions)

    # The best of all, the best since, and the newest.
    assert [each.version for each in kept] == [2, 6, 8]


def test_a_result_of_before_is_not_taken_after(world: World):
    world.fleet.roll_back = RollBack.ALARM
    begin(world, msgspec.structs.replace(EVERY, accept_late=AcceptLate.STALE))
    rise(world, *RISE[:-1])
    train(world)
    world.clock.advance(100.0)
    scoring = world.claimed("w2")
    late = world.claimed("w1")
    world.clock.advance(25.0)
    world.heartbeat(scoring, "w2", tokens_done=90)
    world.clock.advance(25.0)
    world.sweep()
    world.score(scoring, RISE[-1], worker_id="w2")
    assert world.close_round()
    assert_again(world, 6, 2)

    with pytest.raises(RefusedError, match="does not hold"):
        world.submit(late, "w1")


def by_hand(world: World, wish) -> int:
    return world.do(ask_for_rollback(world.fleet, wish))


def test_an_operator_goes_back_to_any_version_that_is_kept(watched: World):
    rise(watched, 190.0, 186.0, 187.0)

    assert by_hand(watched, 1) == 1
    assert by_hand(watched, Pick.BEST) == 2  # the last word counts
    watched.close_round()

    assert_again(watched, 4, 2)
    assert [each["reason"] for each in told(watched, "rollback.decided")] == [
        "asked for by an operator"
    ] * 2


def test_what_an_operator_chose_is_the_best_from_then_on(watched: World):
    rise(watched, 190.0, 150.0, 150.0)
    by_hand(watched, 1)
    watched.close_round()

    rise(watched, 190.0, 189.0, 189.0, 189.0)

    assert looked(watched).run.loss_alarm is None
    assert watched.run_row().roll_back_to is None


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (3, "version must be one of run r-1 before its newest, 3, got 3"),
        (Pick.LATEST, "version must be one of run r-1 before its newest, 3, got 3"),
        (9, r"version must be one that is kept \(1, 2, 3\), got 9"),
    ],
)
def test_another_version_is_refused_by_name(watched: World, wish, said):
    rise(watched, 190.0, 186.0, 187.0)

    with pytest.raises(RefusedError, match=said):
        by_hand(watched, wish)

    assert watched.run_row().roll_back_to is None


def test_a_damaged_version_and_a_finished_run_are_refused(watched: World):
    rise(watched, 190.0, 186.0)
    watched.change_run(state="finished")
    with pytest.raises(RefusedError, match="run r-1 is finished"):
        by_hand(watched, 1)
    watched.fleet.blobs.path(BlobKind.STATE, version_blob(1)).unlink()
    with pytest.raises(RefusedError, match="one that is whole, got 1: state/"):
        by_hand(watched, 1)


def test_a_newer_wish_outlives_the_refusal_of_an_older(watched: World):
    rise(watched, 190.0, 186.0, 187.0)
    by_hand(watched, 1)
    due = watched.read(rolling_back._find)
    by_hand(watched, 2)  # while the files of 1 are looked at

    watched.do(rolling_back._give_up(watched.fleet, due, "damaged"))

    assert watched.run_row().roll_back_to == 2
