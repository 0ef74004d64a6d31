"""Commands over the socket of a running coordinator: a real socket, a real fleet."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from coordinator import verbs
from coordinator.app import KEY_NAME
from coordinator.control import (
    SOCKET_NAME,
    AcknowledgeReset,
    ControlServer,
    DrainWorker,
    DumpTelemetry,
    GoBack,
    KickStuck,
    MarkGone,
    Outcome,
    RequeueFailed,
    ResetPassword,
    ResumeWorker,
    Seed,
    SetPlan,
    Status,
    TrainFor,
    ask,
)
from coordinator.domain.errors import StartError
from coordinator.login.passwords import password_matches
from coordinator.service.feed import Feed
from coordinator.service.lag import LoopLag
from coordinator.service.roster import plan_of
from coordinator.service.telemetry import Telemetry
from coordinator.service.view import FleetView
from coordinator.settings import CoordinatorSettings
from coordinator.store import runs
from coordinator.store.sessions import find_password_hash
from tests.fakes import START
from tests.unit.coordinator.fleets import World


@contextlib.asynccontextmanager
async def serving(world: World, folder: Path, *, key_is_set: bool = False):
    feed = Feed(
        world.fleet, LoopLag(world.clock), insecure_http=False, is_watched=lambda: True
    )
    server = ControlServer(world.fleet, feed, folder, key_is_set=key_is_set)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def asked(world: World, folder: Path, *commands) -> list[str | None]:
    """Ask a running coordinator one command after another."""

    async def story():
        async with serving(world, folder):
            return [await asyncio.to_thread(ask, folder, c) for c in commands]

    return world.do(story())


def key_of(world: World, folder: Path, *, key_is_set: bool) -> str:
    """Ask for the key of workers beside a running coordinator."""
    settings = CoordinatorSettings.from_env({"BITNET_COORD_DATA": str(folder)})

    async def story():
        async with serving(world, folder, key_is_set=key_is_set):
            return await asyncio.to_thread(verbs.worker_key, settings)

    return world.do(story())


def test_a_key_that_the_running_coordinator_does_not_take_is_not_made(world, tmp_path):
    with pytest.raises(StartError, match="comes from BITNET_COORD_WORKER_API_KEY"):
        key_of(world, tmp_path, key_is_set=True)

    assert not (tmp_path / KEY_NAME).exists()
    made = key_of(world, tmp_path, key_is_set=False)
    assert (tmp_path / KEY_NAME).read_text() == made
    with pytest.raises(StartError, match="comes from BITNET_COORD_WORKER_API_KEY"):
        key_of(world, tmp_path, key_is_set=True)


def test_a_run_is_told_to_go_back(running: World, tmp_path: Path):
    running.train_round(0.5)

    said = asked(running, tmp_path, GoBack(version="1"))

    assert said == [
        "the run goes back to version 1 once its round is closed; no training is given "
        "out until then"
    ]
    assert running.run_row().roll_back_to == 1
    for version in ("", "-1", "1.5", "first"):
        with pytest.raises(StartError, match=f"version must be .*, got '{version}'"):
            asked(running, tmp_path, GoBack(version=version))


def sent(world: World, folder: Path, line: bytes) -> Outcome:
    """Send a line of one's own making; return the answer."""

    async def story():
        async with serving(world, folder):
            reader, writer = await asyncio.open_unix_connection(folder / SOCKET_NAME)
            writer.write(line)
            answer = await asyncio.wait_for(reader.read(), 10.0)
            writer.close()
            return msgspec.json.decode(answer, type=Outcome)

    return world.do(story())


def test_every_command_reaches_the_fleet(running: World, tmp_path: Path):
    running.change_run(reset_acknowledged=False)

    said = asked(
        running,
        tmp_path,
        Seed(),
        Seed(tokens=300),
        TrainFor(seconds=90.0),
        AcknowledgeReset(),
        SetPlan(words={"round_s": "20", "learning_rate": "0.001"}),
    )

    assert said == [
        "epoch 2: 1504 tokens, tasks cut at claim",
        "epoch 3: 1504 tokens, 6 tasks",
        "training for 90 s more",
        "reset acknowledged",
        "at once, as nobody has begun the open round: learning_rate 0.002 -> 0.001, "
        "round_s 60 -> 20",
    ]
    run = running.run_row()
    assert plan_of(run).round_s == 20.0
    assert (run.epoch, run.stop_at, run.reset_acknowledged) == (3, START + 90.0, True)
    assert running.read(lambda c: runs.range_tokens(c, "r-1")) == 2 * 1504


