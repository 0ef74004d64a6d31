"""Whether shards and tokenizer on disk are those of the manifest, and stay so.

A worker can't tell a shard that was damaged from one that is trained on: its file is
hashed once, before anybody is given work on it. Afterwards size and time of the file
stand for its content.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from coordinator.domain.errors import StartError
from coordinator.domain.manifest import TOKENIZER_NAME, Manifest, Shard
from coordinator.service.documents import TOKENIZED
from coordinator.service.shard_files import UnknownShardError, find_shard

log = logging.getLogger(__name__)


class Stamp(NamedTuple):
    """What changes along with a file."""

    num_bytes: int
    mtime_ns: int


def stamp_of(file: BinaryIO) -> Stamp:
    """Return the stamp of an open file."""
    status = os.fstat(file.fileno())
    return Stamp(status.st_size, status.st_mtime_ns)


def check_shards(corpus: Path, manifest: Manifest) -> dict[str, Stamp]:
    """Hash tokenizer and shards; return the stamp of each shard by its id.

    Blocking, for minutes. Raises StartError naming the file, what it must be and
    what it is.
    """
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    started = time.monotonic()
    log.info(
        "checking %d shards",
        len(manifest.shards),
        extra={"event": "corpus.checking", "num_bytes": num_bytes},
    )
    _check_tokenizer(corpus / TOKENIZED / TOKENIZER_NAME, manifest.tokenizer_sha256)
    stamps = {shard.shard_id: check_shard(corpus, shard) for shard in manifest.shards}
    log.info(
        "checked %d shards",
        len(manifest.shards),
        extra={
            "event": "corpus.checked",
            "num_bytes": num_bytes,
            "seconds": round(time.monotonic() - started, 3),
        },
    )
    return stamps


def _check_tokenizer(path: Path, sha256: str) -> None:
    """Without it, nobody could read what a model of this corpus writes."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise StartError(
            f"cannot read {path}: {error.strerror}; its SHA-256 is {sha256}: restore "
            f"it from a backup"
        ) from error
    _compare(path, "SHA-256", sha256, found)


def check_shard(corpus: Path, shard: Shard) -> Stamp:
    """Hash one shard; return its stamp. Blocking; raises StartError as above."""
    try:
        path = find_shard(corpus, shard.shard_id).path
        with path.open("rb", buffering=0) as file:
            stamp = stamp_of(file)
            _compare(path, "bytes", shard.num_bytes, stamp.num_bytes)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            _compare(path, "SHA-256", shard.sha256, found)
    except UnknownShardError as error:
        raise StartError(
            f"shard {shard.shard_id}.bin of {corpus} is missing, or is no regular "
            f"file; its SHA-256 is {shard.sha256}: restore it from a backup"
        ) from error
    except OSError as error:
        raise StartError(f"cannot read {error.filename}: {error.strerror}") from error
    return stamp


def _compare(path: Path, what: str, due: object, got: object) -> None:
    if due != got:
        raise StartError(
            f"{path} is damaged: its {what} must be {due}, got {got}; restore "
            f"it from a backup, or use another data folder with a new corpus"
        )
