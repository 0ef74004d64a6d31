"""What a worker is called, and the number that decided."""

from __future__ import annotations

import pytest

from bitnet_ext.wire.verdicts import Verdict
from coordinator.domain.verdicts import (
    WorkerFacts,
    heard_at,
    silence_limit_s,
    verdict,
)


def facts(
    age_s=1.0,
    heartbeat_s=5.0,
    done=None,
    due=None,
    back=False,
    still_s=0.0,
    elapsed_s=50.0,
    predicted_s=None,
    bad=None,
    cpu_s=None,
    draining=False,
    gone=False,
    lost_s=None,
    stopped=False,
):
    return WorkerFacts(
        heartbeat_age_s=age_s,
        heartbeat_s=heartbeat_s,
        tokens_done=done,
        num_tokens=due,
        back_in_round=back,
        quarantine=bad,
        no_progress_s=still_s,
        elapsed_s=elapsed_s,
        predicted_s=predicted_s,
        progress_age_s=None if done is None else still_s,
        cpu_s_since_progress=cpu_s,
        draining=draining,
        is_gone=gone,
        has_stopped=stopped,
        lease_lost_s=lost_s,
    )


@pytest.mark.parametrize(
    ("given", "word", "evidence"),
    [
        (facts(), Verdict.IDLE, "Holds no task."),
        (facts(done=0, due=80), Verdict.COMPUTING, "0 % of its task done."),
        (facts(done=20, due=80), Verdict.COMPUTING, "25 % of its task done."),
        (facts(age_s=30.0, done=20, due=80), Verdict.COMPUTING, "25 %"),
        (facts(age_s=31.0, done=20, due=80), Verdict.LOST, "for 31 s, limit 30 s"),
        (facts(age_s=31.0, heartbeat_s=6.0), Verdict.IDLE, "Holds no task."),
        (facts(age_s=37.0, heartbeat_s=6.0), Verdict.LOST, "for 37 s, limit 36 s"),
        (facts(bad="5 of 8"), Verdict.QUARANTINED, "Gets no work: 5 of 8."),
        (facts(age_s=31.0, bad="5 of 8"), Verdict.LOST, "for 31 s"),
        (facts(done=20, due=80, still_s=9.0), Verdict.COMPUTING, "25 %"),
        (facts(done=20, due=80, still_s=10.0), Verdict.STUCK, "for 10 s, limit 9 s"),
        (facts(31.0, done=20, due=80, still_s=16.0), Verdict.LOST, "for 31 s"),
        (facts(still_s=16.0), Verdict.IDLE, "Holds no task."),
        (facts(done=20, due=80, predicted_s=50.0), Verdict.COMPUTING, "25 %"),
        (
            facts(done=0, due=80, elapsed_s=9.9, predicted_s=0.3),
            Verdict.COMPUTING,
            "0 %",
        ),
        (
            facts(done=20, due=80, elapsed_s=60.0, predicted_s=50.0),
            Verdict.SLOW,
            "25 % of its task done after 60 s, predicted 50 s",
        ),
        (
            facts(done=2, due=8, still_s=16.0, elapsed_s=60.0, predicted_s=50.0),
            Verdict.STUCK,
            "without progress",
        ),
        (
            facts(done=2, due=8, still_s=16.0, cpu_s=0.44),
            Verdict.STUCK,
            "25 % of its task done. 0.4 CPU s without a token or a byte.",
        ),
        (facts(draining=True), Verdict.DRAINING, "Holds no task, and gets none."),
        (facts(back=True, draining=True), Verdict.DRAINING, "Holds no task"),
        (
            facts(done=2, due=8, draining=True),
            Verdict.DRAINING,
            "25 % of its task done; gets no other.",
        ),
        (
            facts(done=2, due=8, elapsed_s=60.0, predicted_s=50.0, draining=True),
            Verdict.SLOW,
            "predicted 50 s. Drain asked.",
        ),
        (
            facts(done=2, due=8, still_s=16.0, draining=True),
            Verdict.STUCK,
            "limit 9 s; 25 % of its task done. Drain asked.",
        ),
        (facts(31.0, draining=True), Verdict.LOST, "limit 30 s. Drain asked."),
        (facts(bad="5 of 8", draining=True), Verdict.QUARANTINED, "8. Drain asked."),
        (facts(31.0, gone=True), Verdict.GONE, "Comes back when it is heard again."),
        (facts(1.0, bad="5 of 8", gone=True), Verdict.GONE, "Put away."),
        (facts(31.0, stopped=True), Verdict.GONE, "when its process starts again."),
        (facts(1.0, gone=True, stopped=True), Verdict.GONE, "Put away."),
        (
            facts(done=2, due=8, draining=True, gone=True),
            Verdict.GONE,
            "Comes back when its process starts again.",
        ),
        (facts(back=True), Verdict.WAITING, "is back"),
        (facts(lost_s=40.0), Verdict.STUCK, "Lost its lease 40 s ago"),
        (facts(back=True, lost_s=40.0), Verdict.STUCK, "has not let go of the task"),
        (facts(draining=True, lost_s=40.0), Verdict.STUCK, "Drain asked."),
        (facts(age_s=31.0, lost_s=40.0), Verdict.LOST, "for 31 s"),
        (facts(done=1, due=2, lost_s=40.0), Verdict.COMPUTING, "50 %"),
        (facts(done=1, due=2, back=True), Verdict.COMPUTING, "50 %"),
    ],
)
def test_the_verdict_comes_with_its_evidence(given, word, evidence):
    found, why = verdict(given)

    assert found is word
    assert evidence in why
    asked = given.draining and found not in (Verdict.DRAINING, Verdict.GONE)
    assert why.endswith(" Drain asked.") == asked


def test_silence_is_six_heartbeats_and_at_least_half_a_minute():
    assert [silence_limit_s(s) for s in (1.0, 5.0, 10.0)] == [30.0, 30.0, 60.0]


@pytest.mark.parametrize(
    ("away_s", "due"),
    [(0.0, 100.0), (50.0, 150.0), (1000.0, 200.0), (-5.0, 100.0)],
    ids=["none", "some", "longer than it was silent", "a clock that went back"],
)
def test_a_pause_of_the_coordinator_is_no_silence(away_s, due):
    assert heard_at(100.0, now=200.0, away_s=away_s) == due
