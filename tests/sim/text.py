"""The text of the simulator: sources of the standard library, or files of a folder.

Bytes are tokens. A window is `SEQ_LEN` inputs and the target of the last. Files are
told apart by a hash of their name: one in twelve is held out, the rest is trained on,
in an order of windows that goes by the seed and the epoch alone.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tests.sim.net import SEQ_LEN

#: One of so many files is held out.
HELD_OUT: Final = 12
#: Windows that score a version: 65,536 targets.
NUM_SCORED: Final = 1024

Windows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Text:
    """Windows to train on and to score, int64 (n, SEQ_LEN + 1)."""

    train: Windows
    held_out: Windows

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the windows of an epoch in the order in which they are handed out."""
        return np.random.default_rng((seed, epoch)).permutation(len(self.train))


def read_text(folder: str = "") -> Text:
    """Read the text; an empty folder means the standard library."""
    root = Path(folder or sysconfig.get_path("stdlib"))
    pattern = "*" if folder else "*.py"
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in files:
        digest = hashlib.sha256(path.name.encode()).digest()
        parts[digest[0] % HELD_OUT == 0].append(path.read_bytes())
    train, held_out = (_windows(b"\n".join(part)) for part in parts)
    if not (len(train) and len(held_out)):
        raise ValueError(f"{root} must hold text to train on and to hold out")
    # From everywhere in the held-out text, not from its first files.
    stride = max(1, len(held_out) // NUM_SCORED)
    return Text(train, held_out[::stride][:NUM_SCORED])


def _windows(text: bytes) -> Windows:
    tokens = np.frombuffer(text, np.uint8)
    num = max(0, (len(tokens) - 1) // SEQ_LEN)
    starts = np.arange(num)[:, None] * SEQ_LEN
    return tokens[starts + np.arange(SEQ_LEN + 1)].astype(np.int64)
