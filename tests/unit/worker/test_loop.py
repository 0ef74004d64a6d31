"""The loop told as stories: what it asks, what it submits, and what it remembers."""

from __future__ import annotations

import math

import msgspec
import pytest

from bitnet_ext.frames import FrameKind, decode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.messages import SubmissionAnswer
from bitnet_ext.wire.verdicts import (
    ErrorCode,
    FailCode,
    LeaseState,
    RoundKind,
    SubmissionState,
    TaskKind,
    WorkerPhase,
)
from tests.unit.worker.fleet import (
    EMPTY,
    EVALUATED,
    Fleet,
    accepts,
    payload_of,
)
from tests.unit.worker.shapes import SMALL
from tests.unit.worker.stand_in import HANG_UP, Reply, refuses, says
from worker.loop import TROUBLE_S


def remembers_nothing(fleet: Fleet) -> bool:
    """Train once more and see whether the optimiser starts anew."""
    fleet.coordinator.on("POST /gradient", accepts)
    fleet.trainer.during = lambda: None
    fleet.hands_out(fleet.task())
    fleet.worker.turn()
    return fleet.trainer.started_from[-1] is None


def test_another_process_goes_on_with_moments_and_residual(
    coordinator, tmp_path
) -> None:
    data = {"BITNET_DATA": str(tmp_path / "data")}
    first = Fleet(coordinator, tmp_path, **data)
    first.hands_out(first.task(), first.task())
    first.turns(2)
    first.close()  # nothing is said to the worker: it may as well be killed

    second = Fleet(coordinator, tmp_path, **data)
    second.hands_out(second.task(), second.task())
    second.turns(2)
    second.close()

    assert [int(m.step[0]) for m in second.trainer.started_from] == [4, 6]
    # What one payload rounds away fills the fourth.
    frames = [payload_of(frame) for _, frame in second.submissions()]
    assert [frame == frames[0] for frame in frames] == [True, True, True, False]


def test_a_task_is_trained_and_submitted(fleet) -> None:
    fleet.hands_out(fleet.task())

    fleet.turns(2)

    ((meta, frame),) = fleet.submissions()
    header, _ = decode_frame(frame)
    assert (meta.task_id, meta.lease_id, meta.worker_id) == ("t1", "0" * 32, "box-1")
    assert (meta.base_version, meta.num_steps, meta.tokens) == (1, 2, 128)
    assert meta.cpu_s == 2.0  # of this task alone
    assert meta.download_bytes == len(fleet.frame) + fleet.tokens.nbytes
    assert (header.version, header.layout_hash) == (1, layout_hash(SMALL))
    assert fleet.heartbeat.lease is None
    assert not fleet.failures()


def test_an_empty_queue_is_waited_for_as_long_as_it_says(fleet) -> None:
    fleet.hands_out()

    fleet.turns(2)

    assert sum(fleet.waits) == pytest.approx(6.0)
    assert fleet.heartbeat.phase is WorkerPhase.IDLE


def test_a_claim_keeps_its_id_until_it_is_answered(fleet) -> None:
    fleet.coordinator.on(
        "POST /work", HANG_UP, refuses(503, ErrorCode.BUSY), EMPTY, EMPTY
    )

    fleet.turns(2)

    ids = [r.json()["claim_id"] for r in fleet.coordinator.asked("POST /work")]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_weights_and_text_are_fetched_once(fleet) -> None:
    fleet.hands_out(fleet.task(), fleet.task())

    fleet.turns(2)

    assert len(fleet.coordinator.asked("GET /weights/1")) == 1
    assert len(fleet.coordinator.asked("GET /corpus/train-00000")) == 1
    first, second = (meta.download_bytes for meta, _ in fleet.submissions())
    assert (first, second) == (len(fleet.frame) + fleet.tokens.nbytes, 0)


def test_moments_and_residual_go_on_after_an_accepted_task(fleet) -> None:
    fleet.hands_out(*[fleet.task()] * 4)

    fleet.turns(4)

    steps = [m and m.step[0].item() for m in fleet.trainer.started_from]
    assert steps == [None, 2.0, 4.0, 6.0]
    payloads = [payload_of(frame) for _, frame in fleet.submissions()]
    # 0.0012 rounds to nothing at first; what is kept of it adds up to more.
    assert len(set(payloads)) > 1


def test_a_gradient_task_is_answered_by_a_gradient_and_its_residual_goes_on(
    fleet,
) -> None:
    fleet.hands_out(*[fleet.task(round_kind=RoundKind.GRADIENT)] * 4)

    fleet.turns(4)

    frames = [frame for _, frame in fleet.submissions()]
    payloads = {payload_of(frame, FrameKind.GRADIENT) for frame in frames}
    assert len(frames) == 4
    assert len(payloads) > 1


