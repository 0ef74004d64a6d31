"""An exported folder: its list of hashes, and opening it.

`SHA256SUMS` is what `sha256sum` writes: one line a file, `hash  name`, sorted. It
covers every other file, so one that is cut short, changed, missing or added is found
before anything of it is believed.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bitnet_ext.exports import gguf_file, hugging_face, plain
from bitnet_ext.exports.parts import Parts
from bitnet_ext.exports.provenance import (
    PROVENANCE_NAME,
    ExportError,
    Format,
    Provenance,
    decode_provenance,
)
from bitnet_ext.layout import ModelShape

SUMS_NAME: Final = "SHA256SUMS"
TOKENIZER_NAME: Final = "tokenizer.json"

_LINE: Final = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9._-]+)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An exported folder that is whole."""

    about: Provenance
    shape: ModelShape
    #: For `Model.from_parts`.
    parts: Parts
    tokenizer: Path


def open_export(folder: Path) -> Export:
    """Check every file of an exported folder and read its model.

    Raises ExportError naming the file that is not what it was or can't be read, or the
    folder where it is no export at all.
    """
    try:
        check_sums(folder)
        return _read(folder)
    except OSError as error:
        raise ExportError(
            f"{error.filename or folder}: {error.strerror or error}"
        ) from error


def _read(folder: Path) -> Export:
    content = (folder / PROVENANCE_NAME).read_bytes()
    try:
        about = decode_provenance(content)
        return Export(
            about=about,
            shape=about.shape(),
            parts=_read_model(folder, about),
            tokenizer=folder / TOKENIZER_NAME,
        )
    except ValueError as error:
        raise ExportError(f"{folder}: {error}") from error


def _read_model(folder: Path, about: Provenance) -> Parts:
    match about.format:
        case Format.HF:
            return hugging_face.read_model(folder, about)
        case Format.GGUF:
            return gguf_file.read_model(folder, about)
        case Format.SAFETENSORS:
            return plain.read_model(folder, about)


def write_sums(folder: Path) -> None:
    """Write the hashes of all files of a folder."""
    lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / SUMS_NAME).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """Raise ExportError unless the files of a folder are exactly those listed."""
    due = _read_sums(folder)
    there = {path.name for path in folder.iterdir()} - {SUMS_NAME}
    for name in sorted(due.keys() ^ there):
        known = "is missing" if name in due else f"is not listed in {SUMS_NAME}"
        raise ExportError(f"{folder / name} {known}")
    for name, sha256 in due.items():
        found = _sha256(folder / name)
        if found != sha256:
            raise ExportError(
                f"{folder / name} must have SHA-256 {sha256}, got {found}: it is "
                f"damaged, export again"
            )


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS_NAME
    try:
        lines = path.read_bytes().decode("ascii").split("\n")
    except OSError as error:
        raise ExportError(
            f"{folder} is no exported folder: {SUMS_NAME}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is damaged: {error}") from error
    matches = [_LINE.fullmatch(line) for line in lines[:-1]]
    names = [match[2] for match in matches if match is not None]
    if lines[-1] or None in matches or len(set(names)) != len(lines) - 1:
        raise ExportError(f"{path} is damaged: not as `sha256sum` writes it")
    if PROVENANCE_NAME not in names or TOKENIZER_NAME not in names:
        raise ExportError(f"{path} must list {PROVENANCE_NAME} and {TOKENIZER_NAME}")
    return {match[2]: match[1] for match in matches if match is not None}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
