"""Scores a model on a text without torch, and cuts texts for whoever scores.

A stream is `EOT document EOT document ...`. Every token but EOT is scored once,
with its own document alone as context: windows start at the document's EOT,
never reach into the next one, and overlap by half, so that a token in a long
document still sees at least half a window of what came before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.infer import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class TextScore:
    """How well a model predicts a text."""

    #: Summed cross-entropy.
    nats: float
    #: Tokens that were scored, and UTF-8 bytes of text behind them.
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """How many tokens it is as if the model chose among; infinite beyond 1e308."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of the text."""
        return self.nats / math.log(2.0) / self.num_bytes


@dataclass(frozen=True, slots=True)
class Window:
    """A run of inputs of one document and what to score in it."""

    #: Index of the first input in the stream.
    start: int
    #: Number of inputs; the target of each is the token after it.
    length: int
    #: Targets before this one belong to an earlier window.
    first_scored: int


def score_text(
    model: Model,
    tokens: NDArray[np.int32],
    *,
    eot_id: int,
    num_bytes: int,
    threads: int = 1,
) -> TextScore:
    """Return the score on a stream of tokens with so many bytes of text behind it.

    Raises ValueError when the stream does not start with EOT, holds nothing else, or
    an id that the model does not know.
    """
    nats, num_scored = 0.0, 0
    for window in windows(tokens, eot_id, model.shape.seq_len):
        stretch = tokens[window.start : window.start + window.length + 1]
        logits = model.logits(stretch[:-1], threads=threads)[window.first_scored :]
        nats += _nats(logits, stretch[window.first_scored + 1 :])
        num_scored += len(logits)
    if not num_scored:
        raise ValueError("the text must hold at least one token, got none")
    return TextScore(nats=nats, tokens=num_scored, num_bytes=num_bytes)


def _nats(logits_TV: NDArray[np.float32], targets_T: NDArray[np.int32]) -> float:
    """Return the summed cross-entropy of rows of logits."""
    shifted = logits_TV - logits_TV.max(axis=1, keepdims=True)
    sums = np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))
    due = shifted[np.arange(len(targets_T)), targets_T]
    return float((sums - due).sum())


def windows(tokens: NDArray[np.int32], eot_id: int, seq_len: int) -> Iterator[Window]:
    """Yield the windows of a stream, document by document."""
    if not len(tokens) or tokens[0] != eot_id:
        raise ValueError(
            f"tokens must start with EOT ({eot_id}), got {tokens[:1].tolist()}"
        )
    starts = np.flatnonzero(tokens == eot_id)
    ends = np.append(starts[1:], len(tokens))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield from _windows_of_document(start, end - start - 1, seq_len)


def _windows_of_document(
    start: int, num_targets: int, seq_len: int
) -> Iterator[Window]:
    """Yield the windows of the document whose EOT is at `start`."""
    stride = max(1, seq_len // 2)
    offset, num_scored = 0, 0
    while num_scored < num_targets:
        length = min(seq_len, num_targets - offset)
        yield Window(start + offset, length, num_scored - offset)
        num_scored = offset + length
        offset += stride
