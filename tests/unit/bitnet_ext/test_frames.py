"""Frames: what is written is read, and headers say what they must."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bitnet_ext.codecs import Codec, decode, encode
from bitnet_ext.frames import (
    HEADER_BYTES,
    FrameError,
    FrameHeader,
    FrameKind,
    LayoutError,
    LengthError,
    check_header,
    decode_frame,
    decode_header,
    encode_frame,
    frame_bytes,
    frame_parts,
    sealed_parts,
)

LAYOUT = bytes(range(32))


def header(**changes):
    fields = {
        "kind": FrameKind.DELTA,
        "codec": Codec.INT8,
        "layout_hash": LAYOUT,
        "version": 7,
        "num_elements": 300,
    }
    return FrameHeader(**(fields | changes))


def vector(size=300):
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


@pytest.mark.parametrize("kind", FrameKind)
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("size", [0, 1, 300])
@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_frame_comes_back_as_it_was(kind, codec, size, wrap):
    written, payload = (
        header(kind=kind, codec=codec, num_elements=size),
        encode(codec, vector(size)),
    )

    frame = encode_frame(written, payload)
    read, found = decode_frame(wrap(frame))

    assert read == written
    assert bytes(found) == payload
    assert found.readonly
    assert len(frame) == frame_bytes(codec, size)


def test_a_frame_is_header_payload_and_checksum():
    payload = encode(Codec.INT8, vector())

    frame = encode_frame(header(), payload)

    assert frame[:4] == b"BNFR"
    assert frame[HEADER_BYTES:-32] == payload
    assert frame[-32:] == hashlib.sha256(frame[:-32]).digest()
    assert b"".join(frame_parts(header(), payload)) == frame
    pieces = sealed_parts(header(), payload[:7], payload[7:])
    assert b"".join(pieces) == frame[:-32]


def test_pieces_of_a_payload_must_be_as_long_together_as_its_header_says():
    payload = encode(Codec.INT8, vector())

    with pytest.raises(LengthError, match=f"must have {len(payload)} bytes .* got 9$"):
        sealed_parts(header(), payload[:7], payload[:2])


def test_the_payload_is_a_view_and_decodes():
    frame = bytearray(encode_frame(header(), encode(Codec.INT8, vector())))

    read, payload = decode_frame(frame)

    assert payload.obj is frame
    assert decode(read.codec, payload, read.num_elements).shape == (300,)


def test_a_header_can_be_read_before_the_rest_arrives():
    frame = encode_frame(header(), encode(Codec.INT8, vector()))

    read = decode_header(frame[:HEADER_BYTES])

    assert read == header()
    assert read.payload_bytes == len(frame) - HEADER_BYTES - 32


def test_a_server_state_holds_master_and_momentum():
    both = np.concatenate([vector(), np.zeros(300, dtype=np.float32)])
    written = header(kind=FrameKind.SERVER_STATE, codec=Codec.FP32, num_elements=600)

    read, payload = decode_frame(encode_frame(written, encode(Codec.FP32, both)))

    check_header(
        read, kind=FrameKind.SERVER_STATE, layout_hash=LAYOUT, num_elements=2 * 300
    )
    np.testing.assert_array_equal(decode(read.codec, payload, 600)[:300], vector())


def test_a_payload_of_another_length_is_not_framed():
    with pytest.raises(LengthError, match=r"payload must have 308 bytes .* got 307"):
        encode_frame(header(), bytes(307))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout_hash": b"short"}, "layout_hash must be 32 bytes, got 5"),
        ({"version": -1}, r"version must be from 0 to 2\*\*48 - 1, got -1"),
        ({"version": 1 << 48}, "version must be"),
        ({"num_elements": -1}, "num_elements must be"),
        ({"num_elements": 1 << 48}, "num_elements must be"),
    ],
)
def test_a_header_out_of_range_names_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        header(**change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": FrameKind.WEIGHTS}, FrameError, "kind must be delta, got weights"),
        ({"layout_hash": bytes(32)}, LayoutError, "layout_hash must be 0001.*got 0000"),
        ({"num_elements": 301}, LengthError, "num_elements must be 300, got 301"),
    ],
)
def test_a_frame_of_another_kind_model_or_length_is_refused(change, error, message):
    expected = {"kind": FrameKind.DELTA, "layout_hash": LAYOUT, "num_elements": 300}
    check_header(header(), **expected)

    with pytest.raises(error, match=message) as caught:
        check_header(header(**change), **expected)

    assert type(caught.value) is error
