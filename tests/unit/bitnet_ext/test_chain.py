"""The chain of links: both sides end with the same bytes, and nothing is lost."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.chain import add_links, next_link, published_sha256
from bitnet_ext.codecs import Codec, NonFiniteError, PayloadError, encode
from bitnet_ext.frames import (
    FrameError,
    FrameHeader,
    FrameKind,
    LayoutError,
    LengthError,
    encode_frame,
)

LAYOUT = bytes(range(32))
CODECS = [Codec.TERNARY, Codec.INT8]
SIZE = 700


def normal(seed, size=SIZE):
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def framed(payload, version, codec=Codec.TERNARY, size=SIZE, **changes):
    header = {
        "kind": FrameKind.LINK,
        "codec": codec,
        "layout_hash": LAYOUT,
        "version": version,
        "num_elements": size,
    }
    return encode_frame(FrameHeader(**header | changes), payload)


def history(codec, num_versions, size=SIZE):
    """Return the first version, all later ones, and the links between them."""
    master = normal(0, size)
    published, versions, links = master.copy(), [master.copy()], []
    for number in range(1, num_versions + 1):
        master = master + np.float32(0.01) * normal(number, size)
        link = next_link(codec, master, published)
        versions.append(published.copy())
        links.append(framed(link, number, codec, size))
    return versions, links


def add(links, weights, *, held, version):
    add_links(b"".join(links), weights, layout_hash=LAYOUT, held=held, version=version)


@pytest.mark.parametrize("codec", CODECS)
@given(st.integers(0, 19), st.integers(1, 20))
def test_links_lead_from_any_version_to_any_later_one_to_the_bit(codec, held, more):
    versions, links = history(codec, 20)
    version = min(20, held + more)
    weights = versions[held].copy()

    add(links[held:version], weights, held=held, version=version)

    assert weights.tobytes() == versions[version].tobytes()


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_link_rounds_away_comes_with_the_next_ones(codec):
    master, published = normal(1), normal(2)
    before = np.linalg.norm(master - published)

    for _ in range(60):
        next_link(codec, master, published)

    assert np.linalg.norm(master - published) < 0.02 * before


@pytest.mark.parametrize("codec", CODECS)
def test_a_difference_that_no_link_holds_leaves_what_is_published(codec):
    master, published = normal(1), normal(2)
    master[3] = 3e38
    before = published.copy()

    with pytest.raises(NonFiniteError):
        next_link(codec, master, published)

    np.testing.assert_array_equal(published, before)


def test_the_hash_is_that_of_the_published_frame():
    weights = normal(5)
    frame = framed(
        encode(Codec.FP32, weights), 7, codec=Codec.FP32, kind=FrameKind.WEIGHTS
    )

    found = published_sha256(weights, layout_hash=LAYOUT, version=7)

    assert found == hashlib.sha256(frame).hexdigest()


VERSIONS, LINKS = history(Codec.TERNARY, 3)
PAYLOAD = encode(Codec.TERNARY, normal(9))


def flipped(frame, place):
    damaged = bytearray(frame)
    damaged[place] ^= 1
    return bytes(damaged)


@pytest.mark.parametrize(
    ("links", "error"),
    [
        ([], LengthError),
        (LINKS[:2], LengthError),
        ([LINKS[0], LINKS[2], LINKS[1]], FrameError),
        ([LINKS[0], LINKS[0], LINKS[2]], FrameError),
        ([*LINKS, LINKS[2]], LengthError),
        ([*LINKS, b"x"], LengthError),
        ([LINKS[0], flipped(LINKS[1], 100), LINKS[2]], FrameError),
        ([LINKS[0][:-1]], LengthError),
        ([framed(PAYLOAD, 1, kind=FrameKind.DELTA), *LINKS[1:]], FrameError),
        ([framed(PAYLOAD, 1, layout_hash=bytes(32)), *LINKS[1:]], LayoutError),
        ([framed(encode(Codec.TERNARY, normal(9, 9)), 1, size=9)], LengthError),
        ([framed(b"\xff" * len(PAYLOAD), 1), *LINKS[1:]], PayloadError),
    ],
)
def test_whatever_is_not_exactly_the_links_asked_for_is_refused(links, error):
    weights = VERSIONS[0].copy()

    with pytest.raises(error):
        add(links, weights, held=0, version=3)
