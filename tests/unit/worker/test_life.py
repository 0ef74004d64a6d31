"""The life of a worker: it registers, follows its coordinator, and stops."""

from __future__ import annotations

import msgspec
import pytest

from bitnet_ext.frames import decode_frame
from bitnet_ext.layout import layout_hash
from bitnet_ext.ternary import active_isa
from bitnet_ext.wire import PROTOCOL_VERSION
from bitnet_ext.wire.verdicts import (
    ErrorCode,
    FailCode,
    LeaseState,
    TaskKind,
    WorkerPhase,
)
from tests.unit.worker.fleet import (
    EMPTY,
    OTHER,
    accepts,
    register_answer,
)
from tests.unit.worker.shapes import SMALL
from tests.unit.worker.stand_in import HANG_UP, Reply, refuses, says
from worker.errors import ProtocolError, SettingsError, StoppedError
from worker.loop import TROUBLE_S
from worker.settings import usable_cpus


def test_it_registers_calibrates_and_registers_again_with_its_speed(fleet) -> None:
    fleet.hands_out()

    fleet.turns(2)

    first, second = (r.json() for r in fleet.coordinator.asked("POST /register"))
    assert "calibrated_tokens_per_s" not in first
    assert second["calibrated_tokens_per_s"] == 1000.0
    assert second["target_task_tokens"] == 600_000
    assert first["isa"] == active_isa()
    assert first["threads"] == usable_cpus()
    assert (second["isa"], second["threads"]) == ("avx2", 3)
    assert first["worker_id"] == second["worker_id"] == "box-1"
    assert fleet.trainer.calibrated == [SMALL]
    assert fleet.num_registered == 1
    assert fleet.beacon.exists()


def test_it_says_how_it_is_tuned_with_the_figures_of_all(fleet, caplog) -> None:
    fleet.hands_out()

    with caplog.at_level("INFO"):
        fleet.turns(1)

    (said,) = (r for r in caplog.records if getattr(r, "event", "") == "worker.tuned")
    assert said.getMessage() == (
        "tuned: avx2, threads 3, micro-batch 2: 1000 tokens/s; "
        "tried avx2, threads 3, micro-batch 2: 1000"
    )
    assert (said.isa, said.threads, said.tokens_per_s) == ("avx2", 3, 1000.0)


def test_it_beats_as_often_as_the_registration_says(fleet) -> None:
    fleet.hands_out()

    fleet.turns(1)

    assert fleet.heartbeat.interval_s == 3600.0


def test_a_coordinator_without_a_run_is_waited_for(fleet) -> None:
    answer = says(register_answer(run_id="r1", shape=SMALL))
    no_run = refuses(503, ErrorCode.NO_RUN, "9")
    fleet.coordinator.on("POST /register", no_run, HANG_UP, no_run, answer)
    fleet.hands_out()

    fleet.turns(1)

    assert len(fleet.coordinator.asked("POST /register")) == 5
    assert sum(fleet.waits) >= 18.0
    assert len(fleet.coordinator.asked("POST /work")) == 1


@pytest.mark.parametrize(
    "code",
    [ErrorCode.UNAUTHORIZED, ErrorCode.PRESET_MISMATCH, ErrorCode.PROTOCOL_MISMATCH],
)
def test_a_registration_that_only_an_operator_can_mend_ends_it(fleet, code) -> None:
    fleet.coordinator.on("POST /register", refuses(400, code))

    with pytest.raises(SettingsError, match=code):
        fleet.worker.run()

    assert fleet.num_registered == 0


def test_a_coordinator_of_another_layout_ends_it(fleet) -> None:
    answer = register_answer(run_id="r1", shape=SMALL)
    other = msgspec.structs.replace(answer, layout_hash="1" * 64)
    fleet.coordinator.on("POST /register", says(other))

    with pytest.raises(ProtocolError, match="layout_hash must be"):
        fleet.worker.run()


def test_after_bad_weights_it_asks_again_which_model_is_trained(fleet) -> None:
    fleet.hands_out(fleet.task(base_version=1))
    fleet.turns(1)
    fleet.runs("r1", OTHER)
    fleet.hands_out(fleet.task(), fleet.task())

    fleet.turns(2)

    assert [failure["code"] for failure in fleet.failures()] == [FailCode.BAD_WEIGHTS]
    assert fleet.trainer.calibrated == [SMALL, OTHER]
    assert len(fleet.submissions()) == 2


