"""The `Range` header: one stretch, the whole file, or a clear refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.api.files import Stretch, wanted
from coordinator.domain.errors import RefusedError


@pytest.mark.parametrize(
    ("header", "due"),
    [
        ("bytes=0-0", Stretch(0, 1)),
        ("bytes=0-99", Stretch(0, 100)),
        ("bytes=10-19", Stretch(10, 20)),
        ("bytes=10-", Stretch(10, 100)),
        ("bytes=99-", Stretch(99, 100)),
        ("bytes=90-1000", Stretch(90, 100)),
        ("  bytes=1-2  ", Stretch(1, 3)),
    ],
)
def test_one_range_is_one_stretch(header, due):
    assert wanted(header, 100) == due


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-5",
        "bytes=0-1,5-6",
        "Bytes=0-1",
        "items=0-1",
        "bytes=a-b",
        "bytes=1-2x",
        "bytes=+1-2",
        "bytes=\u0661-2",
        "bytes=" + "1" * 19 + "-",
        "bytes=5-4",
        "bytes=200-100",
    ],
)
def test_whatever_else_is_the_whole_file(header):
    assert wanted(header, 100) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200"])
def test_a_range_that_begins_beyond_the_end_is_refused(header):
    with pytest.raises(RefusedError) as caught:
        wanted(header, 100)

    assert caught.value.code is ErrorCode.BAD_RANGE
    assert caught.value.field == "Range"
    assert "100 bytes" in caught.value.message
    assert header in caught.value.message


def test_an_empty_file_has_no_range():
    with pytest.raises(RefusedError):
        wanted("bytes=0-", 0)


@given(
    size=st.integers(1, 10**6),
    first=st.integers(0, 10**6),
    last=st.none() | st.integers(0, 10**6),
)
def test_a_stretch_is_what_slicing_gives(size, first, last):
    header = f"bytes={first}-{'' if last is None else last}"
    due = range(size)[first : size if last is None else last + 1]

    try:
        stretch = wanted(header, size)
    except RefusedError:
        assert not due
        return
    if stretch is None:
        assert last is not None
        assert last < first
    else:
        assert range(stretch.first, stretch.end) == due
