"""A claim: the right piece of work for this worker, at most once, at most one."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from bitnet_ext.wire.verdicts import ErrorCode, TaskKind
from coordinator.domain import leases, sizing
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import hyper_parameters
from coordinator.service.claiming import MIN_FREE_BYTES, claim
from coordinator.service.steering import seed_epoch
from coordinator.store import rounds, runs, tasks, workers
from tests.unit.coordinator.fleets import PLAN, SECRET, SHAPE, World, claim_request

#: Four steps of two sequences of eight tokens.
PROBE = 64


def size(task):
    return task.byte_length // 4


def stretch(task):
    start = task.byte_offset // 4
    return task.shard_id, start, start + size(task)


def range_tokens(world):
    return world.read(lambda c: runs.range_tokens(c, "r-1"))


def test_an_absurdly_fast_probe_makes_no_absurd_task(running: World, monkeypatch):
    monkeypatch.setattr(sizing, "MAX_GROWTH", 4)  # the corpus is so small
    probe = running.claimed()
    running.submit(probe)  # at once: by the clock 64,000 tokens/s
    assert running.close_round()

    assert running.claimed().byte_length == 4 * probe.byte_length


def test_the_first_task_of_an_unmeasured_worker_is_a_probe(running: World):
    task = running.claimed()

    shard = running.fleet.the_manifest().shard("train-00000")
    assert task.kind is TaskKind.TRAIN
    assert stretch(task) == ("train-00000", 0, PROBE)
    assert (task.shard_sha256, task.shard_bytes) == (shard.sha256, 4000)
    assert (task.num_steps, task.batch_size, task.seq_len) == (4, 2, 8)
    assert (task.run_id, task.base_version) == ("r-1", 1)
    assert (task.codec, task.text_bytes, task.lease_s) == ("fp32", 0, 30.0)
    assert task.seed == sizing.order_seed(7, epoch=1, shard_id="train-00000")
    assert task.block_size == sizing.BLOCK_SIZE
    assert task.stop_after_s == pytest.approx(1.25 * PLAN.round_s)
    assert task.hyper == hyper_parameters(PLAN, tokens_accepted=0, task_tokens=PROBE)


def test_warm_up_follows_the_accepted_tokens_of_the_run(running: World):
    running.train_round(0.5)

    task = running.claimed()

    assert task.hyper.lr_start > 0.0
    assert task.hyper == hyper_parameters(
        PLAN, tokens_accepted=PROBE, task_tokens=size(task)
    )


def test_a_worker_is_predicted_by_its_own_speed_not_by_the_fleet(running: World):
    running.register("w2")
    running.set_speed("w2", 1.0)
    running.set_speed("w1", 8.0)

    task = running.claimed("w1")  # 480 tokens

    assert running.task(task.task_id).predicted_s == pytest.approx(60.0)


def test_with_less_than_a_gibibyte_free_there_is_no_work(running: World):
    running.fs.free = MIN_FREE_BYTES - 1
    with pytest.raises(RefusedError) as caught:
        running.claim()
    assert (caught.value.code, caught.value.retry_after_s) == (
        ErrorCode.DISK_LOW,
        30.0,
    )

    running.fs.free = MIN_FREE_BYTES
    assert running.claim() is not None


def test_a_measured_worker_gets_what_fills_the_round(running: World):
    running.set_speed("w1", 2.0)

    assert size(running.claimed()) == 120


def test_a_late_claim_gets_what_fills_the_rest_of_the_round(running: World):
    running.claimed()
    running.register("w2")
    running.set_speed("w2", 4.0)
    running.clock.advance(20.0)

    assert size(running.claimed("w2")) == 160


def test_a_round_ages_from_its_first_claim_not_from_its_opening(running: World):
    running.set_speed("w1", 2.0)
    running.clock.advance(1000.0)

    assert size(running.claimed()) == 120


def test_later_claims_do_not_make_a_round_younger(running: World):
    running.register("w2")
    running.claimed("w1")
    began = running.clock.now()
    running.clock.advance(20.0)

    running.claimed("w2")

    assert running.live_round().first_claim_at == began


def test_a_crumb_at_the_end_of_a_range_goes_along(running: World):
    running.set_speed("w1", 15.0)  # 900 of 1000 tokens

    assert stretch(running.claimed()) == ("train-00000", 0, 1000)


def test_the_next_worker_goes_on_where_the_first_one_was_cut(running: World):
    running.register("w2")

    assert stretch(running.claimed("w1")) == ("train-00000", 0, 64)
    assert stretch(running.claimed("w2")) == ("train-00000", 64, 128)
    assert range_tokens(running) == 1504 - 128


def test_a_worker_holds_one_lease_at_a_time(running: World):
    running.claimed()

    assert running.claim() is None


def test_who_trains_is_not_asked_to_score_as_well(world: World):
    world.start_run(scored=True)
    world.register()
    world.claimed()
    world.clock.advance(20.0)

    assert world.claim() is None


def test_who_scores_is_not_asked_to_train_as_well(world: World):
    world.start_run(scored=True)
    world.register()
    world.clock.advance(PLAN.round_s + 1)
    world.claimed()

    assert world.claim() is None


def test_a_worker_gets_one_training_task_a_round(running: World):
    running.register("w2")
    running.claimed("w2")
    running.release(running.claimed("w1"))

    assert running.claim("w1") is None


def test_a_round_takes_no_claims_after_its_first_submission(running: World):
    for name in ("w2", "w3"):
        running.register(name)
    first, second = running.claimed("w1"), running.claimed("w2")
    running.submit(first, "w1")

    assert running.claim("w3") is None
    assert running.claim("w1") is None
    running.submit(second, "w2")
    assert running.claim("w3") is None  # closing
    running.close_round()
    assert running.claimed("w3").base_version == 2


def test_a_repeated_claim_gets_the_same_lease_with_the_time_that_is_left(
    running: World,
):
    first = running.claimed("w1", "c-same")
    running.clock.advance(10.0)

    again = running.claimed("w1", "c-same")

    assert again.lease_id == first.lease_id
    assert again.lease_s == pytest.approx(20.0)
    assert stretch(again) == stretch(first)
    assert again.hyper == first.hyper
    assert range_tokens(running) == 1504 - PROBE


def test_a_claim_id_of_another_worker_opens_nothing(running: World):
    running.register("w2")
    running.claimed("w1", "c-same")

    assert running.claim("w2", "c-same") is None


def test_a_claim_id_lives_as_long_as_its_lease(running: World):
    first = running.claimed("w1", "c-same")
    running.submit(first)
    running.close_round()

    assert running.claimed("w1", "c-same").lease_id != first.lease_id


def test_only_a_hash_of_the_lease_id_is_stored(running: World):
    task = running.claimed("w1", "c-1")

    assert task.lease_id == leases.lease_id(SECRET, task.task_id, 1, "c-1")
    assert running.task(task.task_id).lease_hash == leases.lease_hash(task.lease_id)
    assert task.lease_id not in repr(running.everything())


def test_a_draining_worker_gets_nothing_and_keeps_what_it_has(running: World):
    held = running.claimed("w1", "c-same")
    running.write(lambda c: workers.change_worker(c, "w1", draining=True))

    assert running.claimed("w1", "c-same").lease_id == held.lease_id
    running.release(held)
    assert running.claim() is None


@pytest.mark.parametrize("state", ["paused", "finished"])
def test_a_run_that_does_not_run_gives_out_nothing(running: World, state):
    running.change_run(state=state)

    assert running.claim() is None


def test_a_task_ends_before_the_time_to_stop(running: World):
    running.set_speed("w1", 8.0)
    running.change_run(stop_at=running.clock.now() + 10.0)

    assert size(running.claimed()) == 80


@pytest.mark.parametrize("seconds", [0.9, 0.0, -5.0])
def test_nothing_is_given_out_when_the_time_is_up(running: World, seconds):
    running.change_run(stop_at=running.clock.now() + seconds)

    assert running.claim() is None


def test_tasks_that_are_out_count_against_the_budget(running: World):
    running.change_run(token_budget=2 * PROBE + 7)
    for name in ("w2", "w3", "w4"):
        running.register(name)

    given = [running.claim(name) for name in ("w1", "w2", "w3", "w4")]

    assert [task and size(task) for task in given] == [64, 64, 8, None]


def test_a_crumb_does_not_go_along_beyond_the_budget(running: World):
    running.change_run(token_budget=700)
    running.set_speed("w1", 15.0)  # 900, and then all 1000

    assert size(running.claimed()) == 704


def test_given_back_work_is_cut_to_what_is_left_of_the_budget(running: World):
    running.set_speed("w1", 2.0)
    running.release(running.claimed())
    running.register("w2")
    running.change_run(token_budget=70)

    assert size(running.claimed("w2")) == 72


def test_given_back_work_goes_first_under_its_id(running: World):
    running.register("w2")
    first = running.claimed("w1")
    running.release(first)

    again = running.claimed("w2")

    assert again.task_id == first.task_id
    assert again.lease_id != first.lease_id
    assert (stretch(again), again.seed) == (stretch(first), first.seed)


@pytest.mark.parametrize(("speed", "due"), [(2.0, 120), (3.0, 64)])
def test_given_back_work_over_twice_the_size_is_divided(running: World, speed, due):
    running.set_speed("w1", speed)
    whole = running.claimed("w1")
    running.release(whole)
    running.register("w2")
    before = range_tokens(running)

    head = running.claimed("w2")

    assert head.task_id == whole.task_id
    assert stretch(head) == ("train-00000", 0, due)
    assert head.num_steps == due // 16 + (due % 16 > 0)
    assert range_tokens(running) == before + size(whole) - due


def given_back(running: World) -> str:
    """Let w1 give back 120 tokens in a round that goes on; return the task."""
    running.register("w2")
    running.set_speed("w1", 2.0)
    running.set_speed("w2", 4.0)
    task = running.claimed("w1")
    other = running.claimed("w2")
    running.release(task, "w1")
    running.submit(other, "w2")
    assert running.close_round()
    running.set_speed("w2", 4.0)
    return task.task_id


def test_given_back_work_waits_for_whom_it_fits(running: World):
    task_id = given_back(running)

    assert running.claimed("w2").task_id != task_id  # 240 tokens would suit it
    assert running.claimed("w1").task_id == task_id


def test_given_back_work_waits_for_two_rounds_at_most(running: World):
    task_id, claimed = given_back(running), []

    for _ in range(3):
        running.set_speed("w2", 4.0)
        task = running.claimed("w2")
        claimed.append(task.task_id == task_id)
        running.submit(task, "w2")
        running.close_round()

    assert claimed == [False, False, True]


def test_nobody_idles_beside_work_that_would_suit_another(running: World):
    task_id = given_back(running)
    running.write(lambda c: runs.drop_ranges(c, "r-1"))

    assert running.claimed("w2").task_id == task_id


def test_a_task_of_a_fixed_size_is_never_divided(world: World):
    world.start_run(seeded=False)
    world.register()
    world.do(seed_epoch(world.fleet, 320))

    assert size(world.claimed()) == 320
    assert range_tokens(world) == 0


def test_an_evaluation_goes_to_who_has_nothing_to_train(world: World):
    world.start_run(scored=True)
    for name in ("w1", "w2"):
        world.register(name)
    training = world.claimed("w1")
    world.submit(training, "w1")  # from now on the round takes no claims

    task = world.claimed("w2")

    shard = world.fleet.the_manifest().held_out_shard()
    assert training.kind is TaskKind.TRAIN
    assert task.kind is TaskKind.EVALUATE
    assert stretch(task) == (shard.shard_id, 0, shard.num_tokens)
    assert (task.base_version, task.num_steps) == (1, 0)
    assert (task.block_size, task.stop_after_s) == (0, None)
    assert task.text_bytes == shard.text_bytes


def test_an_evaluation_that_waited_for_a_round_goes_to_anybody(world: World):
    world.start_run(scored=True)
    for name in ("w1", "w2"):
        world.register(name)
    world.clock.advance(PLAN.round_s)
    assert world.claimed("w1").kind is TaskKind.TRAIN
    world.clock.advance(0.1)

    assert world.claimed("w2").kind is TaskKind.EVALUATE


def test_an_evaluation_belongs_to_no_round(world: World):
    world.start_run(scored=True, seeded=False)
    world.register()

    task = world.claimed()

    live = world.live_round()
    assert task.kind is TaskKind.EVALUATE
    assert world.task(task.task_id).round_id is None
    assert live.first_claim_at is None
    assert world.read(lambda c: rounds.claims_of(c, live.round_id)) == []


def test_an_expired_lease_is_found_without_a_sweep(running: World):
    first = running.claimed("w1")
    running.register("w2")
    running.clock.advance(30.0)

    assert running.claimed("w2").task_id == first.task_id


def test_a_claim_that_finds_an_expired_lease_wakes_who_waits_for_that(
    running: World,
):
    running.claimed("w1")
    running.register("w2")
    running.clock.advance(31.0)

    async def story() -> None:
        bells = [running.fleet.work, running.fleet.round_ready]
        waiting = [asyncio.create_task(bell.wait()) for bell in bells]
        await asyncio.sleep(0)  # they wait
        await claim(running.fleet, claim_request("w2", "c-2"))
        _, still = await asyncio.wait(waiting, timeout=0.0)
        assert not still

    running.do(story())
    assert running.sweep() == 0  # it would have come too late to tell them


def test_a_worker_whose_lease_ran_out_can_claim_again(running: World):
    first = running.claimed()
    running.clock.advance(30.0)

    again = running.claimed()

    assert again.task_id == first.task_id
    assert again.lease_id != first.lease_id


def test_a_worker_of_before_an_upgrade_is_refused_before_it_gets_a_lease(
    running: World,
):
    old = msgspec.structs.replace(claim_request("w1", "c-1"), protocol_version=4)
    before = running.everything()

    with pytest.raises(RefusedError, match=r"must be \d+, got 4$") as caught:
        running.do(claim(running.fleet, old))

    assert (caught.value.code, caught.value.field) == (
        ErrorCode.PROTOCOL_MISMATCH,
        "protocol_version",
    )
    assert running.everything() == before


def test_an_unknown_worker_is_refused(running: World):
    with pytest.raises(RefusedError) as caught:
        running.claim("w9")

    assert (caught.value.code, caught.value.field) == (
        ErrorCode.UNKNOWN_WORKER,
        "worker_id",
    )


def test_without_a_corpus_there_is_nothing_to_claim(world: World):
    world.fleet.manifest = None

    with pytest.raises(RefusedError) as caught:
        world.claim()

    assert caught.value.code is ErrorCode.NO_RUN
    assert caught.value.retry_after_s


def test_eight_workers_at_once_get_eight_stretches(running: World):
    names = [f"w{n}" for n in range(1, 9)]
    for name in names:
        running.register(name)

    async def all_at_once():
        return await asyncio.gather(
            *(claim(running.fleet, claim_request(name, f"c-{name}")) for name in names)
        )

    found = running.do(all_at_once())

    stretches = sorted(stretch(task) for task in found)
    assert stretches == [("train-00000", 64 * n, 64 * n + 64) for n in range(8)]
    assert len({task.task_id for task in found}) == 8
    assert len({task.lease_id for task in found}) == 8
    assert running.read(lambda c: len(tasks.all_leased(c))) == 8


def test_the_budget_and_the_size_are_in_whole_sequences(running: World):
    running.set_speed("w1", 1.99)

    assert size(running.claimed()) % SHAPE.seq_len == 0


def test_a_coordinator_that_is_about_to_stop_gives_nothing_out(running: World):
    running.fleet.stop_giving_out()

    assert running.claim() is None
    assert running.live_round().first_claim_at is None
