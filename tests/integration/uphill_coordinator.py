"""A coordinator that adds pseudo-gradients instead of subtracting them.

The fault of the system that this one replaces; the sign tests must catch it.
"""

from __future__ import annotations

import sys
from typing import Any

from coordinator import cli
from coordinator.domain.outer_step import outer_step
from coordinator.service import closing


def uphill(*arguments: Any, rate: float, decay: float) -> Any:
    return outer_step(*arguments, rate=-rate, decay=decay)


if __name__ == "__main__":
    closing.outer_step = uphill
    sys.exit(cli.main())