@pytest.mark.parametrize(
    ("before", "after"),
    [(RoundKind.DELTA, RoundKind.GRADIENT), (RoundKind.GRADIENT, RoundKind.DELTA)],
)
def test_at_a_change_of_kind_what_was_rounded_away_is_dropped(
    fleet, before, after
) -> None:
    """After three tasks it would make the next payload another (see above)."""
    kinds = [before] * 3 + [after] * 4
    fleet.hands_out(*[fleet.task(round_kind=kind) for kind in kinds])

    fleet.turns(7)

    frames = [frame for _, frame in fleet.submissions()]
    payloads = [payload_of(f, FrameKind(k)) for f, k in zip(frames, kinds, strict=True)]
    assert [payload == payloads[0] for payload in payloads] == [True] * 6 + [False]


def test_an_answer_lost_on_its_way_is_asked_for_again(fleet) -> None:
    fleet.coordinator.on("POST /gradient", HANG_UP, HANG_UP, accepts)
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    bodies = [r.body for r in fleet.coordinator.asked("POST /gradient")]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert not remembers_nothing(fleet)


def test_the_stored_answer_counts_though_the_lease_ended_with_the_task(fleet) -> None:
    fleet.beats(lease=LeaseState.LOST)

    def answer_is_lost(_request) -> Reply:
        fleet.heartbeat.beat()
        return HANG_UP

    fleet.coordinator.on("POST /gradient", answer_is_lost, accepts)
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert not remembers_nothing(fleet)


def test_a_result_that_is_never_answered_is_dropped_with_its_lease(fleet) -> None:
    fleet.beats(lease=LeaseState.LOST)

    def never(_request) -> Reply:
        fleet.heartbeat.beat()
        return HANG_UP

    fleet.coordinator.on("POST /gradient", never)
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert len(fleet.submissions()) == 6
    assert remembers_nothing(fleet)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (409, ErrorCode.STALE_BASE),
        (400, ErrorCode.WRONG_LENGTH),
        (400, ErrorCode.NON_FINITE),
        (422, ErrorCode.SUBMISSION_CONFLICT),
    ],
)
def test_a_refused_submission_is_dropped_and_given_back(fleet, status, code) -> None:
    fleet.coordinator.on("POST /gradient", refuses(status, code))
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert [code in release["reason"] for release in fleet.releases()] == [True]
    assert not fleet.failures()
    assert remembers_nothing(fleet)


def test_after_a_refused_submission_it_waits_before_the_next_claim(fleet) -> None:
    fleet.coordinator.on("POST /gradient", refuses(422, ErrorCode.NON_FINITE))
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert sum(fleet.waits) >= TROUBLE_S


def test_a_submission_that_was_filtered_teaches_nothing(fleet) -> None:
    answer = SubmissionAnswer(state=SubmissionState.FILTERED, round_id=1)
    fleet.coordinator.on("POST /gradient", says(answer))
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert remembers_nothing(fleet)


def test_a_lost_lease_ends_the_work_without_a_word(fleet) -> None:
    fleet.hands_out(fleet.task(), fleet.task())
    fleet.turns(1)
    fleet.beats(lease=LeaseState.LOST)
    fleet.trainer.during = fleet.heartbeat.beat

    fleet.turns(1)

    assert len(fleet.submissions()) == 1
    assert not fleet.failures()
    assert not fleet.releases()
    assert not remembers_nothing(fleet)
    # The lost training started from the same moments as the one that follows it.
    assert [m and m.step[0].item() for m in fleet.trainer.started_from] == [None, 2, 2]


def test_a_lease_that_nothing_renews_ends_the_work(fleet) -> None:
    fleet.hands_out(fleet.task(lease_s=5.0))
    fleet.trainer.during = lambda: fleet.sleep(5.0)

    fleet.turns(1)

    assert fleet.trainer.num_steps == 1
    assert not fleet.submissions()


def test_a_lease_counts_from_the_moment_before_its_claim_was_sent(fleet) -> None:
    def slow(_request) -> Reply:
        fleet.now[0] += 4.0
        return says(fleet.task(lease_s=5.0))

    fleet.coordinator.on("POST /work", slow)

    fleet.turns(1)

    assert fleet.trainer.num_steps == 1  # a second each; the claim took four
    assert not fleet.submissions()


def test_a_lease_that_ends_with_the_last_step_is_not_submitted(fleet) -> None:
    fleet.hands_out(fleet.task(lease_s=5.0))
    fleet.trainer.afterwards = lambda: fleet.sleep(5.0)

    fleet.turns(1)

    assert fleet.trainer.num_steps == 2
    assert not fleet.submissions()


def test_an_expired_lease_is_refused_on_submission(fleet) -> None:
    fleet.coordinator.on("POST /gradient", refuses(409, ErrorCode.LEASE_LOST))
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert not fleet.releases()
    assert remembers_nothing(fleet)


def test_an_evaluation_is_scored_and_sent_until_answered(fleet) -> None:
    fleet.coordinator.on("POST /tasks/t1/evaluation", HANG_UP, EVALUATED)
    fleet.hands_out(fleet.task(kind=TaskKind.EVALUATE, text_bytes=500))

    fleet.turns(1)

    first, second = fleet.coordinator.asked("POST /tasks/t1/evaluation")
    assert first.body == second.body
    sent = first.json()
    assert (sent["version"], sent["nats"], sent["bytes"]) == (1, 123.0, 500)
    assert not fleet.submissions()
    assert remembers_nothing(fleet)


