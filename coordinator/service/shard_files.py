"""Which file answers for a shard id; never one outside the corpus folder."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bitnet_ext.wire.messages import ID_PATTERN
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError

_ID: Final = re.compile(ID_PATTERN)
_BINARY: Final = "application/octet-stream"
_TEXT: Final = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A regular file inside the corpus folder."""

    #: Real path, free of links.
    path: Path
    content_type: str
    num_bytes: int


class UnknownShardError(RefusedError):
    """No file of the corpus answers for this id."""

    def __init__(self, shard_id: str) -> None:
        super().__init__(
            ErrorCode.UNKNOWN_SHARD,
            f"shard_id must name a shard of the corpus, got {shard_id[:80]!r}",
            field="shard_id",
        )


def find_shard(corpus: Path, shard_id: str) -> ShardFile:
    """Return the file of a shard: tokens first, then text, then the bare name.

    Raises UnknownShardError for an id of another form (before any file is looked
    at), a missing file, a link, a folder, or whatever leads out of `corpus`.
    """
    # fullmatch: `$` alone would let a trailing newline pass.
    if not _ID.fullmatch(shard_id):
        raise UnknownShardError(shard_id)
    for candidate in _candidates(corpus, shard_id):
        found = _regular_file(corpus, candidate)
        if found is not None:
            return found
    raise UnknownShardError(shard_id)


def _candidates(corpus: Path, shard_id: str) -> Iterator[Path]:
    yield corpus / "tokenized" / f"{shard_id}.bin"
    yield corpus / f"{shard_id}.bin"
    yield corpus / f"{shard_id}.txt"
    yield corpus / shard_id


def _regular_file(corpus: Path, candidate: Path) -> ShardFile | None:
    try:
        status = candidate.lstat()
        # Before resolving: a link that leads to itself has no real path.
        if not stat.S_ISREG(status.st_mode):
            return None
        real = candidate.resolve(strict=True)
        if not real.is_relative_to(corpus.resolve(strict=True)):
            return None
    except OSError:
        return None
    content_type = _TEXT if real.suffix == ".txt" else _BINARY
    return ShardFile(path=real, content_type=content_type, num_bytes=status.st_size)