def test_a_plan_that_waits_for_the_next_version_says_what_waits(
    running: World, tmp_path: Path
):
    running.train_round(0.5)
    running.claimed()

    said = asked(
        running,
        tmp_path,
        SetPlan(words={"codec": "ternary"}),
        SetPlan(words={"learning_rate": "0.001", "warmup_tokens": "0"}),
        SetPlan(words={"codec": "fp32", "warmup_tokens": "100000"}),
        SetPlan(words={"learning_rate": "0.002"}),
    )

    ahead = "from version 3 on, when the open round is closed: "
    assert said == [
        f"{ahead}codec fp32 -> ternary",
        f"{ahead}learning_rate 0.002 -> 0.001, warmup_tokens 100000 -> 0, codec fp32 "
        "-> ternary; at the tokens accepted so far the learning rate goes from "
        "1.28e-06 to 0.001",
        f"{ahead}learning_rate 0.002 -> 0.001; at the tokens accepted so far the "
        "learning rate goes from 1.28e-06 to 6.4e-07",
        "the plan stays as it is",
    ]


def test_what_becomes_of_a_finished_run_is_said(running: World, tmp_path: Path):
    running.change_run(token_budget=64)
    running.train_round(0.5)
    running.change_run(state="finished")

    said = asked(
        running,
        tmp_path,
        SetPlan(words={"codec": "int8"}),
        SetPlan(words={"token_budget": "128"}),
    )
    running.change_run(state="finished", stop_at=running.clock.now())
    (timed,) = asked(running, tmp_path, SetPlan(words={"token_budget": "256"}))

    now = "at once, as nobody has begun the open round: "
    assert said == [
        f"{now}codec fp32 -> int8; the run is finished: a larger token_budget lets it "
        "go on",
        f"{now}token_budget 64 -> 128; the run goes on",
    ]
    assert timed == (
        f"{now}token_budget 128 -> 256; the run is finished: `bitnet-coordinator "
        "train-for` lets it go on"
    )


def test_what_is_done_to_workers_and_tasks_is_said(running: World, tmp_path: Path):
    running.register("w2")
    task = running.claimed()
    for _ in range(5):
        running.clock.advance(5.0)
        running.heartbeat(task, cpu_s=1.0)

    said = asked(
        running,
        tmp_path,
        KickStuck(worker_id="w1"),
        KickStuck(worker_id="w1"),
        KickStuck(),
        DrainWorker(worker_id="w1"),
        ResumeWorker(worker_id="w1"),
        DrainWorker(worker_id="w2"),
        MarkGone(worker_id="w2"),
        RequeueFailed(),
    )

    assert said == [
        f"taken from worker w1: {task.task_id}",
        "nothing to take: the lease of worker w1 ended 0 s ago, and its task has been "
        "free for others since (or was given up, after its last attempt); the worker "
        "lets go of it when it is heard and its step is over",
        "nothing to take: no worker that is stuck or lost holds a task",
        "worker w1 gets no more tasks",
        "worker w1 gets tasks again",
        "worker w2 gets no more tasks",
        "worker w2 is gone, until it comes back",
        "0 failed tasks are pending again",
    ]


def test_a_running_coordinator_tells_how_it_is_doing(running: World, tmp_path: Path):
    running.train_round(0.5)
    task = running.claimed()

    glance, dump = asked(running, tmp_path, Status(), DumpTelemetry())

    view = msgspec.json.decode(glance, type=FleetView)
    assert view.workers[0].task_id == task.task_id
    assert view.versions == []
    told = msgspec.json.decode(dump, type=Telemetry)
    assert (told.running, told.at) == (True, running.clock.now())
    assert [point.version for point in told.fleet.versions] == [1, 2]
    assert told.leases[0].task_id == task.task_id


def test_what_a_worker_holds_is_said(running: World, tmp_path: Path):
    task = running.claimed()

    said = asked(
        running, tmp_path, DrainWorker(worker_id="w1"), MarkGone(worker_id="w1")
    )

    assert said == [
        f"worker w1 gets no more tasks; {task.task_id} comes back after this step",
        f"worker w1 is gone, until it comes back; {task.task_id} is taken from it",
    ]


def test_a_time_to_stop_can_be_taken_back(running: World, tmp_path: Path):
    running.change_run(stop_at=START)

    (said,) = asked(running, tmp_path, TrainFor())

    assert said == "training until the token budget is used up"
    assert running.run_row().stop_at is None


def test_a_new_password_is_said_once_and_works(running: World, tmp_path: Path):
    (said,) = asked(running, tmp_path, ResetPassword())

    password = said.removeprefix("new admin password: ")
    stored = running.read(find_password_hash)
    assert password_matches(stored, password)
    assert password not in stored


def test_a_refusal_comes_back_as_its_reason(running: World, tmp_path: Path):
    running.change_run(state="finished")

    with pytest.raises(StartError, match="give it time first") as caught:
        asked(running, tmp_path, Seed(tokens=300))

    assert caught.value.exit_code == 2


def test_without_a_coordinator_there_is_no_answer(tmp_path: Path):
    assert ask(tmp_path, Seed()) is None
    assert ask(tmp_path / "nowhere", Seed()) is None


