"""`bitnet-coordinator` and `python -m coordinator`: import the command line, run it."""

from __future__ import annotations

import signal
import sys

from bitnet_ext.errors import UnknownIsaError


def main() -> int:
    """Run one command and return its exit status."""
    # Here and not above: the kernels choose their variant when they are imported.
    try:
        from coordinator import cli
    except UnknownIsaError as error:
        print(f"bitnet-coordinator: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # imports take a second
        return 128 + signal.SIGINT
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
