"""What `status` prints, letter by letter."""

from __future__ import annotations

import msgspec

from coordinator.service.view import RollbackView
from coordinator.store import workers
from coordinator.terminal import status_text
from tests.unit.coordinator.fleets import World
from tests.unit.coordinator.test_looking import looked


def shown(world: World) -> list[str]:
    return status_text(looked(world, history=False)).splitlines()


def test_a_fleet_is_shown_worst_first(running: World):
    for name in ("alder", "birch", "cedar"):
        running.register(name)
    running.set_speed("w1", 2.0)
    running.set_speed("birch", 2.0)
    late, silent = running.claimed("w1"), running.claimed("birch")
    for beat in range(1, 15):
        running.clock.advance(5.0)
        running.heartbeat(late, "w1", tokens_done=beat)
        running.heartbeat(worker_id="alder")
    running.write(lambda c: workers.change_worker(c, "cedar", gone_at=1.0))

    assert shown(running) == [
        "run      r-1 (tiny), running, epoch 1, version 1, 0 tokens",
        "ETA      unknown. No token budget is set.",
        "rate     0 (peak 0.002), warm-up until 100000 accepted tokens, then constant. "
        "No token budget is set. Weight decay 0.1.",
        "training delta rounds, local steps by muon; fp32 up, whole versions down.",
        "round    1 on version 1, open, 0 of 2 back",
        "time     60 s a round. Overhead not measured yet. Fixed.",
        "tasks    0 pending, 2 leased (1 soft-expired, 1 stuck), 0 done, 0 failed; "
        "1264 tokens not cut yet",
        "workers  1 slow, 1 idle, 1 lost, 1 gone",
        "",
        "VERDICT  WORKER  TASK            TOKENS/S  HEARTBEAT  ELAPSED  PREDICTED  "
        "EVIDENCE",
        f"lost     birch   {silent.task_id}  2.0       70 s       70 s     60 s       "
        "No heartbeat for 70 s, limit 30 s.",
        f"slow     w1      {late.task_id}  2.0       0 s        70 s     60 s       "
        "12 % of its task done after 70 s, predicted 60 s.",
        "idle     alder   -               -         0 s        -        -          "
        "Holds no task.",
    ]


def test_a_run_that_goes_back_says_so_with_both_versions_and_losses(running: World):
    view = looked(running)
    rollback = RollbackView(
        version=None,
        at=None,
        from_version=70,
        from_loss=5.5,
        to_version=40,
        to_loss=None,
    )

    def lines(rollback: RollbackView) -> list[str]:
        run = msgspec.structs.replace(
            view.run, loss_alarm="It rose.", rollback=rollback
        )
        shown = msgspec.structs.replace(view, run=run)
        return status_text(shown).splitlines()[2:4]

    ways = "from version 70 (held-out loss 5.5000) to version 40 (not scored)"
    assert lines(rollback) == [
        "ALARM    Held-out loss has risen. It rose.",
        f"rollback about to go back {ways}, once the round is closed",
    ]
    made = msgspec.structs.replace(rollback, version=72, at=1e9)
    assert lines(made)[1] == f"rollback went back {ways}, which is version 72 now"


def test_the_end_is_a_moment_with_its_window(running: World):
    view = looked(running)
    eta = msgspec.structs.replace(
        view.run.eta, at=1e9, earliest_at=1e9 - 60, latest_at=1e9 + 90.4, reason="So."
    )
    run = msgspec.structs.replace(view.run, eta=eta)

    text = status_text(msgspec.structs.replace(view, run=run))

    assert text.splitlines()[1] == (
        "ETA      2001-09-09 01:46:40 UTC, between 2001-09-09 01:45:40 UTC and "
        "2001-09-09 01:48:10 UTC. So."
    )


def training_lines(world: World, **changes: object) -> tuple[str, str]:
    view = looked(world)
    training = msgspec.structs.replace(view.training, **changes)
    text = status_text(msgspec.structs.replace(view, training=training))
    rate, training_line = text.splitlines()[2:4]
    return rate, training_line


def test_the_rate_is_told_with_its_stage_and_the_tokens_that_end_it(running: World):
    scheduled = {"learning_rate": 0.0014667, "constant_reason": None}
    first, _ = training_lines(
        running, **scheduled, stage="first stage", stage_end_tokens=5000
    )
    over, _ = training_lines(
        running,
        learning_rate=0.0,
        constant_reason=None,
        stage="over",
        stage_end_tokens=None,
        weight_decay=0.0,
    )
    constant, _ = training_lines(
        running,
        learning_rate=0.002,
        constant_reason="So short.",
        stage="constant",
        stage_end_tokens=None,
    )

    assert first == (
        "rate     0.00147 (peak 0.002), first stage until 5000 accepted tokens. "
        "Weight decay 0.1."
    )
    assert over == "rate     0 (peak 0.002), its schedule is over. Weight decay 0."
    assert constant == (
        "rate     0.002 (peak 0.002), constant. So short. Weight decay 0.1."
    )


def test_it_says_who_steps_how_and_what_the_last_round_sent(running: World):
    running.train_round(0.5)
    last = looked(running).training.last_round
    _, delta = training_lines(running, broadcast="ternary")
    _, arrivals = training_lines(running, aggregation="per-arrival", last_round=None)
    _, gradient = training_lines(
        running,
        round_kind="gradient",
        local_optimiser=None,
        last_round=msgspec.structs.replace(last, num_steps=None),
    )

    _, single = training_lines(
        running, last_round=msgspec.structs.replace(last, num_steps=1)
    )

    sent = f"{last.payload_bytes} bytes up."
    assert ", 1 local step of its middle worker, " in single
    assert delta == (
        "training delta rounds, local steps by muon; fp32 up, ternary links down. "
        f"Last round: 64 tokens, 4 local steps of its middle worker, {sent}"
    )
    assert arrivals == (
        "training a version for each delta, local steps by muon; "
        "fp32 up, whole versions down."
    )
    assert gradient == (
        "training gradient rounds; fp32 up, whole versions down. "
        f"Last round: 64 tokens, {sent}"
    )


def test_what_is_missing_comes_first_and_on_one_line(world: World):
    world.start_run(seeded=False)

    first, *_, last = shown(world)

    assert first == (
        "MISSING  There is nothing to train yet. bitnet-coordinator seed-real-tasks"
    )
    assert last == "workers  none has registered"
