"""What a command line does once whoever reads its output has gone (`| head -1`)."""

from __future__ import annotations

import os
import signal
import sys


def reader_has_gone() -> int:
    """Send what standard output still holds nowhere, or it would fail at the end.

    Returns the exit status of a process that SIGPIPE has ended.
    """
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
