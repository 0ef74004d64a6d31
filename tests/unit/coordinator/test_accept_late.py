"""What comes after its lease has ended is taken where that harms nobody, or counted."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from sqlalchemy import delete, select

from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import AcceptLate
from coordinator.domain.staleness import MAX_STALENESS, staleness_weight
from coordinator.service.submitting import Intake
from coordinator.service.sweeping import _end_run
from coordinator.store import tallies
from coordinator.store.tables import claims, events, ranges, submissions, tasks
from tests.fakes import START
from tests.unit.coordinator.fleets import PLAN, World, body, frame

STALE = msgspec.structs.replace(PLAN, accept_late=AcceptLate.STALE)
NEVER = msgspec.structs.replace(PLAN, accept_late=AcceptLate.NEVER)


def out_of_touch(world: World, plan=PLAN, **run):
    """Let w1 and w2 claim 64 tokens each, and w1 be silent until its lease ends."""
    world.start_run(plan, **run)
    for name in ("w1", "w2"):
        world.register(name)
        world.set_speed(name, 64 / 60)
    held = world.claimed("w1"), world.claimed("w2")
    for done in (10, 20, 30, 40):
        world.clock.advance(10.0)
        world.heartbeat(held[1], "w2", tokens_done=done)
    assert world.sweep() == 1
    return held


def next_round(world: World, task, name="w2") -> None:
    world.submit(task, name)
    assert world.close_round()
    # As before, so that what came back fits.
    world.set_speed(name, 64 / 60)


def told(world: World, kind: str):
    found = world.read(
        lambda c: list(
            c.execute(select(events.c.body_json).where(events.c.kind == kind)).scalars()
        )
    )
    return [msgspec.json.decode(one) for one in found]


def tokens(world: World, name="w1"):
    found = world.read(lambda c: tallies.tokens_by_worker(c, "r-1")).get(name, {})
    return {fate: n for fate, n in found.items() if n}


def refused(world: World, task, name="w1") -> None:
    with pytest.raises(RefusedError, match="does not hold") as caught:
        world.submit(task, name)
    assert caught.value.code == "lease_lost"


def test_in_its_own_round_a_late_result_counts_as_if_it_had_been_in_time(
    world: World,
):
    late, other = out_of_touch(world)

    world.submit(late, "w1", 0.25)

    assert world.task(late.task_id).state == "done"
    assert tokens(world) == {"accepted": 64}
    (said,) = told(world, "submission.accepted")
    assert (said["late"], said["staleness"]) == (True, 0)
    assert world.live_round().state == "open"  # w2 is out
    next_round(world, other)
    assert tokens(world) == {"applied": 64}
    row = world.read(lambda c: c.execute(select(claims)).first())
    assert (row.outcome, row.fate, row.ended_at) == ("back", "accepted", START + 40.0)


def test_its_weights_are_those_of_a_round_where_all_came_in_time(world: World):
    late, other = out_of_touch(world)
    world.submit(late, "w1", 0.25)
    next_round(world, other)
    first = world.state(1).weights

    change = 0.9 * (1.0 + 0.8) * (0.25 + 0.5) / 2.0

    assert world.state(2).weights == pytest.approx(first - change, abs=1e-6)


def test_an_answer_that_was_lost_is_given_again(world: World):
    late, _other = out_of_touch(world)
    sent = body(world.meta(late, "w1"), frame(late, 0.5))

    assert world.send(sent) == world.send(sent)
    assert len(told(world, "submission.accepted")) == 1


def test_a_lease_that_ran_out_unnoticed_is_late_too(world: World):
    world.start_run()
    world.register()
    late = world.claimed()
    world.clock.advance(31.0)

    world.submit(late)

    assert told(world, "submission.accepted")[0]["late"] is True
    assert world.close_round()


def test_the_only_worker_of_a_round_that_started_over_closes_it(world: World):
    world.start_run()
    world.register()
    late = world.claimed()
    world.clock.advance(31.0)
    world.sweep()

    world.submit(late)

    assert world.close_round()
    assert world.live_round().base_version == 2


def test_never_is_never_but_tells_how_fast_the_worker_is(world: World):
    late, _other = out_of_touch(world, NEVER)
    assert world.worker("w1").spread is None

    refused(world, late)
    refused(world, late)

    assert world.task(late.task_id).state == "pending"
    assert tokens(world) == {"silent": 64}
    assert world.worker("w1").tokens_per_s == pytest.approx(64 / 40)
    (said,) = told(world, "submission.refused")
    assert (said["tokens"], said["fate"], said["compute_s"]) == (64, "silent", 1.0)
    assert world.worker("w1").tokens_accepted == 0


def test_a_lease_that_ran_out_unnoticed_is_booked_too(world: World):
    world.start_run(NEVER)
    world.register()
    late = world.claimed()
    world.clock.advance(31.0)

    refused(world, late)

    assert world.task(late.task_id).state == "pending"
    assert tokens(world) == {"silent": 64}
    (said,) = told(world, "submission.refused")
    assert (said["tokens"], said["fate"]) == (64, "silent")


def test_a_lease_that_ends_during_the_upload_is_booked_too(world: World):
    world.start_run(NEVER)
    world.register()
    world.set_speed("w1", 64 / 60)
    late = world.claimed()
    sent = body(world.meta(late, "w1"), frame(late, 0.25))
    world.clock.advance(20.0)
    begun = upload(world, sent[:-100])
    world.clock.advance(20.0)
    assert world.sweep() == 1
    assert tokens(world) == {}

    with pytest.raises(RefusedError, match="does not hold"):
        finish(world, begun, sent[-100:])

    assert tokens(world) == {"silent": 64}
    assert world.worker("w1").tokens_per_s == pytest.approx(64 / 40)
    (said,) = told(world, "submission.refused")
    assert (said["tokens"], said["fate"]) == (64, "silent")


def test_once_its_round_is_closed_it_is_too_late(world: World):
    late, other = out_of_touch(world)
    next_round(world, other)

    refused(world, late)

    assert tokens(world) == {"silent": 64}


def test_who_gave_a_task_back_has_no_right_to_it(world: World):
    world.start_run(STALE)
    for name in ("w1", "w2"):
        world.register(name)
    task = world.claimed("w1")
    world.claimed("w2")
    world.release(task, "w1")

    refused(world, task)


def test_a_lease_id_is_worth_nothing_to_others(world: World):
    late, _other = out_of_touch(world)

    with pytest.raises(RefusedError, match="worker_id must be"):
        world.submit(late, "w2")
    stranger = msgspec.structs.replace(late, lease_id="0" * 32)
    refused(world, stranger)
    elsewhere = msgspec.structs.replace(late, task_id=_other.task_id)
    refused(world, elsewhere)
    assert told(world, "submission.refused") == []


def test_a_task_that_somebody_has_claimed_since_is_his(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    again = world.claimed("w2")
    assert again.task_id == late.task_id

    refused(world, late)


def test_nor_does_it_come_back_when_that_one_gives_it_back(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    world.release(world.claimed("w2"), "w2")
    assert world.task(late.task_id).state == "pending"

    refused(world, late)


def test_a_stale_result_goes_along_with_less_weight(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    before = world.state(2)

    answer = world.submit(late, "w1", 0.25)

    assert answer.round_id == world.live_round().round_id == 2
    (said,) = [one for one in told(world, "submission.accepted") if one["late"]]
    assert said["staleness"] == 1
    # It neither ends the claims of the round nor closes it.
    assert world.live_round().first_submission_at is None
    assert not world.close_round()
    fresh = world.claimed("w2")
    assert fresh.task_id != late.task_id
    share = 64 / (64 + fresh.byte_length // 4)
    next_round(world, fresh)

    mean = share * 2.0**-0.5 * 0.25 + (1.0 - share) * 0.5
    momentum = 0.8 * before.momentum + mean
    due = before.weights - 0.9 * (mean + 0.8 * momentum)
    assert world.state(3).weights == pytest.approx(due, abs=1e-6)
    assert tokens(world) == {"applied": 64}


def test_a_stale_result_is_sized_by_the_rate_at_which_it_was_made(world: World):
    late, other = out_of_touch(world, STALE)  # in the warm-up: the rate rises
    next_round(world, other)
    world.submit(late, "w1")
    next_round(world, world.claimed("w2"))

    named = select(submissions.c.task_id, submissions.c.size)
    sizes = world.read(lambda c: {row.task_id: row.size for row in c.execute(named)})
    assert len(sizes) == 3
    assert sizes[late.task_id] == pytest.approx(sizes[other.task_id])


def test_a_part_may_be_late_too(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)

    world.submit(late, "w1", num_steps=1)

    assert tokens(world) == {"accepted": 16}
    assert world.task(late.task_id).num_tokens == 16
    again = world.claimed("w2")
    assert again.byte_offset != late.byte_offset


def test_beyond_two_rounds_it_is_refused(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    for _ in range(MAX_STALENESS):
        # Somebody else's work: the late task itself rests meanwhile.
        rest(world, late.task_id)
        next_round(world, world.claimed("w2"))

    refused(world, late)


def rest(world: World, task_id: str) -> None:
    world.write(
        lambda c: c.execute(
            tasks.update()
            .where(tasks.c.task_id == task_id)
            .values(not_before_at=world.clock.now() + 1e6)
        )
    )


def test_while_a_round_is_closing_a_stale_result_is_told_to_come_again(
    world: World,
):
    late, other = out_of_touch(world, STALE)
    world.submit(other, "w2")
    assert world.live_round().state == "closing"
    sent = body(world.meta(late, "w1"), frame(late, 0.25))
    before = world.everything()

    with pytest.raises(RefusedError, match="round 1 is being closed") as caught:
        world.send(sent)

    assert (caught.value.code, caught.value.retry_after_s) == ("busy", 1.0)
    assert world.everything() == before
    assert world.close_round()
    assert world.send(sent).round_id == 2


def test_what_becomes_stale_during_its_upload_is_told_to_come_again(world: World):
    late, other = out_of_touch(world, STALE)
    sent = body(world.meta(late, "w1"), frame(late, 0.25))
    begun = upload(world, sent[:-100])
    world.submit(other, "w2")

    with pytest.raises(RefusedError) as caught:
        finish(world, begun, sent[-100:])

    assert caught.value.code == "busy"
    assert told(world, "submission.refused") == []
    assert world.close_round()
    assert world.send(sent).round_id == 2


def upload(world: World, piece: bytes) -> Intake:
    intake = Intake(world.fleet)
    world.do(intake.feed(piece))
    return intake


def finish(world: World, intake: Intake, piece: bytes) -> None:
    async def rest_of_it():
        try:
            await intake.feed(piece)
            await intake.finish()
        finally:
            await intake.close()

    world.do(rest_of_it())


def test_a_closing_round_refuses_what_only_it_would_take(world: World):
    late, other = out_of_touch(world)
    world.submit(other, "w2")

    refused(world, late)

    assert len(told(world, "submission.refused")) == 1


def test_a_closing_round_refuses_what_is_too_old_for_the_next(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    for _ in range(MAX_STALENESS - 1):
        rest(world, late.task_id)
        next_round(world, world.claimed("w2"))
    rest(world, late.task_id)
    world.submit(world.claimed("w2"), "w2")
    assert world.live_round().state == "closing"

    refused(world, late)


def test_what_no_budget_is_left_for_is_refused(world: World):
    late, _other = out_of_touch(world, token_budget=128)
    world.change_run(token_budget=127)

    refused(world, late)


def test_a_run_that_has_ended_takes_nothing(world: World):
    late, _other = out_of_touch(world)
    world.change_run(state="finished")

    refused(world, late)


def test_a_run_that_ends_with_a_stale_result_merges_it_first(world: World):
    late, other = out_of_touch(world, STALE, token_budget=128)
    next_round(world, other)
    world.submit(late, "w1")

    world.do(_end_run(world.fleet))

    assert world.close_round()
    assert tokens(world) == {"applied": 64}
    row = world.read(
        lambda c: c.execute(select(submissions).where(submissions.c.version == 3)).one()
    )
    assert (row.task_id, row.base_version) == (late.task_id, 1)


def test_who_merges_the_last_stale_result_is_woken_once_that_is_decided(
    world: World, monkeypatch
):
    late, other = out_of_touch(world, STALE, token_budget=128)
    next_round(world, other)
    world.submit(late, "w1")
    found = []
    # Before the commit there would be nothing to find.
    monkeypatch.setattr(
        world.fleet.round_ready, "ring", lambda: found.append(world.live_round().state)
    )

    world.do(_end_run(world.fleet))

    assert found == ["closing"]


def test_a_stale_result_alone_makes_no_version_when_others_give_up(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    rest(world, late.task_id)
    fresh = world.claimed("w2")
    world.submit(late, "w1")

    world.release(fresh, "w2")

    assert world.live_round().state == "open"
    assert not world.close_round()
    # The round has started over: its worker may claim again, and then it closes.
    next_round(world, world.claimed("w2"))
    assert tokens(world) == {"applied": 64}


def test_a_stale_result_that_ends_an_epoch_begins_the_next(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    world.write(lambda c: c.execute(delete(ranges)))
    sent = body(world.meta(late, "w1"), frame(late, 0.5))

    assert world.woken_by(sent) == [{"work"}]

    assert world.run_row().epoch == 2
    assert world.live_round().state == "open"
    next_round(world, world.claimed("w2"))
    assert tokens(world) == {"applied": 64}


def test_a_stale_result_begins_no_epoch_while_others_are_out(world: World):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    rest(world, late.task_id)
    fresh = world.claimed("w2")
    world.write(lambda c: c.execute(delete(ranges)))

    world.submit(late, "w1")

    assert world.run_row().epoch == 1
    next_round(world, fresh)
    assert world.run_row().epoch == 2


def test_a_run_ends_with_a_stale_result_after_the_last_lease_was_given_back(
    world: World,
):
    late, other = out_of_touch(world, STALE)
    next_round(world, other)
    rest(world, late.task_id)
    fresh = world.claimed("w2")
    world.submit(late, "w1")
    world.change_run(stop_at=world.clock.now())
    world.do(_end_run(world.fleet))
    assert not world.close_round()  # w2 is out

    world.release(fresh, "w2")
    world.do(_end_run(world.fleet))

    assert world.close_round()
    assert tokens(world) == {"applied": 64}


def test_the_weight_falls_with_the_root_of_the_age():
    assert [staleness_weight(n) for n in (0, 1, 3)] == [1.0, 2.0**-0.5, 0.5]
    with pytest.raises(ValueError, match="got -1"):
        staleness_weight(-1)


def test_no_staleness_changes_no_bit():
    shares = np.random.default_rng(1).random(1000)

    assert all(share * staleness_weight(0) == share for share in shares)
