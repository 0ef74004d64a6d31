"""What an operator can set on a worker: the only reader of the environment.

Every value is checked here, once. A wrong one ends the process with one line
that names the variable and shows the value; the key is never shown.
"""

from __future__ import annotations

import math
import os
import re
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from bitnet_ext.layout import UnknownPresetError, preset_shape
from bitnet_ext.ternary import ISA_VARIABLE
from bitnet_ext.wire.messages import ID_PATTERN, MAX_HEARTBEAT_S
from worker.errors import SettingsError

BEACON_NAME: Final = "bitnet-worker-alive"
DATA_NAME: Final = "bitnet-worker"
_LEVELS: Final = ("debug", "info", "warning", "error")
_CPU_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The settings of one worker process; `from_env` checks them."""

    #: Absolute http or https address, without a slash at the end.
    coordinator_url: str
    api_key: str = field(repr=False)
    name: str
    worker_id: str
    #: Threads to train with; to try first where they are not `fixed_threads`.
    cpu_threads: int
    #: Whether the operator set them.
    fixed_threads: bool
    #: Variant of the kernels that the operator set; None: try what is fastest.
    isa: str | None
    #: None: the coordinator decides.
    heartbeat_s: float | None
    #: From the signal to the end of the process.
    shutdown_s: float
    #: Touched whenever the worker gets on with its work.
    beacon: Path
    #: What it has learned and not yet sent, and weights; None: memory only.
    data: Path | None
    log_level: str
    #: None: whatever the coordinator trains.
    preset: str | None
    allow_synthetic_shards: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> WorkerSettings:
        """Read the settings; an empty variable counts as not set.

        Raises SettingsError, naming variable and value, at the first bad one.
        """
        given = {name: value for name, value in env.items() if value.strip()}
        name = _name(given)
        return cls(
            coordinator_url=_url(given, "BITNET_COORDINATOR_URL"),
            api_key=_key(given, "BITNET_WORKER_API_KEY"),
            name=name,
            worker_id=_worker_id(given, name),
            cpu_threads=_threads(given, "BITNET_CPU_THREADS"),
            fixed_threads="BITNET_CPU_THREADS" in given,
            isa=chosen_isa(given),
            heartbeat_s=_seconds(given, "BITNET_HEARTBEAT_SECONDS", MAX_HEARTBEAT_S),
            shutdown_s=_seconds(given, "BITNET_SHUTDOWN_SECONDS", 3600.0) or 30.0,
            beacon=_beacon(given, "BITNET_HEALTH_BEACON"),
            data=_data(given, "BITNET_DATA"),
            log_level=_level(given, "BITNET_LOG_LEVEL"),
            preset=_preset(given, "BITNET_MODEL_PRESET"),
            allow_synthetic_shards=_flag(given, "BITNET_ALLOW_SYNTHETIC_SHARDS"),
        )


def chosen_isa(env: Mapping[str, str]) -> str | None:
    """Return the variant of the kernels that was set; `bitnet_ext` has checked it."""
    return env.get(ISA_VARIABLE) or None


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, and its quota.

    A container with a quota still sees every CPU of the machine; more threads
    than the quota only wait for each other.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return min(len(os.sched_getaffinity(0)), _quota_cpus(_CPU_QUOTA))


def _quota_cpus(path: Path) -> int:
    """Return the quota of control group v2 in whole CPUs, rounded up."""
    try:
        quota, period = path.read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no control group v2, or "max": no quota
        return os.cpu_count() or 1


def _wrong(variable: str, rule: str, value: object) -> SettingsError:
    return SettingsError(f"{variable} must be {rule}, got {value!r}")


def _required(env: Mapping[str, str], variable: str) -> str:
    if variable not in env:
        raise SettingsError(f"{variable} is required and not set")
    return env[variable]


def _url(env: Mapping[str, str], variable: str) -> str:
    value = _required(env, variable).strip()
    rule = "an absolute http or https address such as https://coordinator:5000"
    try:
        parts = urlsplit(value)
        _ = parts.port  # raises where it is no number
    except ValueError:
        raise _wrong(variable, rule, value) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _wrong(variable, rule, value)
    if parts.username is not None or parts.password is not None:
        # Not shown: what stands there is a secret.
        raise SettingsError(f"{variable} must not hold a user name or a password")
    if parts.query or parts.fragment or re.search(r"\s", value):
        raise _wrong(variable, f"{rule}, without a query or fragment", value)
    return value.rstrip("/")


def _key(env: Mapping[str, str], variable: str) -> str:
    value = _required(env, variable)
    if re.fullmatch(r"[\x21-\x7e]+", value) is None:
        raise SettingsError(
            f"{variable} must be printable ASCII without spaces; it is not shown here"
        )
    return value


def _name(env: Mapping[str, str]) -> str:
    value = env.get("BITNET_WORKER_NAME", socket.gethostname())
    if not 1 <= len(value) <= 64 or re.search(r"[\x00-\x1f\x7f]", value):
        raise _wrong(
            "BITNET_WORKER_NAME",
            "1 to 64 characters without control characters",
            value,
        )
    return value


def _worker_id(env: Mapping[str, str], name: str) -> str:
    value = env.get("BITNET_WORKER_ID", name)
    if re.fullmatch(ID_PATTERN, value) is None:
        rule = (
            "1 to 64 letters, digits, dots, dashes or underscores, starting with a "
            "letter or digit"
        )
        if "BITNET_WORKER_ID" in env:
            raise _wrong("BITNET_WORKER_ID", rule, value)
        origin = "BITNET_WORKER_NAME" if "BITNET_WORKER_NAME" in env else "host name"
        raise SettingsError(
            f"{origin} {value!r} can't be the id of a worker too: set BITNET_WORKER_ID "
            f"to {rule}"
        )
    return value


def _threads(env: Mapping[str, str], variable: str) -> int:
    value = env.get(variable)
    if value is None:
        return usable_cpus()
    if re.fullmatch(r"[0-9]{1,4}", value) is None or not 1 <= int(value) <= 4096:
        raise _wrong(variable, "a whole number from 1 to 4096", value)
    return int(value)


def _seconds(env: Mapping[str, str], variable: str, most: float) -> float | None:
    value = env.get(variable)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= most:
        rule = f"a number of seconds above 0, at most {most:.0f}"
        raise _wrong(variable, rule, value)
    return seconds


def _beacon(env: Mapping[str, str], variable: str) -> Path:
    path = Path(env.get(variable) or Path(tempfile.gettempdir()) / BEACON_NAME)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise _wrong(variable, "a file in a folder that can be written", str(path))
    return path


def _data(env: Mapping[str, str], variable: str) -> Path | None:
    """Return the folder that is set, or the one of the user; None without a home."""
    if variable in env:
        path = Path(env[variable])
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            raise _wrong(variable, "a folder that can be made", str(path)) from None
        if not os.access(path, os.W_OK | os.X_OK):
            raise _wrong(variable, "a folder that can be written", str(path))
        return path
    if "XDG_STATE_HOME" in env:
        return Path(env["XDG_STATE_HOME"]) / DATA_NAME
    return Path(env["HOME"]) / ".local/state" / DATA_NAME if "HOME" in env else None


def _level(env: Mapping[str, str], variable: str) -> str:
    value = env.get(variable, "info").lower()
    if value not in _LEVELS:
        raise _wrong(variable, f"one of {', '.join(_LEVELS)}", env[variable])
    return value


def _preset(env: Mapping[str, str], variable: str) -> str | None:
    value = env.get(variable)
    if value is None:
        return None
    try:
        preset_shape(value)
    except UnknownPresetError as error:
        raise SettingsError(f"{variable}: {error}") from None
    return value


def _flag(env: Mapping[str, str], variable: str) -> bool:
    value = env.get(variable, "false")
    if value not in ("true", "false"):
        raise _wrong(variable, "true or false", value)
    return value == "true"
