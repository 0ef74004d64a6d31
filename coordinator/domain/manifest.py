"""What a prepared corpus consists of: the manifest that lies beside its shards.

The manifest is written last, so a folder that has one is whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from bitnet_ext.wire.messages import Count, Id, Positive, Sha256
from coordinator.domain.errors import FleetError

MANIFEST_NAME: Final = "manifest.json"
TOKENIZER_NAME: Final = "tokenizer.json"
MANIFEST_VERSION: Final = 1
#: The one shard that no worker ever trains on.
HELD_OUT_ID: Final = "heldout-00000"


class ManifestError(FleetError):
    """A manifest is missing or wrong; the message names the file and the field."""


class Shard(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of tokens: little-endian int32, each document after an EOT."""

    shard_id: Id
    num_tokens: Positive
    #: Size of the file: 4 bytes a token.
    num_bytes: Positive
    #: SHA-256 of the file.
    sha256: Sha256
    #: UTF-8 bytes of text behind the tokens; an EOT stands for none.
    text_bytes: Positive
    #: Documents that begin in this shard.
    num_documents: Count
    #: True for the shard that versions are scored on.
    held_out: bool
    #: True where the text was generated.
    synthetic: bool

    def __post_init__(self) -> None:
        if self.num_bytes != 4 * self.num_tokens:
            raise ValueError(
                f"num_bytes of {self.shard_id} must be 4 * num_tokens "
                f"({4 * self.num_tokens}), got {self.num_bytes}"
            )


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a run needs to know of its corpus."""

    version: Annotated[int, Meta(ge=MANIFEST_VERSION, le=MANIFEST_VERSION)] = (
        MANIFEST_VERSION
    )
    #: Entries of the tokenizer, the end-of-text token included.
    vocab_size: Positive
    #: The token that starts each document.
    eot_id: Count
    #: SHA-256 of `tokenizer.json`.
    tokenizer_sha256: Sha256
    #: `corpus_hash` of what a model and its scores depend on.
    corpus_sha256: Sha256
    shards: list[Shard]
    #: Size of the held-out text as one `gzip -9` stream: what a model must beat.
    held_out_gzip_bytes: Positive
    #: Unix seconds.
    created_at: Annotated[float, Meta(ge=0.0)]

    def __post_init__(self) -> None:
        ids = [shard.shard_id for shard in self.shards]
        if len(set(ids)) != len(ids):
            raise ValueError(f"shards must have distinct ids, got {ids}")
        held_out = sum(shard.held_out for shard in self.shards)
        if held_out != 1 or len(ids) == 1:
            raise ValueError(
                "shards must be one held-out shard and at least one other, "
                f"got {held_out} held-out of {len(ids)}"
            )
        if self.eot_id >= self.vocab_size:
            raise ValueError(
                f"eot_id must be below vocab_size {self.vocab_size}, got {self.eot_id}"
            )
        due = corpus_hash(
            self.shards,
            vocab_size=self.vocab_size,
            eot_id=self.eot_id,
            tokenizer_sha256=self.tokenizer_sha256,
        )
        if self.corpus_sha256 != due:
            raise ValueError(
                f"corpus_sha256 must be the hash of shards and vocabulary, {due}, got "
                f"{self.corpus_sha256}; a manifest is never edited: put it back, or "
                f"prepare the corpus anew with tokenize-corpus"
            )

    def train_shards(self) -> list[Shard]:
        """Return the shards to train on, in order."""
        return [shard for shard in self.shards if not shard.held_out]

    def held_out_shard(self) -> Shard:
        """Return the shard that versions are scored on."""
        return next(shard for shard in self.shards if shard.held_out)

    def shard(self, shard_id: str) -> Shard | None:
        """Return the shard of that id."""
        return next((s for s in self.shards if s.shard_id == shard_id), None)

    def gzip_bits_per_byte(self) -> float:
        """Return what `gzip -9` needs for a byte of the held-out text, in bits."""
        return 8 * self.held_out_gzip_bytes / self.held_out_shard().text_bytes


def corpus_hash(
    shards: Iterable[Shard], *, vocab_size: int, eot_id: int, tokenizer_sha256: str
) -> str:
    """Return the SHA-256 that says which corpus this is, whenever it was prepared.

    Over the line `vocab_size eot_id tokenizer_sha256`, then one line
    `id sha256 held_out text_bytes synthetic` a shard, sorted.
    """
    lines = sorted(
        f"{s.shard_id} {s.sha256} {int(s.held_out)} {s.text_bytes} {int(s.synthetic)}\n"
        for s in shards
    )
    head = f"{vocab_size} {eot_id} {tokenizer_sha256}\n"
    return hashlib.sha256("".join([head, *lines]).encode()).hexdigest()


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest)) + b"\n"


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises ManifestError naming the file and the field."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror or error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: {error}") from error
