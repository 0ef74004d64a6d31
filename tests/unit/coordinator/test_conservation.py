"""Whatever happens in whatever order: no token is lost, none is trained twice.

Hypothesis makes up histories of a fleet on the real store and the real use cases. After
each step every token of every epoch has one place, no two leases overlap, and states
have only moved as `docs/states.md` says.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, func, select, text

from bitnet_ext.codecs import Codec
from bitnet_ext.wire.messages import Task
from bitnet_ext.wire.verdicts import ErrorCode, SubmissionState, TaskState
from coordinator.domain.accounting import Fate
from coordinator.domain.errors import RefusedError
from coordinator.domain.plan import AcceptLate, Aggregation, TrainingPlan
from coordinator.service.closing import RoundCloser
from coordinator.service.grace import extend_leases
from coordinator.service.replanning import set_plan
from coordinator.service.returning import sweep_leases
from coordinator.service.starting import reconcile
from coordinator.service.sweeping import keep_clock
from coordinator.service.tending import (
    drain_worker,
    kick_stuck,
    kick_worker,
    put_away,
    readmit_worker,
    requeue_failed,
    resume_worker,
)
from coordinator.store.tables import (
    claims,
    events,
    ranges,
    rounds,
    runs,
    submissions,
    tallies,
    tasks,
    versions,
)
from coordinator.store.tasks import all_leased
from tests.unit.coordinator.fleets import World, body, frame, open_world

NAMES = ["w1", "w2", "w3", "w4"]
#: Short rounds, so that leases, rounds and epochs end within a short story.
PLAN = TrainingPlan(batch_size=2, round_s=20.0, codec="fp32", evaluate_every=10**6)
PLANS = [
    PLAN,
    msgspec.structs.replace(PLAN, quorum=0.3, accept_late=AcceptLate.STALE),
    msgspec.structs.replace(
        PLAN, aggregation=Aggregation.PER_ARRIVAL, outer_momentum=0.0
    ),
]
#: What a submission holds, everywhere: mostly what is fine, now and then what a guard
#: leaves out (too large, zeros, against all others), or what no step survives.
VALUES = [*[1e-3] * 6, 1.0, 0.0, -1e-3, 3e38]
MOST_OF_INT8 = 1e32
SOME_VALUES = st.lists(st.sampled_from(VALUES), min_size=1, max_size=len(NAMES))
#: What may be asked of the plan: what it is, and another.
WORDS = [
    {"batch_size": "2", "codec": "fp32", "round_s": "20"},
    {"batch_size": "3", "codec": "int8", "round_s": "9"},
]
#: And of the kind of round.
KINDS = [
    {"round_kind": "gradient", "learning_rate": "0.02"},
    {"round_kind": "delta", "learning_rate": "0.002"},
]
AFTER_S = st.sampled_from([0.1, 5.0, 15.0, 40.0])
WHICH = st.integers(0, len(NAMES) - 1)
STATES = Path(__file__).parents[3] / "docs" / "states.md"
#: Tables with states, and the heading in `docs/states.md` over how they move.
HEADINGS = {
    "tasks": "Task",
    "submissions": "Submission",
    "rounds": "Round",
    "runs": "Run",
}


def moves_allowed() -> dict[str, set[tuple[str, str]]]:
    """Return (before, after) by table, as the diagrams say; "[*]" before the first."""
    return {table: _moves_under(heading) for table, heading in HEADINGS.items()}


def _moves_under(heading: str) -> set[tuple[str, str]]:
    section = STATES.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    diagram = section.split("```mermaid")[1].split("```")[0]
    labels = dict(re.findall(r"^ +(\w+): (\w+),", diagram, re.M))
    arrows = re.findall(r"^ +(\S+) --> ([^\s:]+)", diagram, re.M)
    return {(labels.get(a, a), labels.get(b, b)) for a, b in arrows}


def watch_states(connection: Connection) -> None:
    """Let the database note every move of a state, those within a transaction too."""
    connection.execute(text("CREATE TABLE moves (what TEXT, was TEXT, became TEXT)"))
    for table in HEADINGS:
        for event, was in (("INSERT ON", "'[*]'"), ("UPDATE ON", "old.state")):
            connection.execute(
                text(
                    f"CREATE TRIGGER {table}_{event[:6]} AFTER {event} {table} "
                    f"WHEN new.state <> {was} BEGIN "
                    f"INSERT INTO moves VALUES ('{table}', {was}, new.state); END"
                )
            )


def moves(connection: Connection) -> dict[str, set[tuple[str, str]]]:
    """Return (before, after) of all that has moved, by table."""
    found = defaultdict(set)
    for what, was, became in connection.execute(text("SELECT * FROM moves")):
        found[what].add((was, became))
    return found


def pieces(connection: Connection) -> dict[tuple[int, str], list[tuple[int, int]]]:
    """Return who accounts for what: (start, end) by epoch and shard, sorted."""
    found = defaultdict(list)
    for row in connection.execute(select(ranges)):
        found[row.epoch, row.shard_id].append((row.start_token, row.num_tokens))
    for row in connection.execute(select(tasks).where(tasks.c.state != "done")):
        found[row.epoch, row.shard_id].append((row.start_token, row.num_tokens))
    for row in connection.execute(
        select(submissions).where(submissions.c.state != "filtered")
    ):
        found[row.epoch, row.shard_id].append((row.start_token, row.tokens))
    return {
        key: sorted((start, start + size) for start, size in stretches)
        for key, stretches in found.items()
    }


def check(world: World, *, per_arrival: bool) -> None:
    """Every epoch that has begun is covered once, without gap or overlap."""
    found, run = world.read(pieces), world.run_row()
    shards = world.fleet.the_manifest().train_shards()
    assert len(found) == run.epoch * len(shards)
    for epoch in range(1, run.epoch + 1):
        for shard in shards:
            position = 0
            for start, end in found[epoch, shard.shard_id]:
                assert start == position
                position = end
            assert position == shard.num_tokens
    world.read(lambda connection: check_rows(connection, per_arrival=per_arrival))


def check_rows(connection: Connection, *, per_arrival: bool) -> None:
    leased = list(connection.execute(select(tasks).where(tasks.c.state == "leased")))
    live = connection.execute(select(rounds).where(rounds.c.state != "closed")).one()
    counted = connection.execute(
        select(submissions.c.tokens).where(submissions.c.state != "filtered")
    )
    accepted = connection.execute(select(runs.c.tokens_accepted)).scalar_one()
    assert len({row.lease_worker_id for row in leased}) == len(leased)
    places = sorted(
        (row.epoch, row.shard_id, row.start_token, row.num_tokens) for row in leased
    )
    for (*shard, start, num_tokens), (*other, next_start, _) in pairwise(places):
        assert shard != other or start + num_tokens <= next_start
    if per_arrival:
        assert {row.base_version for row in leased} <= set(range(live.base_version + 1))
        made = connection.execute(select(versions.c.num_submissions)).scalars()
        assert set(made) <= {0, 1}
    else:
        assert {row.round_id for row in leased} <= {live.round_id}
        assert {row.base_version for row in leased} <= {live.base_version}
    assert sum(tokens for (tokens,) in counted) == accepted
    check_tallies(connection, accepted)
    check_counts(connection)


def check_counts(connection: Connection) -> None:
    """What a run counts as it goes is what its rows add up to."""
    run = connection.execute(select(runs)).one()
    done = select(func.count()).where(tasks.c.state == "done", tasks.c.kind == "train")
    of_epoch = select(func.coalesce(func.sum(submissions.c.tokens), 0)).where(
        submissions.c.epoch == run.epoch, submissions.c.state != "filtered"
    )
    assert run.tasks_done == connection.execute(done).scalar_one()
    assert run.epoch_tokens_accepted == connection.execute(of_epoch).scalar_one()


def check_tallies(connection: Connection, accepted: int) -> None:
    """Every trained token of a claim that has ended has one fate."""
    trained = connection.execute(select(func.sum(claims.c.tokens_done))).scalar_one()
    fates = dict.fromkeys(Fate, 0)
    for row in connection.execute(select(tallies)):
        assert row.tokens >= 0
        fates[Fate(row.fate)] += row.tokens
    assert sum(fates.values()) == (trained or 0)
    assert fates[Fate.ACCEPTED] + fates[Fate.APPLIED] == accepted


def half_of(task: Task) -> dict[str, int]:
    """Return what a submission says of half the steps of a task, at least one."""
    num_steps = max(1, task.num_steps // 2)
    tokens = min(num_steps * task.batch_size * task.seq_len, task.byte_length // 4)
    return {"num_steps": num_steps, "tokens": tokens}


def sizes_of_pending(connection: Connection) -> dict[str, int]:
    """Return the tokens of every task that may be claimed."""
    query = select(tasks.c.task_id, tasks.c.num_tokens).where(
        tasks.c.state == "pending"
    )
    return {task_id: size for task_id, size in connection.execute(query)}


class Histories(RuleBasedStateMachine):
    """What may befall a fleet. `happened` counts, over all histories."""

    def __init__(self, happened: Counter[str]) -> None:
        super().__init__()
        self.happened = happened
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(TemporaryDirectory()))
        self.world = self.stack.enter_context(open_world(folder))
        #: What each worker takes for its own, and what was accepted last.
        self.held: dict[str, Task] = {}
        self.accepted = None

    @initialize(plan=st.sampled_from(PLANS))
    def begin(self, plan: TrainingPlan) -> None:
        self.quorum = plan.quorum
        self.per_arrival = plan.aggregation is Aggregation.PER_ARRIVAL
        self.world.write(watch_states)
        self.world.start_run(plan)
        for name in NAMES:
            self.world.register(name)

    def teardown(self) -> None:
        kinds = self.world.read(lambda c: list(c.execute(select(events.c.kind))))
        self.happened.update(kind for (kind,) in kinds)
        assert self.quorum < 1 or ("lease.late",) not in kinds
        for what, which in self.world.read(moves).items():
            self.happened.update((what, *move) for move in which)
        self.stack.close()

    @invariant()
    def every_token_has_one_place_and_every_state_moved_as_it_may(self) -> None:
        check(self.world, per_arrival=self.per_arrival)
        for what, which in self.world.read(moves).items():
            assert which <= ALLOWED[what], what

    @rule(names=st.permutations(NAMES), many=st.integers(1, len(NAMES)))
    def claim(self, names: list[str], many: int) -> None:
        for name in names[:many]:
            sizes = self.world.read(sizes_of_pending)
            task = self.world.claim(name)
            if task is not None:
                assert not self.world.worker(name).draining
                self.held[name] = task
                is_less = 4 * sizes.get(task.task_id, 0) > task.byte_length
                self.happened["given-back work divided"] += is_less

    @rule(name=st.sampled_from(NAMES), tokens_per_s=st.sampled_from([0.5, 4.0, 30.0]))
    def change_speed(self, name: str, tokens_per_s: float) -> None:
        """Let a worker be measured anew, so that tasks are of all sizes."""
        self.world.set_speed(name, tokens_per_s)

    @precondition(lambda self: self.held)
    @rule(which=WHICH, share=st.sampled_from([0.0, 0.3, 1.0]))
    def beat(self, which: int, share: float) -> None:
        name, task = self.one_held(which)
        done = int(share * task.byte_length) // 4
        self.world.heartbeat(task, name, tokens_done=done, cpu_s=done)

    @precondition(lambda self: self.held)
    @rule(values=SOME_VALUES, after_s=AFTER_S, in_part=st.booleans())
    def submit(self, values: list[float], after_s: float, in_part: bool) -> None:
        """Hand in what was trained; maybe long after the lease has ended."""
        self.world.clock.advance(after_s)
        for name, value in zip(sorted(self.held), values, strict=False):
            task = self.held.pop(name)
            trained = half_of(task) if in_part else {}
            meta = self.world.meta(task, name, **trained)
            codec = Codec(task.codec)
            held = value if codec is Codec.FP32 else min(value, MOST_OF_INT8)
            sent = body(meta, frame(task, held, codec=codec))
            if self.per_arrival:
                self.make_way(sent)
            if not self.is_late("submission", lambda sent=sent: self.world.send(sent)):
                self.accepted = (sent, self.world.send(sent))
                self.happened["part"] += 4 * meta.tokens < task.byte_length

    def make_way(self, sent: bytes) -> None:
        """Let the round of the submission before be closed: until then all wait."""
        if self.world.live_round().state != "closing":
            return
        try:
            self.world.send(sent)
        except RefusedError as error:
            self.happened[f"{error.code} while closing"] += 1
        else:
            raise AssertionError("two submissions in one round")
        self.world.close_round()

    @rule(value=st.sampled_from(VALUES), back=st.sampled_from([1, 3, 4]))
    def do_a_round(self, value: float, back: int) -> None:
        """Let one thing follow another, as it mostly does; some may not be back."""
        self.claim(NAMES, len(NAMES))
        if self.held:
            self.submit([value, *[1e-3] * (back - 1)], 5.0, in_part=False)
        self.wait(6.0)
        self.close()

    @precondition(lambda self: self.accepted)
    @rule()
    def repeat(self) -> None:
        """Send again what was accepted: it gets its answer, and counts once."""
        sent, answer = self.accepted
        assert self.world.send(sent) == answer

    @precondition(lambda self: self.held)
    @rule(which=WHICH, fails=st.booleans(), after_s=AFTER_S)
    def give_back(self, which: int, fails: bool, after_s: float) -> None:
        self.world.clock.advance(after_s)
        name, task = self.one_held(which)
        del self.held[name]
        act = self.world.fail if fails else self.world.release
        self.is_late("return", lambda: act(task, name))

    @rule(seconds=st.sampled_from([1.0, 6.0, 31.0]))
    def wait(self, seconds: float) -> None:
        self.world.clock.advance(seconds)
        self.world.sweep()

    @rule()
    def close(self) -> None:
        self.world.sweep()
        self.world.close_round()

    @rule(
        name=st.sampled_from(NAMES),
        act=st.sampled_from(
            [drain_worker, resume_worker, put_away, readmit_worker, kick_worker]
        ),
    )
    def tend(self, name: str, act) -> None:
        """Let an operator do something about a worker, where it makes sense."""
        with suppress(RefusedError):
            self.world.do(act(self.world.fleet, name))

    @rule(words=st.sampled_from(WORDS))
    def replan(self, words: dict[str, str]) -> None:
        """Ask for another plan, or take that back; nobody is refused for it."""
        self.claim(NAMES, 2)
        found = self.world.do(set_plan(self.world.fleet, words))
        self.happened["asked while a round is on its way"] += not found.at_once

    @precondition(lambda self: not self.per_arrival)
    @rule(words=st.sampled_from(KINDS))
    def change_kind(self, words: dict[str, str]) -> None:
        """Ask for rounds of the other kind, whatever is out or waits."""
        found = self.world.do(set_plan(self.world.fleet, words))
        self.happened["another kind at once"] += found.at_once and bool(found.changes)

    @rule()
    def kick_all(self) -> None:
        self.world.do(kick_stuck(self.world.fleet))

    @rule()
    def requeue_all(self) -> None:
        self.world.do(requeue_failed(self.world.fleet, None))

    @rule(seconds=st.sampled_from([11.0, 60.0, 7200.0]))
    def stand_still(self, seconds: float) -> None:
        """Let the coordinator itself sleep: no lease runs out for that."""
        self.claim(NAMES, 2)
        held, expired = self.alive(), self.num_expired()
        self.world.fleet.swept_at = self.world.clock.monotonic()
        self.world.clock.advance(seconds)
        self.world.do(sweep_leases(self.world.fleet))
        self.world.fleet.swept_at = None
        assert self.num_expired() == expired
        self.happened["slept with a lease out"] += held

    @rule(jump_s=st.sampled_from([0.0, 40.0, 7200.0]))
    def restart(self, jump_s: float) -> None:
        """Start anew, perhaps with a wall clock that jumped ahead meanwhile."""
        self.claim(NAMES, 2)
        held, expired = self.alive(), self.num_expired()
        self.world.do(keep_clock(self.world.fleet))
        self.world.clock.advance(jump_s)
        reconcile(self.world.fleet)
        extend_leases(self.world.fleet)
        self.world.closer = RoundCloser(self.world.fleet)
        self.world.sweep()
        assert self.num_expired() == expired
        self.happened["restarted with a lease out"] += held

    def alive(self) -> int:
        """Return how many leases there are; those that are over end first."""
        self.world.sweep()
        return len(self.world.read(all_leased))

    def num_expired(self) -> int:
        """Return how many leases have ever run out."""
        query = select(events).where(events.c.kind == "lease.expired")
        return len(self.world.read(lambda c: c.execute(query).all()))

    def one_held(self, which: int) -> tuple[str, Task]:
        """Return one of the workers that think they hold a task, and the task."""
        return sorted(self.held.items())[which % len(self.held)]

    def is_late(self, what: str, act) -> bool:
        """Return whether it was refused, as its lease is lost."""
        try:
            act()
        except RefusedError as error:
            if error.code is not ErrorCode.LEASE_LOST:
                raise
            self.happened[f"{what} too late"] += 1
            return True
        return False


ALLOWED = moves_allowed()
#: What must have happened in some history, or they would prove little.
DUE = {
    "submission.accepted",
    "submission.filtered",
    "lease.expired",
    "lease.released",
    "lease.failed",
    "lease.late",
    "version.published",
    "plan.adopted",
    "asked while a round is on its way",
    "another kind at once",
    "submission too late",
    "return too late",
    "given-back work divided",
    "part",
    "slept with a lease out",
    "restarted with a lease out",
    "busy while closing",
    ("tasks", "leased", "done"),
    ("tasks", "leased", "pending"),
    ("rounds", "closing", "closed"),
    ("submissions", "accepted", "applied"),
    ("submissions", "accepted", "filtered"),
}


def test_every_token_of_an_epoch_is_accounted_for_once() -> None:
    happened = Counter()
    run_state_machine_as_test(
        lambda: Histories(happened),
        settings=settings(
            max_examples=80,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            # Making a history shorter takes minutes: each has a database of its own.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )

    assert {what for what in DUE if not happened[what]} == set()


def test_the_diagrams_of_states_are_understood() -> None:
    states = {what: {one for move in ALLOWED[what] for one in move} for what in ALLOWED}

    assert states["tasks"] == {"[*]", *TaskState}
    assert states["submissions"] == {"[*]", *SubmissionState}
    assert states["rounds"] == {"[*]", "open", "closing", "closed"}
    assert states["runs"] == {"[*]", "running", "finished"}
    assert ("leased", "done") in ALLOWED["tasks"]
    assert ("done", "pending") not in ALLOWED["tasks"]
