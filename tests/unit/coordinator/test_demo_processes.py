"""No process of the demo is left, whenever a Ctrl-C comes."""

from __future__ import annotations

import psutil
import pytest

from coordinator.demo.processes import start_coordinator


def test_a_coordinator_that_is_still_starting_ends_with_us(tmp_path):
    # What Python runs first presses Ctrl-C, while we wait for the address.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(1000)\n"
    )
    before = set(psutil.Process().children())

    with pytest.raises(KeyboardInterrupt):
        start_coordinator({"PYTHONPATH": str(tmp_path)}, tmp_path)

    assert set(psutil.Process().children()) == before