def test_the_socket_of_a_dead_coordinator_is_no_coordinator(
    running: World, tmp_path: Path
):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / SOCKET_NAME))
    assert ask(tmp_path, Seed()) is None

    assert asked(running, tmp_path, AcknowledgeReset()) == ["reset acknowledged"]
    assert not (tmp_path / SOCKET_NAME).exists()


def test_only_its_user_can_open_the_socket(running: World, tmp_path: Path):
    async def story():
        async with serving(running, tmp_path):
            return (tmp_path / SOCKET_NAME).stat().st_mode

    mode = running.do(story())

    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_folder_with_a_very_long_name_will_do(running: World, tmp_path: Path):
    folder = tmp_path / ("d" * 150)
    folder.mkdir()

    assert asked(running, folder, AcknowledgeReset()) == ["reset acknowledged"]


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"{}\n",
        b'{"type":"drop-database"}\n',
        b'{"type":"seed-real-tasks","tokens":"many"}\n',
        b'{"type":"seed-real-tasks","tokens":0}\n',
        b'{"type":"seed-real-tasks","tokens":-5}\n',
        b'{"type":"seed-real-tasks","tokens":4611686018427387905}\n',
        b'{"type":"drain-worker"}\n',
        b'{"type":"drain-worker","worker_id":7}\n',
        b'{"type":"drain-worker","worker_id":"nobody"}\n',
        b'{"type":"kick-stuck","worker_id":"w1"}\n',
        b'{"type":"mark-gone","worker_id":"w1"}\n',
        b'{"type":"requeue-failed","task_id":"t-1"}\n',
        b'{"type":"train-for","seconds":NaN}\n',
        b'{"type":"train-for","seconds":-1}\n',
        b'{"type":"train-for","seconds":0}\n',
        b'{"type":"train-for","seconds":1e9}\n',
        b'{"type":"set-plan"}\n',
        b'{"type":"set-plan","words":["round_s"]}\n',
        b'{"type":"set-plan","words":{"round_s":20}}\n',
        b'{"type":"set-plan","words":{"round_s":"0"}}\n',
        b'{"type":"set-plan","words":{"codec":"int4"}}\n',
        b'{"type":"set-plan","words":{"round_kind":"gradient"}}\n',
        b'{"type":"set-plan","words":{"token_budget":"-1"}}\n',
        b'{"type":"set-plan","words":{"codec":"ternary","pace":"1"}}\n',
        b" " * 10_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
def test_a_line_that_is_no_command_is_answered_and_changes_nothing(
    running: World, tmp_path: Path, line
):
    before = running.everything()

    outcome = sent(running, tmp_path, line)

    assert outcome.error
    assert running.everything() == before


def test_a_line_that_is_too_long_is_told_its_limit(running: World, tmp_path: Path):
    outcome = sent(running, tmp_path, b"x" * 10_000)

    assert "at most 4096 bytes" in outcome.error


def test_a_command_that_only_another_version_has_is_told_so(
    running: World, tmp_path: Path
):
    outcome = sent(running, tmp_path, b'{"type":"set-round-time","seconds":3}\n')

    assert "of another version of this program" in outcome.error
    assert "set-round-time" in outcome.error


def test_an_amount_that_cannot_be_is_named_and_shown(running: World, tmp_path: Path):
    line = b'{"type":"train-for","seconds":-1}\n'

    outcome = sent(running, tmp_path, line)

    assert "seconds must be a number above 0" in outcome.error
    assert "got -1" in outcome.error


def test_a_bug_is_logged_and_not_told(world: World, tmp_path: Path, caplog):
    world.start_run()
    world.write(lambda c: c.exec_driver_sql("DROP TABLE events"))

    outcome = sent(world, tmp_path, b'{"type":"seed-real-tasks"}\n')

    assert outcome.error == "internal error; the log has the story"
    assert "no such table" in caplog.text
    world.write(lambda c: c.exec_driver_sql("CREATE TABLE events (event_id)"))


@pytest.mark.parametrize("answer", [b"", b'{"said":', b"nonsense\n"])
def test_a_coordinator_that_dies_while_it_answers_is_one_clear_line(
    tmp_path: Path, answer
):
    def once(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)

    with pytest.raises(StartError, match="gave no answer"):
        ask_against(tmp_path, once)


def ask_against(folder: Path, act: Callable[[socket.socket], None]) -> None:
    """Ask while `act` plays the coordinator."""

    async def story():
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / SOCKET_NAME))
            listening.listen()
            acting = asyncio.create_task(asyncio.to_thread(act, listening))
            try:
                await asyncio.to_thread(ask, folder, Seed())
            finally:
                await acting

    asyncio.run(story())


@pytest.mark.parametrize("question", [verbs.status, verbs.telemetry])
def test_a_coordinator_of_another_version_is_one_clear_line(
    tmp_path: Path, monkeypatch, question
):
    settings = CoordinatorSettings.from_env({"BITNET_COORD_DATA": str(tmp_path)})
    monkeypatch.setattr(verbs, "ask", lambda _folder, _question: "{}")

    with pytest.raises(StartError, match="of another version"):
        question(settings)
