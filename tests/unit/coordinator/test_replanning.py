"""A plan that changes in a run: at a version, for whole rounds, whatever happens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import select

from bitnet_ext.codecs import Codec
from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode, Optimiser, RoundKind, TaskKind
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import TrainingPlan
from coordinator.domain.plan_change import CHANGEABLE, told
from coordinator.domain.plan_words import DELTA_ONLY
from coordinator.service.closing import RoundCloser
from coordinator.service.replanning import Replanned, asked_for, in_force, set_plan
from coordinator.service.roster import plan_of
from coordinator.service.stepping import Closing, next_state
from coordinator.service.version_blobs import write_version
from coordinator.store import rounds, tasks, versions
from coordinator.store.blobs import Blobs
from coordinator.store.system import OsFs
from coordinator.store.tables import events
from coordinator.terminal import status_text
from tests.unit.coordinator.fleets import PLAN, World, body, frame, open_world
from tests.unit.coordinator.test_looking import looked
from tests.unit.coordinator.test_telemetry import dumped

GRADIENTS = msgspec.structs.replace(PLAN, round_kind=RoundKind.GRADIENT)
#: For every field another value, which is good beside the others of `PLAN`.
OTHERS = {
    "accept_late": "stale",
    "batch_size": "3",
    "beta1": "0.5",
    "beta2": "0.5",
    "broadcast": "ternary",
    "clip_norm": "2",
    "codec": "ternary",
    "eps": "1e-6",
    "evaluate_every": "1",
    "learning_rate": "0.01",
    "local_momentum": "0.5",
    "local_optimiser": "adamw",
    "outer_momentum": "0.5",
    "outer_rate": "0.5",
    "quorum": "0.5",
    "round_max_s": "500",
    "round_min_s": "5",
    "round_s": "auto",
    "schedule_tokens": "1000000",
    "second_stage_at": "0.25",
    "second_stage_rate": "0.5",
    "token_budget": "400000",
    "warmup_tokens": "10",
    "weight_decay": "0.2",
}


def ask(world: World, **words: object) -> Replanned:
    given = {name: str(word) for name, word in words.items()}
    return world.do(set_plan(world.fleet, given))


def plan(world: World) -> TrainingPlan:
    return plan_of(world.run_row())


def recorded(world: World) -> list[TrainingPlan]:
    """Return the plans that the versions were made by, without the root."""
    rows = world.read(lambda c: versions.versions_of(c, "r-1"))[1:]
    return [msgspec.json.decode(row.plan_json, type=TrainingPlan) for row in rows]


def happened(world: World, kind: str) -> list[dict[str, object]]:
    query = select(events.c.body_json).where(events.c.kind == kind)
    found = world.read(lambda c: list(c.execute(query).scalars()))
    return [msgspec.json.decode(one) for one in found]


def hand_in(world: World, task: Task, name: str = "w1", value=0.5) -> None:
    """Submit as the task asks, whatever its codec."""
    world.send(
        body(world.meta(task, name), frame(task, value, codec=Codec(task.codec)))
    )


def hashes(world: World) -> list[tuple[str, str]]:
    rows = world.read(lambda c: versions.versions_of(c, "r-1"))
    return [(row.published_sha256, row.state_sha256) for row in rows]


@pytest.fixture
def pair(running: World) -> World:
    """Workers w1 and w2, as fast as one another; w1 has claimed in the first round."""
    running.register("w2")
    for name in ("w1", "w2"):
        running.set_speed(name, 2.0)
    running.held = running.claimed("w1")
    return running


def test_a_round_that_nobody_has_claimed_in_has_the_new_plan_at_once(running: World):
    found = ask(running, codec="int8", learning_rate=0.004)

    assert (found.at_once, found.version) == (True, 1)
    assert told(found.changes) == "learning_rate 0.002 -> 0.004, codec fp32 -> int8"
    task = running.claimed()
    assert task.codec == "int8"
    assert task.hyper.lr_end == pytest.approx(0.004 * 64 / 100_000)
    hand_in(running, task)
    running.close_round()
    assert [one.codec for one in recorded(running)] == ["int8"]


def test_all_of_a_round_has_one_plan_and_the_next_round_the_new_one(pair: World):
    found = ask(pair, codec="int8", batch_size=4, outer_rate=0.1)

    assert (found.at_once, found.version) == (False, 2)
    second = pair.claimed("w2")
    assert (second.codec, second.batch_size) == ("fp32", 2)
    for task, name in ((pair.held, "w1"), (second, "w2")):
        hand_in(pair, task, name)
    pair.close_round()
    # Nesterov with a first momentum of nothing, by the rate of before.
    step = pair.state(1).weights - pair.state(2).weights
    assert step == pytest.approx(0.9 * 1.8 * 0.5, rel=1e-5)
    assert recorded(pair) == [PLAN]
    task = pair.claimed("w1")
    assert (task.codec, task.batch_size, task.base_version) == ("int8", 4, 2)
    assert plan(pair).outer_rate == 0.1
    assert asked_for(pair.run_row()) == in_force(pair.run_row())


def test_what_is_asked_for_and_what_comes_into_force_are_events(pair: World):
    ask(pair, codec="int8")
    ask(pair, quorum=0.5)
    ask(pair, quorum=0.5)  # said already
    ask(pair, codec="fp32")

    changes = {
        "codec": {"name": "codec", "before": "fp32", "after": "int8"},
        "quorum": {"name": "quorum", "before": 1.0, "after": 0.5},
    }
    said = happened(pair, "plan.set")
    assert [one["changes"] for one in said] == [
        [changes["codec"]],
        [changes["quorum"], changes["codec"]],
        [changes["quorum"]],
    ]
    assert {(one["run_id"], one["version"]) for one in said} == {("r-1", 2)}
    assert happened(pair, "plan.adopted") == []
    hand_in(pair, pair.held)
    pair.close_round()
    assert happened(pair, "plan.adopted") == [
        {"run_id": "r-1", "version": 2, "changes": [changes["quorum"]]}
    ]


def test_what_is_taken_back_in_time_never_was(pair: World):
    ask(pair, outer_rate=0.1)

    assert ask(pair, outer_rate=0.9).changes == []

    assert pair.run_row().next_plan_json is None
    hand_in(pair, pair.held)
    pair.close_round()
    assert plan(pair) == PLAN
    assert happened(pair, "plan.adopted") == []


@pytest.mark.parametrize("words", [{"codec": "int4"}, {"round_kind": "gradient"}])
def test_a_refusal_changes_nothing_and_names_the_field(pair: World, words):
    ask(pair, codec="int8")
    before = pair.everything()

    with pytest.raises(RefusedError) as caught:
        ask(pair, quorum=0.5, **words)

    (name,) = words
    assert (caught.value.code, caught.value.field) == (ErrorCode.BAD_REQUEST, name)
    assert pair.everything() == before


def test_without_a_run_there_is_no_plan(world: World):
    with pytest.raises(RefusedError) as caught:
        ask(world, codec="int8")

    assert caught.value.code is ErrorCode.NO_RUN


def test_every_field_has_another_value_to_try():
    # `test_changed_kind` is about that one.
    assert {*OTHERS, "round_kind"} == set(CHANGEABLE)


@pytest.mark.parametrize(
    ("name", "start"),
    [(name, PLAN) for name in OTHERS]
    + [(name, GRADIENTS) for name in OTHERS if name not in DELTA_ONLY],
)
def test_a_fleet_trains_on_by_each_other_value(world: World, name, start):
    world.start_run(start, token_budget=500_000)
    world.register("w1")
    world.set_speed("w1", 2.0)
    task = world.claimed()
    ask(world, **{name: OTHERS[name]})
    hand_in(world, task)
    assert world.close_round()

    for _ in range(2):
        task = world.claimed()
        if task.kind == TaskKind.EVALUATE:
            world.score(task)
            task = world.claimed()
        hand_in(world, task)
        assert world.close_round()

    first, *others = recorded(world)
    assert first == start
    if name != "token_budget":
        shown = {str(msgspec.to_builtins(one)[name]) for one in others}
        assert shown == {str(msgspec.to_builtins(plan(world))[name])}
        assert plan(world) != start
    assert plan(world) == others[-1]


# -- crashes and replays ---------------------------------------------------------


def with_change(folder: Path, words: dict[str, object], ordinal: int | None):
    """Return what a run becomes whose first round is closed with a plan ahead."""
    folder.mkdir()
    with open_world(folder) as world:
        world.start_run()
        world.register("w1")
        task = world.claimed()
        if words:
            ask(world, **words)
        hand_in(world, task)
        if ordinal is None:
            assert world.close_round()
        else:
            world.close_over_a_crash(ordinal)
        hand_in(world, world.claimed(), value=0.25)
        assert world.close_round()
        return hashes(world), recorded(world)


@pytest.mark.parametrize("ordinal", [1, 5, 9, 12, 19])
def test_a_round_that_is_closed_again_has_its_old_plan_and_the_same_bytes(
    tmp_path: Path, ordinal
):
    words = {"outer_rate": 0.1, "outer_momentum": 0.5, "codec": "int8"}

    plain, _ = with_change(tmp_path / "plain", {}, None)
    calm, plans = with_change(tmp_path / "calm", words, None)
    crashed, again = with_change(tmp_path / "crashed", words, ordinal)

    assert crashed == calm
    assert again == plans
    assert [one.outer_rate for one in plans] == [0.9, 0.1]
    # The version of the round that was under way is that of a run without a change.
    assert calm[1] == plain[1]
    assert calm[2] != plain[2]


def test_what_waits_is_adopted_by_the_next_process(tmp_path: Path):
    with open_world(tmp_path) as world:
        world.start_run()
        world.register("w1")
        task = world.claimed()
        ask(world, codec="int8", token_budget=10**6)

    with open_world(tmp_path) as again:
        hand_in(again, task)
        assert again.close_round()
        assert again.claimed().codec == "int8"
        assert again.run_row().token_budget == 10**6


def test_every_version_can_be_made_again_by_the_plan_in_its_row(
    pair: World, tmp_path: Path
):
    for words in (
        {"outer_rate": 0.5, "codec": "int8"},
        {"outer_momentum": 0.1, "codec": "ternary"},
        {"learning_rate": 0.01, "batch_size": 4},
    ):
        ask(pair, **words)
        hand_in(pair, pair.held)
        assert pair.close_round()
        pair.held = pair.claimed()
    hand_in(pair, pair.held)
    assert pair.close_round()

    blobs, state = Blobs(tmp_path / "again", OsFs(), pair.rng), pair.state(1)
    rows = pair.read(lambda c: versions.versions_of(c, "r-1"))
    for before, row in pairwise(rows):
        merged = pair.read(lambda c, row=row: made_of(c, row.version))
        closing = Closing(
            run=msgspec.structs.replace(pair.run_row(), plan_json=row.plan_json),
            live=pair.read(lambda c, row=row: rounds.find_round(c, row.round_id)),
            submissions=merged,
            version=row.version,
            tokens_before=before.tokens_total,
            factors=[found.factor for found in merged],
        )
        state = next_state(pair.fleet.blobs, closing, state, None)
        made = write_version(blobs, state, bytes.fromhex(pair.run_row().layout_hash))
        assert made.state.sha256 == row.state_sha256
    assert len(rows) == 5


def made_of(connection, version: int):
    found = rounds.submissions_since(connection, "r-1", 0)
    return [row for row in found if row.version == version]


# -- what else goes by the plan ---------------------------------------------------


def test_a_version_is_scored_by_the_plan_that_begins_with_it(pair: World):
    ask(pair, evaluate_every=1)
    hand_in(pair, pair.held)
    pair.close_round()

    assert pair.read(lambda c: tasks.evaluations_open(c, "r-1")) == {2}


def test_who_registers_is_told_the_plan_in_force(pair: World):
    ask(pair, batch_size=4, local_optimiser="adamw")

    assert pair.register("w3").batch_size == 2
    hand_in(pair, pair.held)
    pair.close_round()
    answer = pair.register("w3")
    assert (answer.batch_size, answer.optimiser) == (4, Optimiser.ADAMW)


def test_a_task_says_how_its_own_version_was_published(pair: World):
    ask(pair, broadcast="ternary")
    hand_in(pair, pair.held)
    pair.close_round()
    task = pair.claimed()
    ask(pair, broadcast="exact")

    assert (task.base_version, task.broadcast) == (2, "exact")
    hand_in(pair, task)
    pair.close_round()
    task = pair.claimed()
    assert (task.base_version, task.broadcast) == (3, "ternary")
    hand_in(pair, task)
    pair.closer = RoundCloser(pair.fleet)
    pair.close_round()
    assert pair.claimed().broadcast == "exact"


def test_what_waits_is_in_status_and_telemetry(pair: World):
    assert dumped(pair).fleet.run.plan_changes == []
    ask(pair, learning_rate=0.001, codec="int8")

    run = dumped(pair).fleet.run

    due = "learning_rate 0.002 -> 0.001, codec fp32 -> int8"
    assert told(run.plan_changes) == due
    lines = status_text(looked(pair, history=False)).splitlines()
    assert f"plan     from the next version on: {due}" in lines
    hand_in(pair, pair.held)
    pair.close_round()
    assert looked(pair).run.plan_changes == []
