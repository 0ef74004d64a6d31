"""`bitnet-worker` and `python -m worker`: import the command line, then run it."""

from __future__ import annotations

import signal
import sys

from bitnet_ext.errors import UnknownIsaError


def main() -> int:
    """Run one command and return its exit status."""
    # Here and not above: the kernels choose their variant when they are imported.
    try:
        from worker import cli
    except UnknownIsaError as error:
        print(f"bitnet-worker: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # imports take a second
        return 128 + signal.SIGINT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
