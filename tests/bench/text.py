"""Real text for benchmarks without a download: docstrings of the standard library.

Words and signs become numbers by how often they occur, so the ids have the skewed
distribution of real tokens; what is too rare for the vocabulary is number 0.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DOCSTRING = re.compile(r'"""(.+?)"""', re.DOTALL)
_WORD = re.compile(r"\w+|[^\w\s]|\n+")


def real_text() -> str:
    """Return the text, in the order of the files."""
    return "\n\n".join(_docstrings())


def real_tokens(vocab_size: int) -> NDArray[np.int64]:
    """Return the text as ids below `vocab_size`."""
    words = [word for found in _docstrings() for word in _WORD.findall(found)]
    common = Counter(words).most_common(vocab_size - 1)
    ids = {word: rank for rank, (word, _) in enumerate(common, start=1)}
    return np.array([ids.get(word, 0) for word in words], dtype=np.int64)


def _docstrings() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield from _DOCSTRING.findall(path.read_text(errors="replace"))


def batches(
    tokens: NDArray[np.int64], num_sequences: int, seq_len: int, seed: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, int64 (B, T), from random places, without end."""
    random = np.random.default_rng(seed)
    while True:
        starts = random.integers(0, len(tokens) - seq_len - 1, num_sequences)
        windows = np.stack([tokens[start : start + seq_len + 1] for start in starts])
        both = torch.from_numpy(windows)
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()
