"""The documents of a corpus: which files they are, and which are held out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coordinator.domain.errors import FleetError

#: The prepared corpus, inside the folder of text.
TOKENIZED: Final = "tokenized"
MIN_TEXT_BYTES: Final = 4096

_SUFFIXES: Final = (".txt", ".md")


class CorpusError(FleetError):
    """The corpus cannot be prepared; nothing has changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file of UTF-8 text, known by its content."""

    path: Path
    num_bytes: int
    sha256: str

    def read(self) -> str:
        """Return the text. Raises CorpusError when the file has changed since."""
        data = _read(self.path)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise CorpusError(f"{self.path} changed while it was being prepared")
        return data.decode()


def find_documents(corpus: Path, tell: Callable[[int, int], None]) -> list[Document]:
    """Return the distinct documents below a folder, sorted by path.

    `tell` hears how many bytes are read of how many. Raises CorpusError when there
    is no text, or naming a file that is not UTF-8.
    """
    paths = [path for path in sorted(corpus.rglob("*")) if _is_text(corpus, path)]
    num_bytes = sum(path.stat().st_size for path in paths)
    found: dict[str, Document] = {}
    done = 0
    for path in paths:
        data = _read(path)
        _check_utf8(path, data)
        done += len(data)
        tell(done, num_bytes)
        if data:
            sha256 = hashlib.sha256(data).hexdigest()
            document = Document(path=path, num_bytes=len(data), sha256=sha256)
            found.setdefault(sha256, document)
    if not found:
        raise CorpusError(f"no text in {corpus}: put .txt or .md files there")
    return list(found.values())


def split(
    documents: list[Document],
    *,
    seed: int,
    held_out_bytes: int,
    held_out_share: float,
) -> tuple[list[Document], list[Document]]:
    """Return the training documents and the held-out ones, each in seeded order.

    Held out are whole documents, until they have `held_out_bytes` and the share
    `held_out_share` of all bytes, but never more than a third. The order is that of
    the hash of seed and content, as good as shuffled, and names mean nothing to it.
    Raises CorpusError when there is too little text to hold any out.
    """
    total = sum(document.num_bytes for document in documents)
    if total < MIN_TEXT_BYTES:
        raise CorpusError(
            f"too little text: {total} bytes without duplicates, "
            f"at least {MIN_TEXT_BYTES} are needed"
        )
    wanted = max(held_out_bytes, math.ceil(held_out_share * total))
    training, held_out, taken = [], [], 0
    for document in sorted(documents, key=_order(seed)):
        if taken < wanted and 3 * (taken + document.num_bytes) <= total:
            held_out.append(document)
            taken += document.num_bytes
        else:
            training.append(document)
    if not held_out:
        raise CorpusError(
            f"too little text to hold any out: each of the {len(documents)} documents "
            "is more than a third of it; split the text into more files"
        )
    return training, held_out


def _order(seed: int) -> Callable[[Document], bytes]:
    def key(document: Document) -> bytes:
        return hashlib.sha256(f"{seed} {document.sha256}".encode()).digest()

    return key


def _is_text(corpus: Path, path: Path) -> bool:
    parts = path.relative_to(corpus).parts
    hidden = any(part.startswith(".") for part in parts)
    return (
        path.suffix.lower() in _SUFFIXES
        and parts[0] != TOKENIZED
        and not hidden
        and path.is_file()
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from error


def _check_utf8(path: Path, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}; convert it or move it out of the corpus"
        ) from error
