"""Every BITNET_ variable of a worker has its effect, or an error that names it."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from worker import settings
from worker.errors import SettingsError
from worker.settings import BEACON_NAME, WorkerSettings, usable_cpus

LEAST = {
    "BITNET_COORDINATOR_URL": "https://coordinator:5000/",
    "BITNET_WORKER_API_KEY": "secret-key",
    "BITNET_WORKER_NAME": "box-1",
}


def read(**env: str) -> WorkerSettings:
    return WorkerSettings.from_env(LEAST | env)


def test_what_is_not_set_has_a_default() -> None:
    got = read()

    assert got.coordinator_url == "https://coordinator:5000"
    assert got.worker_id == got.name == "box-1"
    assert got.cpu_threads == usable_cpus()
    assert not got.fixed_threads
    assert got.isa is None
    assert got.heartbeat_s is None
    assert got.shutdown_s == 30.0
    assert got.beacon == Path(tempfile.gettempdir()) / BEACON_NAME
    assert got.data is None
    assert got.log_level == "info"
    assert got.preset is None
    assert got.allow_synthetic_shards is False


def test_every_variable_is_effective(tmp_path) -> None:
    got = read(
        BITNET_WORKER_ID="id-7",
        BITNET_CPU_THREADS="3",
        BITNET_EXT_ISA="portable",
        BITNET_HEARTBEAT_SECONDS="2.5",
        BITNET_SHUTDOWN_SECONDS="12",
        BITNET_HEALTH_BEACON=str(tmp_path / "alive"),
        BITNET_DATA=str(tmp_path / "made" / "here"),
        BITNET_LOG_LEVEL="WARNING",
        BITNET_MODEL_PRESET="medium",
        BITNET_ALLOW_SYNTHETIC_SHARDS="true",
    )

    assert got == WorkerSettings(
        coordinator_url="https://coordinator:5000",
        api_key="secret-key",
        name="box-1",
        worker_id="id-7",
        cpu_threads=3,
        fixed_threads=True,
        isa="portable",
        heartbeat_s=2.5,
        shutdown_s=12.0,
        beacon=tmp_path / "alive",
        data=tmp_path / "made" / "here",
        log_level="warning",
        preset="medium",
        allow_synthetic_shards=True,
    )


def test_an_empty_variable_is_not_set() -> None:
    assert (
        read(BITNET_CPU_THREADS="", BITNET_EXT_ISA="", BITNET_LOG_LEVEL=" ") == read()
    )


def test_the_name_of_the_machine_is_the_default_name(monkeypatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "pi-4")
    env = {name: LEAST[name] for name in LEAST if name != "BITNET_WORKER_NAME"}

    assert WorkerSettings.from_env(env).worker_id == "pi-4"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BITNET_COORDINATOR_URL", "coordinator:5000"),
        ("BITNET_COORDINATOR_URL", "ftp://coordinator"),
        ("BITNET_COORDINATOR_URL", "http://"),
        ("BITNET_COORDINATOR_URL", "http://coordinator:port"),
        ("BITNET_COORDINATOR_URL", "http://coordinator/?a=b"),
        ("BITNET_WORKER_NAME", "n" * 65),
        ("BITNET_WORKER_NAME", "tab\there"),
        ("BITNET_WORKER_NAME", "two words"),
        ("BITNET_WORKER_ID", "-dash-first"),
        ("BITNET_WORKER_ID", "a space"),
        ("BITNET_CPU_THREADS", "0"),
        ("BITNET_CPU_THREADS", "4097"),
        ("BITNET_CPU_THREADS", "two"),
        ("BITNET_HEARTBEAT_SECONDS", "0"),
        ("BITNET_HEARTBEAT_SECONDS", "nan"),
        ("BITNET_HEARTBEAT_SECONDS", "60.1"),
        ("BITNET_SHUTDOWN_SECONDS", "-1"),
        ("BITNET_SHUTDOWN_SECONDS", "3601"),
        ("BITNET_HEALTH_BEACON", "/"),
        ("BITNET_HEALTH_BEACON", "/nowhere/alive"),
        ("BITNET_DATA", "/dev/null/below"),
        ("BITNET_LOG_LEVEL", "loud"),
        ("BITNET_MODEL_PRESET", "medum"),
        ("BITNET_ALLOW_SYNTHETIC_SHARDS", "yes"),
        ("BITNET_ALLOW_SYNTHETIC_SHARDS", "True"),
    ],
)
def test_a_wrong_value_is_named_and_shown(variable, value) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**{variable: value})

    assert variable in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    "variable", ["BITNET_COORDINATOR_URL", "BITNET_WORKER_API_KEY"]
)
def test_what_is_required_and_missing_is_named(variable) -> None:
    with pytest.raises(SettingsError, match=f"{variable} is required and not set"):
        read(**{variable: " "})


@pytest.mark.parametrize(
    "env",
    [
        {"BITNET_WORKER_API_KEY": "tell tale"},
        {"BITNET_WORKER_API_KEY": "tell-tale\n"},
        {"BITNET_COORDINATOR_URL": "https://me:tell-tale@coordinator"},
    ],
)
def test_a_secret_is_never_shown(env) -> None:
    with pytest.raises(SettingsError) as caught:
        read(**env)

    assert "tale" not in str(caught.value)
    assert "secret-key" not in repr(read())


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean 'medium'"):
        read(BITNET_MODEL_PRESET="medum")


@pytest.mark.parametrize(
    ("content", "expected"), [("150000 100000\n", 2), ("50000 100000", 1)]
)
def test_a_quota_of_the_container_limits_the_threads(
    tmp_path, monkeypatch, content, expected
) -> None:
    path = tmp_path / "cpu.max"
    path.write_text(content)
    monkeypatch.setattr(settings, "_CPU_QUOTA", path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))

    assert usable_cpus() == expected


@pytest.mark.parametrize("content", ["max 100000\n", "", None])
def test_without_a_quota_every_cpu_counts(tmp_path, monkeypatch, content) -> None:
    path = tmp_path / "cpu.max"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(settings, "_CPU_QUOTA", path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("os.cpu_count", lambda: 32)

    assert usable_cpus() == 16
