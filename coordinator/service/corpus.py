"""Turns a folder of text into shards of tokens, once, before a run starts.

Journey: read every document and drop exact duplicates; set whole documents aside
as held-out text; learn a byte-level BPE from the others alone; encode; write the
shards, the tokenizer and last the manifest into a fresh folder; swap it in.
The same text and recipe always give the same bytes. Memory holds one document and
one shard at a time, so a corpus may be larger than the machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from bitnet_ext.layout import DEFAULT_VOCAB_SIZE
from coordinator.domain.manifest import (
    HELD_OUT_ID,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    Shard,
    corpus_hash,
    encode_manifest,
    load_manifest,
)
from coordinator.service.byte_tokenizer import (
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    ByteTokenizer,
)
from coordinator.service.corpus_lock import CorpusInUseError, replacing
from coordinator.service.documents import (
    TOKENIZED,
    CorpusError,
    Document,
    find_documents,
    split,
)

MIN_SHARD_TOKENS: Final = 1024
#: A shard is built in memory: 4 GiB.
MAX_SHARD_TOKENS: Final = 2**30
#: More would be tens of bytes each in the tokenizer, and a row of every model.
MAX_VOCAB_SIZE: Final = 2**20

_FRESH: Final = ".tokenized-new"
_OLD: Final = ".tokenized-old"
# A longer document is encoded in pieces of this many characters.
_PIECE_CHARS: Final = 1 << 18
# A character of UTF-8 has at most 4 bytes, and a byte is at most one token.
_MAX_TOKENS_PER_CHAR: Final = 4


class Stage(StrEnum):
    """What the preparation is doing."""

    READING = "reading"  #: hashing documents
    LEARNING = "learning"  #: learning the tokenizer
    ENCODING = "encoding"  #: writing shards


#: Told the stage, and how many bytes of text are done of how many.
Progress = Callable[[Stage, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to prepare a corpus. Raises ValueError, naming field and value."""

    #: At most so many tokens; a short text fills fewer.
    vocab_size: int = DEFAULT_VOCAB_SIZE
    #: Decides what is held out and the order of the rest.
    seed: int = 0
    #: Held-out text: at least this many bytes and this share of all text, but
    #: never more than a third of it.
    held_out_bytes: int = 128_000
    held_out_share: float = 0.005
    #: Tokens in a shard, at most.
    shard_tokens: int = 4 * 2**20
    #: True where the text was generated; workers may refuse such shards.
    synthetic: bool = False

    def __post_init__(self) -> None:
        if not MIN_VOCAB_SIZE <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {MIN_VOCAB_SIZE} (every byte and "
                f"{END_OF_TEXT}) to {MAX_VOCAB_SIZE}, got {self.vocab_size}"
            )
        if self.held_out_bytes < 1:
            raise ValueError(
                f"held_out_bytes must be positive, got {self.held_out_bytes}"
            )
        if not 0.0 <= self.held_out_share <= 1 / 3:
            raise ValueError(
                f"held_out_share must be between 0 and 1/3, got {self.held_out_share}"
            )
        if not MIN_SHARD_TOKENS <= self.shard_tokens <= MAX_SHARD_TOKENS:
            raise ValueError(
                f"shard_tokens must be from {MIN_SHARD_TOKENS} to {MAX_SHARD_TOKENS}, "
                f"got {self.shard_tokens}"
            )


def tokenized_folder(corpus: Path) -> Path:
    """Return where the prepared corpus lies."""
    return corpus / TOKENIZED


