"""What a version or an exported folder is scored on, and by which model.

Without torch, and without a fleet where an exported folder is scored on a file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitnet_ext.exports.folder import open_export
from bitnet_ext.exports.provenance import ExportError
from bitnet_ext.infer import Model
from bitnet_ext.layout import shape_from_json
from coordinator.domain.manifest import MANIFEST_NAME, load_manifest
from coordinator.service.byte_tokenizer import ByteTokenizer
from coordinator.service.corpus import tokenized_folder
from coordinator.service.exporting import Chosen, read_tokenizer, read_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A model, and the tokenizer that it was trained with."""

    model: Model
    tokenizer: ByteTokenizer
    tokenizer_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A stream of tokens that starts with an end of text."""

    tokens: NDArray[np.int32]
    #: UTF-8 bytes behind the tokens.
    num_bytes: int


def version_to_score(data: Path, corpus: Path, chosen: Chosen) -> Scored:
    """Return a version of the data folder. Raises as `export_version`."""
    shape = shape_from_json(json.loads(chosen.run.model_json))
    content, _ = read_tokenizer(corpus, chosen.run)
    return Scored(
        model=Model.from_flat(shape, read_weights(data, chosen)),
        tokenizer=ByteTokenizer.parse(content),
        tokenizer_hash=chosen.run.tokenizer_hash,
    )


def export_to_score(folder: Path) -> Scored:
    """Return the model of an exported folder. Raises ExportError."""
    export = open_export(folder)
    return Scored(
        model=Model.from_parts(export.shape, export.parts),
        tokenizer=ByteTokenizer.parse(export.tokenizer.read_bytes()),
        tokenizer_hash=export.about.tokenizer_hash,
    )


def held_out_text(corpus: Path, scored: Scored) -> Text:
    """Return the held-out shard of a prepared corpus.

    Raises ExportError where it was tokenized otherwise or is damaged, ManifestError or
    OSError where there is none.
    """
    folder = tokenized_folder(corpus)
    manifest = load_manifest(folder / MANIFEST_NAME)
    if manifest.tokenizer_sha256 != scored.tokenizer_hash:
        raise ExportError(
            f"{folder} must be tokenized as the model was trained, with tokenizer "
            f"{scored.tokenizer_hash}, got {manifest.tokenizer_sha256}: name its "
            f"corpus with --corpus, or a file with --text"
        )
    shard = manifest.held_out_shard()
    content = (folder / f"{shard.shard_id}.bin").read_bytes()
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise ExportError(f"{folder / shard.shard_id}.bin is damaged: put it back")
    tokens = np.frombuffer(content, dtype="<i4").astype(np.int32, copy=False)
    return Text(tokens=tokens, num_bytes=shard.text_bytes)


def file_text(path: Path, scored: Scored) -> Text:
    """Return a file of UTF-8 text as one document. Raises ExportError or OSError."""
    content = path.read_bytes()
    try:
        ids = scored.tokenizer.encode(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} must be UTF-8 text: {error}") from error
    if not ids:
        raise ExportError(f"{path} must hold text, it is empty")
    tokens = np.array([scored.tokenizer.eot_id, *ids], dtype=np.int32)
    return Text(tokens=tokens, num_bytes=len(content))
