"""The first weights: from the seed alone, scaled, never zero."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitnet_ext.layout import ModelShape, SegmentKind, num_params, segments
from coordinator.domain.initial import initial_weights

SHAPE = ModelShape(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    seq_len=16,
)


def parts(kind):
    flat = initial_weights(SHAPE, 1)
    return [
        flat[s.offset : s.offset + s.size] for s in segments(SHAPE) if s.kind is kind
    ]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    first = initial_weights(SHAPE, 1)

    assert first.dtype == np.float32
    assert first.shape == (num_params(SHAPE),)
    assert first.tobytes() == initial_weights(SHAPE, 1).tobytes()
    assert first.tobytes() != initial_weights(SHAPE, 2).tobytes()


def test_every_number_was_written_and_no_segment_is_zero():
    flat = initial_weights(SHAPE, 1)

    assert np.isfinite(flat).all()
    for segment in segments(SHAPE):
        assert flat[segment.offset : segment.offset + segment.size].any()


def test_norm_gains_are_one():
    for gains in parts(SegmentKind.NORM):
        np.testing.assert_array_equal(gains, 1.0)


@pytest.mark.parametrize(
    ("kind", "deviation"),
    [
        (SegmentKind.EMBEDDING, 0.02),
        (SegmentKind.LINEAR, 0.02),
        (SegmentKind.RESIDUAL, 0.02 / math.sqrt(6)),
    ],
)
def test_matrices_have_their_deviation(kind, deviation):
    for matrix in parts(kind):
        assert matrix.std() == pytest.approx(deviation, rel=0.06)
        assert abs(matrix.mean()) < 0.1 * deviation
