"""The bytes of frames and layouts, pinned.

A change here breaks every worker and every stored version: it needs a new
PROTOCOL_VERSION (and a new format version for frames), and a line in the changelog.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from bitnet_ext.codecs import Codec, encode
from bitnet_ext.frames import FORMAT_VERSION, FrameHeader, FrameKind, encode_frame
from bitnet_ext.layout import PRESETS, layout_hash
from bitnet_ext.packing import pack
from bitnet_ext.wire import PROTOCOL_VERSION

#: The versions that the digests below belong to.
PINNED_PROTOCOL = 5
PINNED_FORMAT = 1

LAYOUT = bytes(range(32))


def numbers(count):
    """Return numbers that need no random generator: exact in float32, both signs."""
    return ((np.arange(count) * 37 % 1001 - 500) / 256).astype(np.float32)


def frame(kind, codec, count):
    header = FrameHeader(
        kind=kind, codec=codec, layout_hash=LAYOUT, version=5, num_elements=count
    )
    return encode_frame(header, encode(codec, numbers(count)))


FRAMES = {
    (FrameKind.WEIGHTS, Codec.FP32, 1): (
        "4ed74123d800e3798e975ed3c580c93091fee1c4ced668ca8c66983dee24fb16"
    ),
    (FrameKind.WEIGHTS, Codec.INT8, 513): (
        "594cda64e31af315575a01e270a72779157001ed397fe174f27c12cba409a8cd"
    ),
    (FrameKind.DELTA, Codec.INT8, 0): (
        "584375e9d87b0893051b8405ad2c31fa5f280a9a44cdae2b63f2b4aee2f8cca0"
    ),
    (FrameKind.DELTA, Codec.INT8, 3): (
        "5e2be4f1fe0daddd51bddfd30e431b4ca832868fdeaecb0c04629554c19529db"
    ),
    (FrameKind.DELTA, Codec.INT8, 1000): (
        "54f2e5a247b6257615a32dc4101be08a2de406b11c38c226a0aa433f210cddb8"
    ),
    (FrameKind.DELTA, Codec.TERNARY, 1003): (
        "afda9dbadfb0464de5b78c484f91b50b93680fcd8932af1b96c7c269541c5f6c"
    ),
    (FrameKind.GRADIENT, Codec.FP32, 300): (
        "358279f8818fcf410b06d927fedc25af977f0f4df8c36d748cf2331b7397c7f7"
    ),
    (FrameKind.SERVER_STATE, Codec.FP32, 600): (
        "5d2a615df982647f465449910e395b82214e2043440968cb5b729bd3f3b7b338"
    ),
    (FrameKind.GRADIENT_STATE, Codec.FP32, 900): (
        "4fd4659e6b8ec51131b9da72b77ee19951d5a5be389ea29d11608812e69d8037"
    ),
    (FrameKind.LINK, Codec.INT8, 513): (
        "8c4c00f25d378cdec6ee48aae111534b75ffcbdb085c30b4f25da7bce8d81abd"
    ),
    (FrameKind.RESIDUAL, Codec.FP32, 300): (
        "faffe73ec39dc2b00e0491d9140e4393c69dfaa6ad8ed497b5f15c9d13e6fd22"
    ),
    (FrameKind.GRADIENT_RESIDUAL, Codec.FP32, 300): (
        "c0159ffadefb2cc8d6995c319927ae7758642d3a7a881f76bb3de62da5ddf460"
    ),
    (FrameKind.MOMENTS, Codec.FP32, 610): (
        "51ed5e0eea699a13b5f1cb3d1f88cf666bf3871f30653d57c5df9bd11dff9760"
    ),
}
LAYOUTS = {
    "tiny": "db30de6e784de0579bc749c36208d345dfdb61e41dff0d7b26b0ef7d1d92b507",
    "small": "63bde67566f1ea3c72a565b1ed25fdc5e414787b2da792fd81922118b733c0d2",
    "medium": "2cfa8ad0787db882b7eb424a5d66cabf2edf58aee6c27977e7f7e44ebef12812",
    "large": "f03c115b3bf763460e2e68aabb6a323191ac4c5a4ba2e21c0d47a9544f95597b",
}
PACKED = "65ad4ebcf1006c53117d37af4fb5f8ddb3ee922e94d2a081e7718ea14ce6e114"


def test_the_digests_belong_to_this_version():
    assert (PROTOCOL_VERSION, FORMAT_VERSION) == (PINNED_PROTOCOL, PINNED_FORMAT)


@pytest.mark.parametrize(("kind", "codec", "count"), FRAMES)
def test_a_frame_has_the_pinned_bytes(kind, codec, count):
    found = hashlib.sha256(frame(kind, codec, count)).hexdigest()

    assert found == FRAMES[kind, codec, count]


def test_every_kind_and_codec_is_pinned():
    assert {kind for kind, _, _ in FRAMES} == set(FrameKind)
    assert {codec for _, codec, _ in FRAMES} == set(Codec)


def test_the_first_bytes_are_readable():
    head = frame(FrameKind.DELTA, Codec.INT8, 3)[:64]

    assert head == (
        b"BNFR" + b"\x01\x00" + b"\x02" + b"\x02"
        b"\x05\x00\x00\x00\x00\x00\x00\x00"
        b"\x03\x00\x00\x00\x00\x00\x00\x00"
        b"\x07\x00\x00\x00\x00\x00\x00\x00" + LAYOUT
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_layout_has_the_pinned_hash(preset):
    assert layout_hash(PRESETS[preset]).hex() == LAYOUTS[preset]


def test_packed_values_have_the_pinned_bytes():
    values = (np.arange(7 * 13) * 5 % 3 - 1).astype(np.int8).reshape(7, 13)

    assert hashlib.sha256(pack(values).tobytes()).hexdigest() == PACKED
