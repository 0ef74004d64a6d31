"""Which variant of the kernels runs: the fastest of this machine, or the one told.

It is chosen when this file is first imported. Every door takes the kernels from here,
so none ever runs another. All variants give the same bits, but those of attention.
"""

from __future__ import annotations

import os
from typing import Final

from bitnet_ext import _kernels
from bitnet_ext.errors import UnknownIsaError

#: The kernels, with their variant chosen.
kernels = _kernels

#: Name of a kernel variant; where it is set, no other runs.
ISA_VARIABLE: Final = "BITNET_EXT_ISA"


def active_isa() -> str:
    """Return the name of the kernel variant that runs."""
    return kernels.selected_isa()


def supported_isas() -> list[str]:
    """Return the variants that this machine can run, the fastest last."""
    return kernels.supported_isas()


def choose_isa(name: str | None) -> None:
    """Run the variant of that name from now on; None means the fastest.

    Raises UnknownIsaError, naming the variants of this machine, for any other.
    """
    supported = supported_isas()
    if name is not None and name not in supported:
        raise UnknownIsaError(
            f"{ISA_VARIABLE} must be one of {', '.join(supported)} on this machine, "
            f"got {name!r}"
        )
    kernels.select_isa(name or supported[-1])


# Empty counts as not set, as in every variable.
choose_isa(os.environ.get(ISA_VARIABLE) or None)