def test_a_score_that_is_no_number_is_not_sent(fleet) -> None:
    fleet.trainer.nats = math.nan
    fleet.hands_out(fleet.task(kind=TaskKind.EVALUATE, text_bytes=500))

    fleet.turns(1)

    assert [failed["code"] for failed in fleet.failures()] == ["non_finite_loss"]
    assert not fleet.coordinator.asked("POST /tasks/t1/evaluation")


def test_a_download_is_tried_no_longer_than_the_lease_lives(fleet) -> None:
    fleet.coordinator.on("GET /weights/1", *[HANG_UP] * 50, refuses(404, "gone"))
    fleet.hands_out(fleet.task(lease_s=20.0))

    fleet.turns(1)

    assert 1 < len(fleet.coordinator.asked("GET /weights/1")) < 50
    assert not fleet.failures()


@pytest.mark.parametrize("kind", list(TaskKind))
def test_a_synthetic_shard_is_refused_before_anything_is_fetched(fleet, kind) -> None:
    fleet.hands_out(fleet.task(kind=kind, synthetic=True))

    fleet.turns(1)

    (failure,) = fleet.failures()
    assert failure["code"] == FailCode.SYNTHETIC_SHARD
    assert "BITNET_ALLOW_SYNTHETIC_SHARDS" in failure["message"]
    assert not fleet.coordinator.asked("GET /weights/1")


def test_a_synthetic_shard_is_trained_where_that_is_allowed(
    coordinator, tmp_path
) -> None:
    fleet = Fleet(coordinator, tmp_path, BITNET_ALLOW_SYNTHETIC_SHARDS="true")
    fleet.hands_out(fleet.task(synthetic=True))

    fleet.turns(1)

    assert len(fleet.submissions()) == 1
    fleet.close()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"base_sha256": "1" * 64}, FailCode.BAD_WEIGHTS),
        ({"shard_sha256": "1" * 64}, FailCode.BAD_SHARD),
        ({"shard_bytes": 8}, FailCode.BAD_SHARD),
        ({"codec": "zip"}, FailCode.WORKER_ERROR),
    ],
)
def test_a_task_that_cannot_be_done_is_failed_with_its_code(
    fleet, changes, code
) -> None:
    fleet.hands_out(msgspec.structs.replace(fleet.task(), **changes))

    fleet.turns(1)

    assert [failure["code"] for failure in fleet.failures()] == [code]
    assert not fleet.submissions()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("a bug"), FailCode.WORKER_ERROR),
        (MemoryError(), FailCode.OUT_OF_MEMORY),
        (RuntimeError("x: can't allocate memory: y"), FailCode.OUT_OF_MEMORY),
    ],
)
def test_an_unexpected_error_is_told_logged_and_survived(
    fleet, caplog, error, code
) -> None:
    def explode() -> None:
        raise error

    fleet.trainer.during = explode
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    (failure,) = fleet.failures()
    assert failure["code"] == code
    assert type(error).__name__ in failure["message"]
    assert any(r.exc_info and r.event == "task.failed" for r in caplog.records)
    assert remembers_nothing(fleet)


def test_a_broken_worker_waits_longer_with_each_failure(fleet) -> None:
    fleet.hands_out(*[fleet.task(codec="zip")] * 6)
    waits = []

    for _ in range(6):
        fleet.waits.clear()
        fleet.turns(1)
        waits.append(sum(fleet.waits))

    assert min(waits) >= TROUBLE_S
    assert max(waits[3:]) > max(waits[:2])


def test_a_long_story_of_a_failure_is_cut_to_what_is_taken(fleet) -> None:
    def fail() -> None:
        raise RuntimeError("x" * 10_000)

    fleet.trainer.during = fail
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    (failed,) = fleet.failures()
    assert len(failed["message"]) == 2000


def test_success_ends_the_back_off(fleet) -> None:
    fleet.hands_out(fleet.task(codec="zip"), fleet.task())

    fleet.turns(1)
    fleet.waits.clear()
    fleet.turns(1)

    assert not fleet.waits


def test_each_stage_has_its_phase(fleet) -> None:
    seen = []

    def note(request) -> Reply:
        seen.append((request.path, fleet.heartbeat.phase))
        return accepts(request)

    fleet.coordinator.on("POST /gradient", note)
    fleet.trainer.during = lambda: seen.append(("train", fleet.heartbeat.phase))
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    assert seen == [
        ("train", WorkerPhase.TRAINING),
        ("/gradient", WorkerPhase.UPLOADING),
    ]


def test_bytes_down_and_up_count_as_progress_of_the_lease(fleet) -> None:
    leases = []
    fleet.trainer.during = lambda: leases.append(fleet.heartbeat.lease)
    fleet.hands_out(fleet.task())

    fleet.turns(1)

    (request,) = fleet.coordinator.asked("POST /gradient")
    (lease,) = leases
    moved = len(fleet.frame) + fleet.tokens.nbytes + len(request.body)
    assert (lease.bytes_done, lease.tokens_done, lease.step_s) == (moved, 128, 1.0)
