"""The processes of the demo: real ones, as they run on real boxes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from coordinator.domain.errors import StartError
from coordinator.service.view import FleetView

#: Longest wait for a process to begin or to end, in seconds.
PATIENCE_S: Final = 60.0
_READY: Final = "Dashboard: "


class Child:
    """A process of ours in a session of its own: a Ctrl-C reaches us alone."""

    def __init__(
        self, name: str, module: str, verb: str, env: Mapping[str, str], logs: Path
    ) -> None:
        self.name = name
        self.log_path = logs / f"{name}.log"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own modules
                [sys.executable, "-m", module, verb],
                env={**_clean_environment(), **env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if module == "coordinator" else log,
                stderr=log,
                start_new_session=True,
                text=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def first_line(self) -> str:
        """Return the first line that it prints. Raises StartError when it ends."""
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise StartError(
                f"{self.name} ended with status {self._process.wait()}: "
                f"{self.last_words()}"
            )
        return line.strip()

    def last_words(self) -> str:
        """Return the end of its log."""
        text = self.log_path.read_text(errors="replace")
        return "\n".join(text.splitlines()[-5:])

    def kill(self) -> None:
        """Kill it with -9."""
        self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self.alive:
            self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Wait for its end; a process that will not end is killed."""
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


class StatusClient:
    """Reads `/status` of the coordinator."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key

    def look(self) -> FleetView:
        """Return the view of the fleet. Raises OSError when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30.0)
        with contextlib.closing(connection):
            connection.request("GET", "/status", headers={"X-Api-Key": self._key})
            response = connection.getresponse()
            body = response.read()
        if response.status != http.client.OK:
            raise StartError(f"/status answered {response.status}: {body[:200]!r}")
        return msgspec.json.decode(body, type=FleetView)


def start_coordinator(env: Mapping[str, str], logs: Path) -> tuple[Child, int]:
    """Start the coordinator; return it and its port once it listens."""
    child = Child("coordinator", "coordinator", "serve", env, logs)
    try:
        line = child.first_line()
        if not line.startswith(_READY):
            raise StartError(f"the coordinator said {line!r} instead of its address")
    except BaseException:  # a Ctrl-C too: nobody else knows of it yet
        child.ask_to_stop()
        child.wait()
        raise
    return child, int(line.rsplit(":", 1)[1].split("/", 1)[0])


def start_worker(
    name: str, *, port: int, key: str, threads: int, folder: Path
) -> Child:
    """Start a worker process."""
    env = {
        "BITNET_COORDINATOR_URL": f"http://127.0.0.1:{port}",
        "BITNET_WORKER_API_KEY": key,
        "BITNET_WORKER_NAME": name,
        "BITNET_CPU_THREADS": str(threads),
        "BITNET_HEALTH_BEACON": str(folder / f"{name}.alive"),
        "BITNET_DATA": str(folder),
    }
    return Child(name, "worker", "run", env, folder)


def end_properly_when_told() -> None:
    """Let the signals that end a process end ours the way an error does.

    Its children have sessions of their own: nobody else would stop them.
    """

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    # A shell that starts us in the background has this one ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _clean_environment() -> dict[str, str]:
    """Return our environment without settings that were meant for another fleet."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("BITNET_") or name.startswith("BITNET_EXT_")
    }


def pause(seconds: float) -> None:
    """Wait between two looks."""
    time.sleep(seconds)