def test_a_draining_worker_claims_nothing(fleet) -> None:
    fleet.beats(lease=LeaseState.NONE, drain=True)
    fleet.hands_out(fleet.task())
    fleet.heartbeat.beat()

    fleet.turns(3)
    assert not fleet.coordinator.asked("POST /work")

    fleet.beats(lease=LeaseState.NONE)
    fleet.heartbeat.beat()
    fleet.turns(1)
    assert len(fleet.submissions()) == 1


def test_a_task_held_when_the_drain_begins_is_finished(fleet) -> None:
    fleet.beats(drain=True)
    fleet.trainer.during = fleet.heartbeat.beat
    fleet.hands_out(fleet.task(), fleet.task())

    fleet.turns(2)

    assert len(fleet.submissions()) == 1


def test_a_coordinator_that_forgot_us_is_told_again(fleet) -> None:
    fleet.coordinator.on("POST /work", refuses(404, ErrorCode.UNKNOWN_WORKER), EMPTY)

    fleet.turns(2)

    registered = fleet.coordinator.asked("POST /register")
    assert len(registered) == 3
    assert registered[-1].json()["calibrated_tokens_per_s"] == 1000.0
    assert fleet.trainer.calibrated == [SMALL]


def test_a_claim_that_is_refused_again_and_again_is_asked_less_often(fleet) -> None:
    fleet.coordinator.on("POST /work", refuses(400, ErrorCode.BAD_REQUEST))
    waits = []

    for _ in range(6):
        fleet.waits.clear()
        fleet.turns(1)
        waits.append(sum(fleet.waits))

    assert min(waits) >= TROUBLE_S
    assert max(waits[3:]) > max(waits[:2])


@pytest.mark.parametrize(
    ("status", "code"),
    [(401, ErrorCode.UNAUTHORIZED), (400, ErrorCode.PROTOCOL_MISMATCH)],
)
def test_a_key_that_was_withdrawn_and_an_upgrade_end_it(fleet, status, code) -> None:
    fleet.hands_out()
    fleet.turns(1)
    refused = refuses(status, code)
    fleet.coordinator.on("POST /work", refused)
    fleet.coordinator.on("POST /register", refused)

    with pytest.raises(SettingsError, match=code):
        fleet.worker.run()

    assert fleet.coordinator.asked("POST /work")[-1].json()["protocol_version"] == (
        PROTOCOL_VERSION
    )


def test_a_hard_reset_is_followed_and_the_old_state_forgotten(fleet) -> None:
    fleet.hands_out(fleet.task())
    fleet.turns(1)
    fleet.runs("r2", OTHER)
    fleet.hands_out(fleet.task(run_id="r2"))

    fleet.turns(1)

    assert fleet.trainer.calibrated == [SMALL, OTHER]
    assert fleet.trainer.started_from == [None, None]
    _, frame = fleet.submissions()[-1]
    assert decode_frame(frame)[0].layout_hash == layout_hash(OTHER)
    assert not fleet.failures()
    assert not fleet.releases()


def test_another_run_of_the_same_model_starts_from_nothing(fleet) -> None:
    fleet.hands_out(fleet.task())
    fleet.turns(1)
    fleet.runs("r2", SMALL)
    fleet.hands_out(fleet.task(run_id="r2"))

    fleet.turns(1)

    assert fleet.trainer.calibrated == [SMALL]
    assert fleet.trainer.started_from == [None, None]
    assert len(fleet.submissions()) == 2


def test_a_task_of_a_run_that_nobody_names_is_given_back(fleet) -> None:
    fleet.hands_out(fleet.task(run_id="r9"))

    fleet.turns(1)

    (release,) = fleet.releases()
    assert "r9" in release["reason"]
    assert not fleet.submissions()


def test_told_to_stop_while_idle_it_stops(fleet) -> None:
    def stop(_request) -> Reply:
        fleet.shutdown.request()
        return EMPTY

    fleet.coordinator.on("POST /work", stop)

    fleet.worker.run()

    assert len(fleet.coordinator.asked("POST /work")) == 1
    assert fleet.heartbeat.phase is WorkerPhase.STOPPING


def test_told_to_stop_it_finishes_what_fits(fleet) -> None:
    fleet.trainer.during = fleet.shutdown.request
    fleet.hands_out(fleet.task(), fleet.task())

    fleet.worker.run()

    assert len(fleet.submissions()) == 1
    assert not fleet.releases()


def stops_late(fleet) -> None:
    """Let the worker be told to stop in mid-task, when the rest takes too long."""

    def stop_late() -> None:
        fleet.now[0] += 50.0
        fleet.shutdown.request()

    fleet.trainer.during = stop_late


