"""Which variant of the kernels runs: the fastest of this machine, or the one told.

It is chosen when the package is first imported, so that every door finds it chosen.
All variants give the same bits.
"""

from __future__ import annotations

import os
from typing import Final

from bitnet_ext import _kernels

#: Name of a kernel variant; where it is set, no other runs.
ISA_VARIABLE: Final = "BITNET_EXT_ISA"


def active_isa() -> str:
    """Return the name of the kernel variant that runs."""
    return _kernels.selected_isa()


def supported_isas() -> list[str]:
    """Return the variants that this machine can run, the fastest last."""
    return _kernels.supported_isas()


def choose_isa(name: str | None) -> None:
    """Run the variant of that name from now on; None means the fastest.

    Raises ValueError, naming the variants of this machine, for any other.
    """
    supported = supported_isas()
    if name is not None and name not in supported:
        raise ValueError(
            f"{ISA_VARIABLE} must be one of {', '.join(supported)} on this machine, "
            f"got {name!r}"
        )
    _kernels.select_isa(name or supported[-1])


choose_isa(os.environ.get(ISA_VARIABLE))