def prepare_corpus(
    corpus: Path,
    recipe: Recipe,
    *,
    now: float,
    protected_hash: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Tokenize the `.txt` and `.md` files below `corpus` into `corpus/tokenized`.

    What lay there is replaced at the end, when all is durable; until then, and
    after any error, it stays as it was. `now` (Unix seconds) is only recorded.

    Raises CorpusInUseError when a coordinator uses the prepared corpus, or when it is
    the one of `protected_hash` (the `corpus_sha256` of the running run);
    ManifestError when it cannot be told whether it is; CorpusError naming the file
    for a missing or empty folder, text that is not UTF-8, too little text, or a full
    disk.
    """
    tell = progress or _tell_nobody
    with _exclusive(corpus):
        _restore(corpus)
        _refuse_in_use(corpus, protected_hash)
        with replacing(tokenized_folder(corpus)):
            return _prepare(corpus, recipe, now, tell)


def _prepare(corpus: Path, recipe: Recipe, now: float, tell: Progress) -> Manifest:
    documents = find_documents(corpus, partial(tell, Stage.READING))
    training, held_out = split(
        documents,
        seed=recipe.seed,
        held_out_bytes=recipe.held_out_bytes,
        held_out_share=recipe.held_out_share,
    )
    fresh = _fresh_folder(corpus)
    try:
        manifest = _write_all(fresh, training, held_out, recipe, now, tell)
        _swap_in(corpus, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def _write_all(
    folder: Path,
    training: list[Document],
    held_out: list[Document],
    recipe: Recipe,
    now: float,
    tell: Progress,
) -> Manifest:
    """Write tokenizer, shards and last the manifest into `folder`, durably."""
    tokenizer = ByteTokenizer.learn(_texts(training, tell), recipe.vocab_size)
    content = tokenizer.to_json()
    _write_durably(folder / TOKENIZER_NAME, content)
    shards = _write_shards(folder, tokenizer, training, held_out, recipe, tell)
    tokenizer_sha256 = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_sha256=tokenizer_sha256,
        corpus_sha256=corpus_hash(
            shards,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer_sha256=tokenizer_sha256,
        ),
        shards=shards,
        held_out_gzip_bytes=_gzip_bytes(held_out),
        created_at=now,
    )
    _write_durably(folder / MANIFEST_NAME, encode_manifest(manifest))
    _sync_folder(folder)
    return manifest


def _write_shards(
    folder: Path,
    tokenizer: ByteTokenizer,
    training: list[Document],
    held_out: list[Document],
    recipe: Recipe,
    tell: Progress,
) -> list[Shard]:
    total = sum(document.num_bytes for document in [*held_out, *training])
    shards, done = [], 0
    # The held-out text is one shard, however long: it is scored as a whole.
    for documents, limit in ((held_out, None), (training, recipe.shard_tokens)):
        writer = _ShardWriter(folder, recipe, limit)
        for document in documents:
            writer.start_document(tokenizer.eot_id)
            for piece in _pieces(document.read(), recipe.shard_tokens):
                writer.add(_encode_exactly(tokenizer, document, piece), piece)
            done += document.num_bytes
            tell(Stage.ENCODING, done, total)
        shards += writer.finish()
    return shards


class _ShardWriter:
    """Collects tokens and writes a shard whenever the next piece would not fit."""

    def __init__(self, folder: Path, recipe: Recipe, limit: int | None) -> None:
        self._folder = folder
        self._synthetic = recipe.synthetic
        self._limit = limit
        self._shards: list[Shard] = []
        #: The end of text that goes before the next piece, if one does.
        self._pending: list[int] = []
        self._clear()

    def _clear(self) -> None:
        self._parts: list[np.ndarray] = []
        self._num_tokens = self._text_bytes = self._num_documents = 0

    def start_document(self, eot_id: int) -> None:
        """The next piece is the first of a document."""
        self._pending = [eot_id]

    def add(self, ids: list[int], piece: str) -> None:
        """Append the tokens of a piece, never split over two shards."""
        num_tokens = len(self._pending) + len(ids)
        if self._limit is not None and self._num_tokens + num_tokens > self._limit:
            self._close()
        self._parts.append(np.array(self._pending + ids, dtype="<i4"))
        self._num_tokens += num_tokens
        self._text_bytes += len(piece.encode())
        self._num_documents += len(self._pending)
        self._pending = []

    def finish(self) -> list[Shard]:
        """Write what is left and return all shards."""
        self._close()
        return self._shards

    def _close(self) -> None:
        held_out = self._limit is None
        shard_id = HELD_OUT_ID if held_out else f"train-{len(self._shards):05d}"
        data = np.concatenate(self._parts).tobytes()
        _write_durably(self._folder / f"{shard_id}.bin", data)
        shard = Shard(
            shard_id=shard_id,
            num_tokens=self._num_tokens,
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            text_bytes=self._text_bytes,
            num_documents=self._num_documents,
            held_out=held_out,
            synthetic=self._synthetic,
        )
        self._shards.append(shard)
        self._clear()


def _encode_exactly(
    tokenizer: ByteTokenizer, document: Document, piece: str
) -> list[int]:
    ids = tokenizer.encode(piece)
    # Checked here and now: in a trained model nobody would ever find it.
    if tokenizer.decode(ids) != piece:
        raise CorpusError(f"{document.path} does not survive the tokenizer unchanged")
    return ids


def _pieces(text: str, shard_tokens: int) -> Iterator[str]:
    """Yield a text in stretches that each fit into a shard, cut after a line."""
    limit = min(_PIECE_CHARS, (shard_tokens - 1) // _MAX_TOKENS_PER_CHAR)
    start = 0
    while start < len(text):
        end = start + limit
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _texts(documents: list[Document], tell: Progress) -> Iterator[str]:
    total = sum(document.num_bytes for document in documents)
    done = 0
    for document in documents:
        yield document.read()
        done += document.num_bytes
        tell(Stage.LEARNING, done, total)


def _gzip_bytes(documents: list[Document]) -> int:
    """Return the size of all documents as one stream of `gzip -9`."""
    stream = zlib.compressobj(level=9, wbits=31)
    size = sum(len(stream.compress(document.read().encode())) for document in documents)
    return size + len(stream.flush())


def _tell_nobody(stage: Stage, done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def _exclusive(corpus: Path) -> Iterator[None]:
    """Hold the lock of the folder itself: two preparations would mix their files."""
    try:
        folder = os.open(corpus, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CorpusError(
            f"corpus folder {corpus} cannot be opened: {error.strerror}"
        ) from error
    try:
        _lock(corpus, folder)
        yield
    finally:
        os.close(folder)


def _lock(corpus: Path, folder: int) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CorpusError(f"{corpus} is being prepared by another process") from error


def _refuse_in_use(corpus: Path, protected_hash: str | None) -> None:
    path = tokenized_folder(corpus) / MANIFEST_NAME
    if protected_hash is None or not path.exists():
        return
    if load_manifest(path).corpus_sha256 == protected_hash:
        raise CorpusInUseError(
            f"{tokenized_folder(corpus)} is the corpus of the running run; "
            "finish the run first (`bitnet-coordinator train-for 1`, while workers can "
            "still score its last version), or prepare another folder"
        )


def _fresh_folder(corpus: Path) -> Path:
    fresh = corpus / _FRESH
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    return fresh


def _swap_in(corpus: Path, fresh: Path) -> None:
    """Put `fresh` in the place of the prepared corpus: all of it or nothing.

    A folder cannot be renamed over a full one, so the old one steps aside first;
    `_restore` brings it back where the process ended between the two renames.
    """
    target, old = tokenized_folder(corpus), corpus / _OLD
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    _sync_folder(corpus)
    shutil.rmtree(old, ignore_errors=True)


def _restore(corpus: Path) -> None:
    target, old = tokenized_folder(corpus), corpus / _OLD
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _write_durably(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CorpusError(f"cannot write {path}: {error.strerror}") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
