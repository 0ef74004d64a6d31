"""Blobs: whole or not there, whatever call fails and whenever the process ends."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import pytest

from coordinator.service.starting import reconcile
from coordinator.store.blobs import BlobKind, Blobs, version_blob
from tests.fakes import FakeFs, FakeRng, MadeToFailError
from tests.unit.coordinator.fleets import World


def framed(parts):
    """Return what is to lie on the disk."""
    body = b"".join(bytes(part) for part in parts)
    return body + hashlib.sha256(body).digest()


PARTS = [b"head", memoryview(b"x" * 1000)]
WHOLE = framed(PARTS)
#: The calls of one write of `PARTS` and their hash, and the discard after it.
CALLS = [
    "create",
    "write",
    "write",
    "write",
    "sync",
    "close",
    "rename",
    "sync_folder",
    "unlink",
]


@pytest.fixture
def fs():
    return FakeFs()


@pytest.fixture
def blobs(tmp_path: Path, fs: FakeFs):
    return Blobs(tmp_path, fs, FakeRng())


def write(blobs, name="a"):
    return blobs.write_frame(BlobKind.STATE, name, PARTS)


def test_a_blob_is_hashed_while_it_is_written(blobs):
    written = write(blobs)

    assert blobs.read(BlobKind.STATE, "a") == WHOLE
    assert written.sha256 == hashlib.sha256(WHOLE).hexdigest()
    assert written.num_bytes == len(WHOLE)
    assert blobs.names(BlobKind.STATE) == ["a"]
    assert blobs.names(BlobKind.PAYLOAD) == []


def test_only_its_user_can_read_it(blobs):
    write(blobs)

    path = blobs.path(BlobKind.STATE, "a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_it_is_synced_before_it_gets_its_name_and_the_folder_after(blobs, fs):
    write(blobs)

    assert fs.calls == CALLS


@pytest.mark.parametrize("ordinal", range(1, len(CALLS) + 1))
def test_a_failing_call_is_reported_and_leaves_no_half_file(blobs, fs, ordinal):
    with fs.failing(ordinal), pytest.raises(MadeToFailError):
        write(blobs)

    for name in blobs.names(BlobKind.STATE):
        if not name.startswith(".tmp-"):
            assert blobs.read(BlobKind.STATE, name) == WHOLE
    write(blobs)
    assert blobs.read(BlobKind.STATE, "a") == WHOLE


@pytest.mark.parametrize("ordinal", range(1, len(CALLS) + 1))
def test_a_crash_at_any_call_leaves_the_old_blob_or_the_new_one(blobs, fs, ordinal):
    blobs.write_frame(BlobKind.STATE, "a", [b"old"])

    with fs.crashing(ordinal), pytest.raises(MadeToFailError):
        write(blobs)

    assert blobs.read(BlobKind.STATE, "a") in (framed([b"old"]), WHOLE)


@pytest.mark.parametrize("ordinal", range(1, len(CALLS) + 1))
def test_the_next_start_removes_what_a_crash_left(world: World, ordinal):
    with world.fs.crashing(ordinal), pytest.raises(MadeToFailError):
        write(world.fleet.blobs, version_blob(1))

    reconcile(world.fleet)

    assert world.blobs() == {}


def test_every_crash_but_the_first_call_leaves_something_to_remove(blobs, fs):
    """Guards the test above: it would pass if nothing were ever left."""
    left = []
    for ordinal in range(1, len(CALLS) + 1):
        with fs.crashing(ordinal), pytest.raises(MadeToFailError):
            write(blobs)
        left.append(bool(blobs.names(BlobKind.STATE)))
        blobs.remove(BlobKind.STATE, blobs.names(BlobKind.STATE))

    assert left == [False] + [True] * (len(CALLS) - 1)


def test_a_spool_that_is_thrown_away_leaves_nothing(blobs):
    spool = blobs.spool(BlobKind.PAYLOAD)
    spool.write(b"half")

    spool.discard()

    assert blobs.names(BlobKind.PAYLOAD) == []
    for act in (lambda: spool.write(b"more"), lambda: spool.keep(Path("x"))):
        with pytest.raises(ValueError, match="spool is closed"):
            act()


def test_a_kept_spool_survives_its_discard(blobs):
    spool = blobs.spool(BlobKind.PAYLOAD)
    spool.write(b"data")
    kept = blobs.keep(spool, BlobKind.PAYLOAD, "p")

    spool.discard()

    assert blobs.read(BlobKind.PAYLOAD, "p") == b"data"
    assert (kept.name, kept.num_bytes) == ("p", 4)


def test_an_open_blob_stays_readable_when_it_is_removed(blobs):
    write(blobs)
    with blobs.open(BlobKind.STATE, "a") as file:
        blobs.remove(BlobKind.STATE, ["a", "never-there"])

        assert file.read() == WHOLE
    with pytest.raises(FileNotFoundError):
        blobs.read(BlobKind.STATE, "a")


def test_a_link_is_never_followed(blobs, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    blobs.path(BlobKind.STATE, "a").symlink_to(secret)

    with pytest.raises(OSError, match="symbolic links"):
        blobs.open(BlobKind.STATE, "a")


def test_versions_sort_by_number():
    names = [version_blob(number) for number in (1, 9, 10, 100, 12345)]

    assert names == sorted(names)
