"""`bitnet-coordinator` in this process: what it prints, and how it says no."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sqlite3
import stat
from pathlib import Path

import msgspec
import pytest

from coordinator.cli import NOT_RUNNING, main
from coordinator.domain.manifest import load_manifest
from coordinator.service.telemetry import Telemetry
from coordinator.settings import PREFIX
from coordinator.store.lock import DataLock
from tests.fakes import unread_pipe
from tests.unit.coordinator.fleets import write_corpus


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch):
    """Run each command as in a process of its own: environment, umask, logging."""
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.setenv(PREFIX + "PRESET", "tiny")
    # Somebody may listen on the usual port of this machine.
    monkeypatch.setenv(PREFIX + "PORT", "0")
    umask = os.umask(0o022)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    os.umask(umask)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """The options that name a data folder, new, and a prepared corpus."""
    write_corpus(tmp_path / "corpus")
    return ["--data", str(tmp_path / "data"), "--corpus", str(tmp_path / "corpus")]


def refused(capsys, *arguments: str) -> str:
    """Run a command that has to be refused with one line; return the line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bitnet-coordinator: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def said(capsys, *arguments: str) -> str:
    """Run a command that has to succeed; return what it printed."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_the_worker_key_is_made_once_and_for_its_owner_alone(capsys, tmp_path):
    data = tmp_path / "deep" / "data"
    corpus = tmp_path / "corpus"
    write_corpus(corpus)
    said(capsys, "seed-real-tasks", "--data", str(data), "--corpus", str(corpus))

    first = said(capsys, "worker-key", "--data", str(data))

    assert len(first.strip()) >= 32
    assert said(capsys, "worker-key", "--data", str(data)) == first
    assert stat.S_IMODE((data / "worker-api-key").stat().st_mode) == 0o600
    assert stat.S_IMODE(data.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "command",
    [
        ["worker-key"],
        ["train-for", "60"],
        ["set-plan", "round_s=60"],
        ["acknowledge-reset"],
        ["readmit-worker", "w1"],
        ["drain-worker", "w1"],
        ["resume-worker", "w1"],
        ["mark-gone", "w1"],
        ["kick-stuck"],
        ["requeue-failed"],
        ["status"],
        ["dump-telemetry"],
        ["reset-admin-password"],
    ],
)
@pytest.mark.parametrize("is_there", [False, True])
def test_a_mistyped_data_folder_gets_no_fleet(
    capsys, folders, tmp_path, command, is_there
):
    if is_there:
        (tmp_path / "data").mkdir()
    before = sorted(tmp_path.rglob("*"))

    line = refused(capsys, *command, *folders)

    assert f"{tmp_path / 'data'} holds no fleet" in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_key_that_is_set_is_printed_without_a_folder(capsys, folders, monkeypatch):
    monkeypatch.setenv(PREFIX + "WORKER_API_KEY", "k" * 40)

    assert said(capsys, "worker-key", *folders) == "k" * 40 + "\n"
    assert not Path(folders[1]).exists()


def test_without_a_coordinator_a_command_does_its_work_itself(capsys, folders):
    cut = said(capsys, "seed-real-tasks", *folders)
    fixed = said(capsys, "seed-real-tasks", *folders, "300")
    timed = said(capsys, "train-for", *folders, "60")
    ever = said(capsys, "train-for", *folders, "ever")
    changed = said(capsys, "set-plan", *folders, "round_s=30", "codec=ternary")
    reset = said(capsys, "acknowledge-reset", *folders)

    # What made a fleet says where: the folder may have been a slip.
    made = f"new run in {folders[1]}; "
    assert cut.startswith(f"{made}epoch 1: 1504 tokens, tasks cut at claim; ")
    assert "; its learning rate falls to zero at " in cut
    assert fixed == "epoch 2: 1504 tokens, 5 tasks\n"
    assert timed == "training for 60 s more\n"
    assert ever == "training until the token budget is used up\n"
    assert changed == (
        "at once, as nobody has begun the open round: round_s auto -> 30, codec int8 "
        "-> ternary\n"
    )
    assert reset == "reset acknowledged\n"


def test_only_a_quarantined_worker_is_readmitted(capsys, folders):
    said(capsys, "seed-real-tasks", *folders)

    assert "'w9'" in refused(capsys, "readmit-worker", *folders, "w9")


@pytest.mark.parametrize("verb", ["drain-worker", "resume-worker", "readmit-worker"])
def test_a_worker_that_nobody_knows_is_named(capsys, folders, verb):
    said(capsys, "seed-real-tasks", *folders)

    assert "worker_id must be" in refused(capsys, verb, *folders, "w9")


def test_a_task_that_nobody_knows_is_named(capsys, folders):
    said(capsys, "seed-real-tasks", *folders)

    assert said(capsys, "requeue-failed", *folders).startswith("0 failed tasks")
    assert "got 't-9', which is none" in refused(
        capsys, "requeue-failed", *folders, "t-9"
    )


@pytest.mark.parametrize("order", [["kick-stuck"], ["mark-gone", "w1"]])
def test_who_stands_still_is_not_known_without_a_coordinator(capsys, folders, order):
    said(capsys, "seed-real-tasks", *folders)

    assert "no coordinator runs" in refused(capsys, *order, *folders)


def test_at_rest_the_fleet_is_shown_as_it_was_and_nothing_is_changed(
    capsys, folders, tmp_path
):
    said(capsys, "seed-real-tasks", *folders)
    database = tmp_path / "data" / "fleet.db"
    before = database.read_bytes()

    assert main(["status", *folders]) == NOT_RUNNING
    out = capsys.readouterr().out
    told = msgspec.json.decode(said(capsys, "dump-telemetry", *folders), type=Telemetry)

    first, run, *_ = out.splitlines()
    assert first.startswith(f"No coordinator runs on {folders[1]}. As of 20")
    assert "(tiny), running, epoch 1, version 1, 0 of" in run
    assert "ETA      unknown. No coordinator runs." in out
    assert (told.running, told.fleet.run.epoch_tokens) == (False, 1504)
    assert [event.kind for event in told.events] == ["run.started", "epoch.seeded"]
    assert database.read_bytes() == before


def test_at_rest_ages_are_as_of_the_last_moment_that_a_coordinator_ran(
    capsys, folders, tmp_path
):
    said(capsys, "seed-real-tasks", *folders)
    with sqlite3.connect(tmp_path / "data" / "fleet.db") as connection:
        connection.execute("DELETE FROM facts")
        connection.execute("INSERT INTO facts VALUES ('clock_high_water', '1000.5')")
        connection.execute(
            "INSERT INTO workers (worker_id, name, cpu_model, isa, threads, "
            "package_version, registered_at, heartbeat_at, phase) "
            "VALUES ('birch', 'birch', '', '', 1, '', 0, 998.5, 'idle')"
        )

    main(["status", *folders])
    out = capsys.readouterr().out

    assert "As of 1970-01-01 00:16:40 UTC" in out
    assert out.splitlines()[-1].split() == [
        "idle", "birch", "-", "-", "2", "s", "-", "-", "Holds", "no", "task."
    ]  # fmt: skip


def test_without_the_corpus_the_fleet_is_shown_all_the_same(capsys, folders, tmp_path):
    said(capsys, "seed-real-tasks", *folders)
    (tmp_path / "corpus/tokenized/manifest.json").write_text("nonsense")

    assert main(["status", *folders]) == NOT_RUNNING
    assert "version 1" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["status", "dump-telemetry"])
def test_a_reader_that_has_gone_ends_it_without_a_word(
    capsys, folders, monkeypatch, verb
):
    said(capsys, "seed-real-tasks", *folders)

    with unread_pipe() as output:  # closed as at the end of a process
        monkeypatch.setattr("sys.stdout", output)
        status = main([verb, *folders])

    assert (status, capsys.readouterr().err) == (141, "")


def test_a_database_of_another_schema_is_not_guessed_at(capsys, folders, tmp_path):
    said(capsys, "seed-real-tasks", *folders)
    with sqlite3.connect(tmp_path / "data" / "fleet.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0002'")

    line = refused(capsys, "status", *folders)

    assert "schema '0002'" in line
    assert "bitnet-coordinator serve" in line


def test_an_epoch_on_another_corpus_is_refused_and_the_run_stays(
    capsys, folders, tmp_path
):
    said(capsys, "seed-real-tasks", *folders)
    first = load_manifest(tmp_path / "corpus/tokenized/manifest.json")
    other = write_corpus(tmp_path / "corpus", sizes=(999, 600, 300))

    for order in (["seed-real-tasks", "300"], ["set-plan", "token_budget=0"]):
        line = refused(capsys, *order, *folders)
        assert first.corpus_sha256[:12] in line
        assert other.corpus_sha256[:12] in line
    write_corpus(tmp_path / "corpus")
    again = said(capsys, "seed-real-tasks", *folders)
    assert again == "epoch 2: 1504 tokens, tasks cut at claim\n"


def test_an_epoch_without_its_corpus_is_refused(capsys, folders, tmp_path):
    said(capsys, "seed-real-tasks", *folders)
    (tmp_path / "corpus").rename(tmp_path / "away")

    assert "put it back" in refused(capsys, "seed-real-tasks", *folders)
    assert said(capsys, "train-for", *folders, "60") == "training for 60 s more\n"


def test_a_text_becomes_a_corpus(capsys, tmp_path):
    for number in range(8):
        text = f"document {number}\n" + "some words to learn from\n" * 40
        (tmp_path / f"{number}.txt").write_text(text)

    out = said(
        capsys,
        "tokenize-corpus",
        "--corpus",
        str(tmp_path),
        "--data",
        str(tmp_path / "data"),
        "--vocab-size",
        "300",
        "--held-out-bytes",
        "1000",
    )

    assert "held out, vocabulary" in out
    assert (tmp_path / "tokenized/manifest.json").exists()


def test_before_a_corpus_it_says_what_to_do(capsys, tmp_path):
    options = ["--data", str(tmp_path / "d"), "--corpus", str(tmp_path / "c")]

    assert "tokenize-corpus" in refused(capsys, "seed-real-tasks", *options)


@pytest.mark.parametrize(
    ("verb", "value", "name"),
    [
        ("seed-real-tasks", "many", "tokens"),
        ("seed-real-tasks", "0", "tokens"),
        ("seed-real-tasks", "-5", "tokens"),
        ("seed-real-tasks", "1.5", "tokens"),
        ("seed-real-tasks", "99999999999999999999", "tokens"),
        ("seed-real-tasks", "\u0663", "tokens"),
        ("train-for", "soon", "seconds"),
        ("train-for", "0", "seconds"),
        ("train-for", "-1", "seconds"),
        ("train-for", "nan", "seconds"),
        ("train-for", "inf", "seconds"),
    ],
)
def test_a_wrong_amount_is_named_and_shown(capsys, folders, verb, value, name):
    line = refused(capsys, verb, *folders, value)

    assert name in line
    assert value in line


@pytest.mark.parametrize(
    ("words", "due"),
    [
        (["learning_rate"], "words must be NAME=VALUE, got 'learning_rate'"),
        (["=3"], "words must be NAME=VALUE, got '=3'"),
        (["batch_size=4097"], "batch_size must be a whole number from 1 to 4096, got"),
        (["quorum=1", "quorum=0.5"], "quorum must be named once, got 'quorum=0.5' too"),
        (["learning_rate=abc"], "learning_rate must be a number above 0, at most"),
        (["learning_rate="], "learning_rate must be a number above 0, at most"),
        (["codec=int8", "pace=1"], "pace can't be set in a run; there are accept_late"),
        (["round_s=nan"], "round_s must be auto or a number of seconds above 0"),
        (["token_budget=-5"], "token_budget must be a whole number from 0"),
    ],
)
def test_a_plan_that_can_not_be_is_refused_in_one_line(capsys, folders, words, due):
    said(capsys, "seed-real-tasks", *folders)

    assert refused(capsys, "set-plan", *folders, *words).startswith(
        f"bitnet-coordinator: {due}"
    )


def test_an_epoch_of_too_many_tasks_is_refused_before_a_run_is_made(capsys, tmp_path):
    write_corpus(tmp_path / "corpus", sizes=(200_000,))
    folders = ["--data", str(tmp_path / "data"), "--corpus", str(tmp_path / "corpus")]

    line = refused(capsys, "seed-real-tasks", *folders, "1")

    assert "tokens must be at least 2" in line
    assert not list((tmp_path / "data/state").iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("port", "70000"),
        ("port", "http"),
        ("seed", "-1"),
        ("preset", "smol"),
        ("host", "0.0.0.0"),
    ],
)
def test_a_wrong_setting_stops_the_start(capsys, folders, option, value):
    line = refused(capsys, "serve", *folders, f"--{option}={value}")

    assert PREFIX + option.upper() in line
    assert value in line


def test_an_option_wins_over_the_environment(capsys, folders, monkeypatch):
    monkeypatch.setenv(PREFIX + "PORT", "1")

    assert "'70000'" in refused(capsys, "serve", *folders, "--port", "70000")


def test_a_misspelt_variable_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(PREFIX + "PROT", "1")

    line = refused(capsys, "worker-key", "--data", str(tmp_path))

    assert PREFIX + "PROT is not a setting" in line


@pytest.mark.parametrize("content", [b"", b"\n", b"cut" * 10, b"\xff" * 40])
def test_a_damaged_key_that_would_let_no_worker_in_is_named(
    capsys, folders, tmp_path, content
):
    said(capsys, "seed-real-tasks", *folders)
    key = tmp_path / "data/worker-api-key"
    key.write_bytes(content)

    assert f"{key} is damaged" in refused(capsys, "worker-key", *folders)

    assert key.read_bytes() == content


def test_a_weak_key_is_refused_and_not_shown(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv(PREFIX + "WORKER_API_KEY", "hunter2")

    line = refused(capsys, "worker-key", "--data", str(tmp_path))

    assert "hunter2" not in line


@pytest.mark.parametrize("verb", ["worker-key", "seed-real-tasks", "acknowledge-reset"])
def test_a_data_folder_that_is_a_file_is_named(capsys, folders, tmp_path, verb):
    (tmp_path / "data").write_text("I am a file")

    assert str(tmp_path / "data") in refused(capsys, verb, *folders)


def test_a_folder_in_use_is_left_alone(capsys, folders, tmp_path):
    (tmp_path / "data").mkdir()
    lock = DataLock(tmp_path / "data")
    try:
        assert "in use" in refused(capsys, "seed-real-tasks", *folders)
    finally:
        lock.close()


# Tornado leaves the socket that it could not bind to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_port_in_use_is_one_line(capsys, folders):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        assert main(["serve", *folders, f"--port={port}"]) == 2
    gc.collect()

    err = capsys.readouterr().err
    assert "in use" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab-size", "10"),
        ("vocab-size", f"{10**26}"),
        ("held-out-bytes", "0"),
        ("shard-tokens", "1"),
        ("shard-tokens", f"{10**26}"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(capsys, tmp_path, name, value):
    line = refused(
        capsys, "tokenize-corpus", "--corpus", str(tmp_path), f"--{name}={value}"
    )

    assert name.replace("-", "_") in line
    assert value in line


def test_a_missing_text_folder_is_named(capsys, tmp_path):
    options = ["--corpus", str(tmp_path / "nowhere"), "--data", str(tmp_path)]

    assert "nowhere" in refused(capsys, "tokenize-corpus", *options)


def test_damaged_weights_stop_every_command_with_status_four(capsys, folders, tmp_path):
    said(capsys, "seed-real-tasks", *folders)
    blob = tmp_path / "data/state/v0000000001.frame"
    blob.write_bytes(blob.read_bytes()[:-1])

    assert main(["seed-real-tasks", *folders]) == 4

    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "version 1 is damaged" in err


def damage(capsys, verb, folders) -> str:
    """Run a command that has to end with status 4 and one line; return the line."""
    assert main([verb, *folders]) == 4
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("{")]
    assert (out, len(lines)) == ("", 1)
    return lines[0]


USE_THE_DATABASE = ["serve", "seed-real-tasks", "acknowledge-reset", "tokenize-corpus"]


@pytest.mark.parametrize("verb", USE_THE_DATABASE)
@pytest.mark.parametrize(
    "content", [b"no database at all" * 1000, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_a_damaged_database_is_one_line_with_status_four(
    capsys, folders, tmp_path, verb, content
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fleet.db").write_bytes(content)

    line = damage(capsys, verb, folders)

    assert str(tmp_path / "data/fleet.db") in line
    assert "restore it from a backup" in line
    assert (tmp_path / "data/fleet.db").read_bytes() == content


@pytest.mark.parametrize("verb", USE_THE_DATABASE)
def test_an_empty_database_beside_weights_is_not_begun_anew(
    capsys, folders, tmp_path, verb
):
    said(capsys, "seed-real-tasks", *folders)
    (tmp_path / "data/fleet.db").write_bytes(b"")
    weights = sorted((tmp_path / "data/state").iterdir())

    assert "empty or gone" in damage(capsys, verb, folders)

    assert weights
    assert sorted((tmp_path / "data/state").iterdir()) == weights


READ_ONLY = [
    ["status"],
    ["dump-telemetry"],
    ["eval"],
    ["export", "--format", "hf", "--out", "nowhere"],
]


@pytest.mark.parametrize("command", READ_ONLY, ids=lambda words: words[0])
def test_an_empty_database_beside_weights_is_called_so_by_who_only_reads(
    capsys, folders, tmp_path, command
):
    said(capsys, "seed-real-tasks", *folders)
    (tmp_path / "data/fleet.db").write_bytes(b"")

    assert main([*command, *folders]) == 4

    assert "empty or gone" in capsys.readouterr().err


@pytest.mark.parametrize("command", READ_ONLY, ids=lambda words: words[0])
def test_an_empty_database_alone_is_no_fleet_to_read(
    capsys, folders, tmp_path, command
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fleet.db").touch()

    assert "holds no fleet" in refused(capsys, *command, *folders)


def test_an_empty_database_alone_is_a_new_one(capsys, folders, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/fleet.db").touch()

    assert "no text" in refused(capsys, "tokenize-corpus", *folders)
    assert "epoch 1" in said(capsys, "seed-real-tasks", *folders)


def test_a_database_that_cannot_be_opened_is_one_line(capsys, folders, tmp_path):
    (tmp_path / "data/fleet.db").mkdir(parents=True)

    line = refused(capsys, "seed-real-tasks", *folders)

    assert f"cannot use {tmp_path / 'data/fleet.db'}" in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["serve", "--prot", "1"],
        ["serve", "--por", "1"],
        ["train-for"],
        ["tokenize-corpus", "--vocab-size", "many"],
    ],
)
def test_what_is_no_command_ends_with_status_two(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage: bitnet-coordinator" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0
    out = capsys.readouterr().out
    for verb in ("serve", "tokenize-corpus", "seed-real-tasks", "train-for", "demo"):
        assert verb in out