def test_told_to_stop_it_hands_in_what_it_has_where_the_rest_does_not_fit(
    fleet,
) -> None:
    stops_late(fleet)
    fleet.hands_out(fleet.task())

    fleet.worker.run()

    ((meta, _frame),) = fleet.submissions()
    assert (meta.tokens, meta.num_steps) == (64, 1)
    assert not fleet.releases()


def test_an_evaluation_that_does_not_fit_is_given_back(fleet) -> None:
    stops_late(fleet)
    fleet.hands_out(fleet.task(kind=TaskKind.EVALUATE, num_steps=0, text_bytes=99))

    fleet.worker.run()

    assert not fleet.coordinator.asked("POST /tasks/t1/evaluation")
    assert len(fleet.releases()) == 1


def test_what_is_handed_in_at_the_end_is_given_back_where_nobody_answers(fleet) -> None:
    stops_late(fleet)
    fleet.coordinator.on("POST /gradient", HANG_UP)
    fleet.hands_out(fleet.task(lease_s=1e6))

    fleet.worker.run()

    assert fleet.submissions()
    assert len(fleet.releases()) == 1


def test_told_to_take_no_more_work_it_hands_in_what_it_has(fleet) -> None:
    def drain() -> None:
        fleet.beats(drain=True)
        fleet.heartbeat.beat()

    fleet.trainer.during = drain
    fleet.hands_out(fleet.task(), fleet.task())

    fleet.turns(2)

    ((meta, _frame),) = fleet.submissions()
    assert meta.tokens == 64
    assert len(fleet.coordinator.asked("POST /work")) == 1


@pytest.mark.parametrize(
    ("stop_after_s", "tokens"), [(None, 128), (1.5, 128), (0.9, 64), (5.0, 128)]
)
def test_a_task_that_takes_too_long_is_handed_in_as_it_is(
    fleet, stop_after_s, tokens
) -> None:
    # A step is a second, and of 1.5 s the other step would be two thirds.
    fleet.hands_out(fleet.task(stop_after_s=stop_after_s))

    fleet.turns(1)

    ((meta, _frame),) = fleet.submissions()
    assert meta.tokens == tokens


def test_nobody_wants_the_crumb_of_a_task(fleet) -> None:
    def slow_start() -> None:
        fleet.now[0] += 3.0

    fleet.trainer.during = slow_start
    fleet.hands_out(fleet.task(stop_after_s=3.0), fleet.task(stop_after_s=30.0))

    fleet.turns(2)

    assert [meta.tokens for meta, _ in fleet.submissions()] == [64, 128]


def test_what_fits_includes_the_time_that_the_last_submission_took(fleet) -> None:
    def slowly(request) -> Reply:
        fleet.now[0] += 40.0
        return accepts(request)

    fleet.coordinator.on("POST /gradient", slowly)
    fleet.hands_out(fleet.task(), fleet.task())
    fleet.turns(1)
    fleet.trainer.during = fleet.shutdown.request

    with pytest.raises(StoppedError):
        fleet.turns(1)

    assert len(fleet.submissions()) == 1
    assert len(fleet.releases()) == 1


def test_what_became_of_a_task_is_told_no_longer_than_its_lease_lives(fleet) -> None:
    fleet.coordinator.on("POST /tasks/t1/fail", *[HANG_UP] * 50, EMPTY)
    fleet.hands_out(fleet.task(codec="zip", lease_s=20.0))

    fleet.turns(1)

    assert 1 < len(fleet.failures()) < 50


def test_told_to_stop_it_gives_back_no_longer_than_its_grace_lasts(fleet) -> None:
    fleet.coordinator.on("POST /tasks/t1/release", *[HANG_UP] * 50, EMPTY)

    def stop(request) -> Reply:
        fleet.shutdown.request()
        return says(fleet.task(lease_s=1e6))

    fleet.coordinator.on("POST /work", stop)

    with pytest.raises(StoppedError):
        fleet.turns(1)

    assert 1 < len(fleet.releases()) < 50
    assert sum(fleet.waits) <= 2 * fleet.settings.shutdown_s


def test_told_to_stop_before_the_first_step_it_gives_the_task_back(fleet) -> None:
    def stop(request) -> Reply:
        fleet.shutdown.request()
        return says(fleet.task())

    fleet.coordinator.on("POST /work", stop)

    with pytest.raises(StoppedError):
        fleet.worker.turn()

    assert not fleet.trainer.started_from
    assert len(fleet.releases()) == 1
