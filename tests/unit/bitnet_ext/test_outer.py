"""The fused outer step: its twin bit by bit, any size, any threads, bad payloads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext import reference
from bitnet_ext.codecs import Codec, NonFiniteError, PayloadError, decode, encode
from bitnet_ext.isa import active_isa, choose_isa, supported_isas
from bitnet_ext.outer import MOST_PARTS, Part, Step, outer_step

SIZES = [1, 255, 4096, 4097, 65_536 + 300, 3 * 65_536]
STEP = Step(rate=0.7, decay=0.9)
BOTH = [Codec.FP32, Codec.INT8]


def normal(size, seed):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def submissions(size, codecs):
    return [
        Part(codec, encode(codec, normal(size, seed)), 1 / (seed + 1.5))
        for seed, codec in enumerate(codecs)
    ]


def twin(before, parts, step, mean):
    total = np.zeros_like(before[0]) if mean is None else mean
    for part in parts:
        numbers = decode(part.codec, part.payload, len(total))
        total = reference.decode_add(numbers, total, part.share)
    return reference.outer_step(*before, total, rate=step.rate, decay=step.decay)


def run(before, parts, step, mean=None):
    after = np.empty_like(before[0]), np.empty_like(before[0])
    assert outer_step(before, parts, step, after=after, mean=mean)
    return after


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("codecs", [[Codec.INT8], [Codec.FP32], BOTH * 2, []])
def test_it_equals_its_twin_bit_by_bit(size, codecs):
    before = normal(size, 10), normal(size, 11)
    parts, mean = submissions(size, codecs), normal(size, 12)

    for given_mean in (None, mean):
        after = run(before, parts, STEP, given_mean)
        due = twin(before, parts, STEP, given_mean)
        assert [x.tobytes() for x in after] == [x.tobytes() for x in due]


def test_a_codec_that_it_cannot_read_is_refused():
    before = normal(300, 10), normal(300, 11)

    with pytest.raises(ValueError, match="codec must be fp32 or int8, got ternary"):
        run(before, submissions(300, [Codec.INT8, Codec.TERNARY]), STEP)


@given(st.integers(1, 200_000), st.integers(1, 4), st.sampled_from(supported_isas()))
def test_neither_threads_nor_the_variant_show(size, threads, isa):
    before, parts = (normal(size, 1), normal(size, 2)), submissions(size, [Codec.INT8])
    usual = active_isa()
    due = run(before, parts, STEP)
    try:
        choose_isa(isa)
        after = run(before, parts, Step(rate=0.7, decay=0.9, threads=threads))
    finally:
        choose_isa(usual)

    assert [x.tobytes() for x in after] == [x.tobytes() for x in due]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("shift", [0, 1, 13])
def test_large_vectors_are_written_past_the_caches_and_nowhere_else(shift):
    size = (2 << 20) + 4096 + 77
    before, parts = (normal(size, 1), normal(size, 2)), submissions(size, [Codec.INT8])
    memory = [np.full(size + 40, 99, dtype=np.float32) for _ in range(2)]
    after = tuple(whole[shift : shift + size] for whole in memory)

    step = Step(rate=0.7, decay=0.9, threads=2)
    assert outer_step(before, parts, step, after=after)

    due = twin(before, parts, STEP, None)
    for whole, new, wanted in zip(memory, after, due, strict=True):
        assert new.tobytes() == wanted.tobytes()
        assert (whole[:shift] == 99).all()
        assert (whole[shift + size :] == 99).all()


def test_the_inputs_stay_as_they_were():
    before, mean = (normal(999, 1), normal(999, 2)), normal(999, 3)
    copies = [x.copy() for x in (*before, mean)]

    run(before, submissions(999, [Codec.INT8]), STEP, mean)

    for vector, copy in zip((*before, mean), copies, strict=True):
        np.testing.assert_array_equal(vector, copy)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 4095, 4096, 70_000])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3.4e38])
def test_a_result_that_is_not_finite_is_told(place, bad):
    size = 70_001
    for which in range(2):
        before = np.zeros(size, np.float32), np.zeros(size, np.float32)
        before[which][place] = bad
        after = np.empty(size, np.float32), np.empty(size, np.float32)
        # Twice the rate takes 3.4e38 over the top, wherever it began.
        mean = np.full(size, -3.0e38 if which == 0 else 3.0e38, dtype=np.float32)

        assert not outer_step(before, [], Step(1.0, 1.0), after=after, mean=mean)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_payload_that_is_not_in_order_is_refused(place):
    size = 5000
    before = normal(size, 1), normal(size, 2)
    for codec, byte, error in (
        (Codec.INT8, b"\x80", PayloadError),
        (Codec.FP32, np.float32(np.nan).tobytes(), NonFiniteError),
    ):
        parts = submissions(size, [Codec.INT8] * 3)
        payload = encode(codec, normal(size, 4))
        parts[place] = Part(codec, payload[: -len(byte)] + byte, 0.5)
        after = np.empty(size, np.float32), np.empty(size, np.float32)

        with pytest.raises(error, match="payload"):
            outer_step(before, parts, STEP, after=after)


def test_what_does_not_fit_is_refused():
    before, parts = (normal(9, 1), normal(9, 2)), submissions(9, [Codec.INT8])
    after = np.empty(9, np.float32), np.empty(9, np.float32)

    with pytest.raises(ValueError, match=r"new momentum must be contiguous .* \(9,\)"):
        outer_step(before, parts, STEP, after=(after[0], np.empty(8, np.float32)))
    with pytest.raises(ValueError, match="momentum has the wrong length"):
        outer_step((before[0], normal(8, 1)), parts, STEP, after=after)
    with pytest.raises(ValueError, match="mean has the wrong length"):
        outer_step(before, parts, STEP, after=after, mean=normal(8, 1))
    with pytest.raises(PayloadError, match="payload must have 13 bytes"):
        outer_step(before, submissions(8, [Codec.INT8]), STEP, after=after)
    with pytest.raises(ValueError, match="payloads has the wrong length"):
        outer_step(before, parts * (MOST_PARTS + 1), STEP, after=after)


def test_an_empty_vector_is_stepped():
    nothing = np.empty(0, np.float32)

    assert outer_step((nothing, nothing), [], STEP, after=(nothing, nothing.copy()))
