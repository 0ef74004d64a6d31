"""The corpus of the demo: text of this machine, or of a folder that the user names."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Final

from coordinator.domain.errors import StartError
from coordinator.domain.manifest import MANIFEST_NAME, Manifest, load_manifest
from coordinator.service.corpus import Recipe, prepare_corpus, tokenized_folder
from coordinator.service.demo_text import write_demo_text
from coordinator.service.documents import TOKENIZED

#: A short training makes more of few frequent tokens than of many rare ones.
VOCAB_SIZE: Final = 2048


def prepare(corpus: Path, source: Path | None) -> Manifest:
    """Return the manifest of the prepared corpus; prepares it the first time.

    `source` is a folder of text, linked file by file: nothing is written there.
    Raises StartError when a later run names another one, FleetError for bad text; a
    preparation that failed or was interrupted leaves nothing that a later run uses.
    """
    wanted = "docstrings" if source is None else str(source.resolve())
    note = corpus.with_name("corpus-source")
    manifest = tokenized_folder(corpus) / MANIFEST_NAME
    if manifest.exists():
        _check_same(note, wanted)
        return load_manifest(manifest)
    if corpus.exists():
        raise StartError(
            f"{corpus} holds no prepared corpus: remove it, or name another STATE "
            "folder"
        )
    return _prepare(corpus, source, note, wanted)


def _prepare(corpus: Path, source: Path | None, note: Path, wanted: str) -> Manifest:
    """Prepare beside the corpus folder, which appears when all is done."""
    fresh = corpus.with_name(f".{corpus.name}-new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        if source is None:
            write_demo_text(fresh)
        else:
            _link(source, fresh)
        recipe = Recipe(vocab_size=VOCAB_SIZE)
        manifest = prepare_corpus(fresh, recipe, now=time.time())
        note.write_text(wanted)
        fresh.rename(corpus)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def _check_same(note: Path, wanted: str) -> None:
    if note.read_text() != wanted:
        raise StartError(
            f"{note.parent} holds a demo on {note.read_text()}, not on {wanted}; "
            "name another STATE folder"
        )


def _link(source: Path, corpus: Path) -> None:
    """Fill the corpus folder with links to the text files of `source`."""
    if not source.is_dir():
        raise StartError(f"CORPUS must be a folder of text, got {str(source)!r}")
    for path in sorted(source.resolve().rglob("*")):
        inside = path.relative_to(source.resolve())
        if path.is_file() and TOKENIZED not in inside.parts:
            link = corpus / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    corpus.mkdir(exist_ok=True)
