"""Frames and payloads from someone who means harm: each is refused, none is costly."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.codecs import (
    BLOCK,
    Codec,
    NonFiniteError,
    PayloadError,
    decode,
    encode,
    payload_bytes,
)
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    LengthError,
    decode_frame,
    encode_frame,
)
from tests.unit.bitnet_ext.conftest import isa  # noqa: F401

SIZE = 300


def good_payload(codec=Codec.INT8, size=SIZE):
    vector = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    return bytearray(encode(codec, vector))


def good_frame(codec=Codec.INT8):
    header = FrameHeader(
        kind=FrameKind.DELTA,
        codec=codec,
        layout_hash=bytes(range(32)),
        version=3,
        num_elements=SIZE,
    )
    return bytearray(encode_frame(header, good_payload(codec)))


def seal(frame):
    """Return the frame with a checksum that fits, as a liar would send it."""
    return bytes(frame[:-32]) + hashlib.sha256(frame[:-32]).digest()


@pytest.mark.parametrize("codec", Codec)
def test_every_truncation_is_refused(codec):
    frame = bytes(good_frame(codec))

    for length in range(len(frame)):
        with pytest.raises(LengthError):
            decode_frame(memoryview(frame)[:length])


@pytest.mark.parametrize("extra", [1, 32, 64, 1000])
def test_trailing_bytes_are_refused(extra):
    with pytest.raises(LengthError, match="frame must have"):
        decode_frame(bytes(good_frame()) + bytes(extra))


def test_two_frames_in_a_row_are_not_one():
    with pytest.raises(LengthError):
        decode_frame(bytes(good_frame()) * 2)


def test_every_flipped_bit_is_noticed():
    frame = good_frame()

    for place in range(len(frame)):
        for bit in range(8):
            frame[place] ^= 1 << bit
            with pytest.raises(FrameError):
                decode_frame(frame)
            frame[place] ^= 1 << bit

    decode_frame(frame)


@given(st.binary(max_size=300))
def test_random_bytes_are_no_frame(data):
    with pytest.raises(FrameError):
        decode_frame(data)


@given(st.binary(max_size=200))
def test_random_bytes_behind_the_magic_are_no_frame(data):
    with pytest.raises(FrameError):
        decode_frame(b"BNFR\x01\x00" + data)


@pytest.mark.parametrize(
    ("offset", "form", "value", "field"),
    [
        (0, "<I", 0, "magic"),
        (4, "<H", 0, "format version"),
        (4, "<H", 2, "format version"),
        (6, "<B", 0, "kind"),
        (6, "<B", len(FrameKind) + 1, "kind"),
        (6, "<B", 255, "kind"),
        (7, "<B", 0, "codec"),
        (7, "<B", 4, "codec"),
        (7, "<B", 3, "payload_bytes"),
        (8, "<Q", 1 << 48, "version"),
        (8, "<Q", 2**64 - 1, "version"),
        (16, "<Q", 1 << 48, "num_elements"),
        (16, "<Q", 2**64 - 1, "num_elements"),
        (16, "<Q", (1 << 48) - 1, "payload_bytes"),
        (16, "<Q", SIZE + 1, "payload_bytes"),
        (16, "<Q", 0, "payload_bytes"),
        (24, "<Q", 0, "payload_bytes"),
        (24, "<Q", 2**64 - 1, "payload_bytes"),
    ],
)
def test_a_lie_in_the_header_is_refused_even_with_a_checksum(
    offset, form, value, field
):
    frame = good_frame()
    struct.pack_into(form, frame, offset, value)

    with pytest.raises(FrameError, match=f"^{field} must be"):
        decode_frame(seal(frame))


def test_a_consistent_but_absurd_length_allocates_nothing():
    frame, count = good_frame(), (1 << 48) - 1
    struct.pack_into("<QQ", frame, 16, count, payload_bytes(Codec.INT8, count))

    tracemalloc.start()
    try:
        with pytest.raises(LengthError, match="frame must have"):
            decode_frame(seal(frame))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 100_000


def test_another_codec_does_not_reinterpret_the_payload():
    frame = good_frame()
    frame[7] = Codec.FP32.number

    with pytest.raises(LengthError, match="payload_bytes must be 1200"):
        decode_frame(seal(frame))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("scale", "error"),
    [
        (np.nan, NonFiniteError),
        (-np.nan, NonFiniteError),
        (np.inf, NonFiniteError),
        (-np.inf, NonFiniteError),
        (3e38, NonFiniteError),
        (1.3e30, NonFiniteError),
        (-1.0, PayloadError),
        (-0.0, PayloadError),
        (1e-40, PayloadError),
        (-1e-40, PayloadError),
    ],
)
def test_a_scale_that_no_encoder_writes_is_refused(block, scale, error):
    payload = good_payload()
    struct.pack_into("<f", payload, 4 * block, scale)

    with pytest.raises(error):
        decode(Codec.INT8, payload, SIZE)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 1, 63, 255, 256, SIZE - 1])
def test_minus_128_is_refused(place):
    payload = good_payload()
    payload[8 + place] = 128

    with pytest.raises(PayloadError, match="never written"):
        decode(Codec.INT8, payload, SIZE)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 150, SIZE - 1])
@pytest.mark.parametrize("bits", [0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF])
def test_fp32_that_is_not_finite_is_refused(place, bits):
    payload = good_payload(Codec.FP32)
    struct.pack_into("<I", payload, 4 * place, bits)

    with pytest.raises(NonFiniteError):
        decode(Codec.FP32, payload, SIZE)


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("change", [-4, -1, 1, 4, BLOCK])
def test_a_payload_of_another_length_is_refused(codec, change):
    payload = (good_payload(codec) + bytes(BLOCK))[
        : payload_bytes(codec, SIZE) + change
    ]

    with pytest.raises(PayloadError, match=f"payload must have .* for {SIZE} numbers"):
        decode(codec, payload, SIZE)


@given(st.binary(min_size=SIZE + 8, max_size=SIZE + 8))
def test_whatever_decodes_is_finite(payload):
    try:
        vector = decode(Codec.INT8, payload, SIZE)
    except PayloadError:
        return

    assert np.isfinite(vector).all()
