"""Scoring and sampling from files: a frame, a prepared corpus, no coordinator.

The manifest and the shards are those that the coordinator prepared; of the
manifest only what is needed here is read.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from bitnet_ext.frames import FrameError, FrameHeader, FrameKind, decode_frame
from bitnet_ext.layout import (
    PRESETS,
    ModelShape,
    UnknownPresetError,
    layout_hash,
    num_params,
    preset_shape,
)
from bitnet_ext.wire.messages import Count, Id, Positive, Sha256
from worker.errors import BadWeightsError, SettingsError
from worker.evaluate import Score, evaluate
from worker.model.transformer import BitNetModel
from worker.train import Hooks
from worker.weights import read_weights

if TYPE_CHECKING:
    from bitnet_ext.exports.folder import Export

MANIFEST_NAME: Final = "manifest.json"
TOKENIZED: Final = "tokenized"


class _Shard(Struct, frozen=True, kw_only=True):
    """What is read of a shard's entry in the manifest."""

    shard_id: Id
    sha256: Sha256
    #: UTF-8 bytes of text behind the tokens.
    text_bytes: Positive
    held_out: bool


class _Manifest(Struct, frozen=True, kw_only=True):
    """What is read of the manifest."""

    vocab_size: Positive
    eot_id: Count
    shards: Annotated[list[_Shard], Meta(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenized shard, ready to be scored."""

    shard_id: str
    #: int32, verified by the hash of the manifest.
    tokens: NDArray[np.int32]
    vocab_size: int
    eot_id: int
    text_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A published frame and the model that it is of."""

    shape: ModelShape
    #: float32, layout order, read-only.
    flat: NDArray[np.float32]


def load_weights(path: Path, preset: str) -> Weights:
    """Read a frame of published weights.

    The preset gives every size but the vocabulary, which follows from the length.
    Raises SettingsError, naming the file, when it is not a frame of that preset.
    """
    frame = _read(path)
    try:
        header, _ = decode_frame(frame)
        shape = _shape(preset, header)
        return Weights(shape=shape, flat=read_weights(frame, shape))
    except (FrameError, BadWeightsError, UnknownPresetError) as error:
        raise SettingsError(f"{path}: {error}") from error


def load_export(folder: Path) -> Export:
    """Open an exported folder, whose files are checked first.

    Raises SettingsError naming what is wrong, or the packages that are missing.
    """
    try:
        from bitnet_ext.exports.folder import open_export
    except ImportError as error:
        raise SettingsError(
            "--model needs the packages safetensors and gguf"
        ) from error
    try:
        return open_export(folder)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _shape(preset: str, header: FrameHeader) -> ModelShape:
    """Return the shape of a preset that a frame is of."""
    if header.kind is not FrameKind.WEIGHTS:
        raise BadWeightsError(f"kind must be {FrameKind.WEIGHTS}, got {header.kind}")
    shape = _fitting(preset, header.num_elements)
    if shape is not None and layout_hash(shape) == header.layout_hash:
        return shape
    others = (_fitting(name, header.num_elements) for name in PRESETS)
    for name, other in zip(PRESETS, others, strict=True):
        if other is not None and layout_hash(other) == header.layout_hash:
            raise BadWeightsError(f"the weights are of preset {name}, not of {preset}")
    raise BadWeightsError(
        f"the weights are of another model than preset {preset}, or any that is known "
        f"here ({', '.join(PRESETS)}): they have {header.num_elements} parameters"
    )


def _fitting(preset: str, num_elements: int) -> ModelShape | None:
    """Return the shape of a preset that has so many parameters, if one has."""
    one = preset_shape(preset, vocab_size=1)
    more, rest = divmod(num_elements - num_params(one), one.hidden_size)
    return None if rest or more < 0 else replace(one, vocab_size=1 + more)


def load_text(corpus: Path, shard_id: str | None) -> Text:
    """Read a shard of a prepared corpus; None means the held-out one.

    `corpus` is the folder that was prepared, or the one within it that has the
    manifest. Raises SettingsError naming what is missing or wrong.
    """
    folder = corpus if (corpus / MANIFEST_NAME).exists() else corpus / TOKENIZED
    manifest = _manifest(folder / MANIFEST_NAME)
    shard = _find(manifest, shard_id, folder)
    path = folder / f"{shard.shard_id}.bin"
    content = _read(path)
    found = hashlib.sha256(content).hexdigest()
    if found != shard.sha256:
        raise SettingsError(f"{path} must have SHA-256 {shard.sha256}, got {found}")
    return Text(
        shard_id=shard.shard_id,
        tokens=np.frombuffer(content, dtype="<i4").astype(np.int32, copy=False),
        vocab_size=manifest.vocab_size,
        eot_id=manifest.eot_id,
        text_bytes=shard.text_bytes,
    )


def score(
    model: BitNetModel, weights: Weights, text: Text, *, batch_size: int
) -> Score:
    """Return the score of the weights on a shard, which must start with a document.

    `model` has the shape of the weights, and holds them afterwards.
    Raises SettingsError when weights and text do not belong together.
    """
    if weights.shape.vocab_size != text.vocab_size:
        raise SettingsError(
            f"the weights have a vocabulary of {weights.shape.vocab_size}, "
            f"the corpus one of {text.vocab_size}"
        )
    quiet = Hooks.quiet(time.monotonic)
    try:
        return evaluate(
            model, weights.flat, text.tokens, text.eot_id, batch_size, quiet
        )
    except ValueError as error:
        raise SettingsError(f"shard {text.shard_id}: {error}") from error


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Return the score as bits for each UTF-8 byte of the text."""
    return nats / math.log(2.0) / text_bytes


def _manifest(path: Path) -> _Manifest:
    try:
        return msgspec.json.decode(_read(path), type=_Manifest)
    except msgspec.DecodeError as error:
        raise SettingsError(f"{path}: {error}") from error


def _find(manifest: _Manifest, shard_id: str | None, folder: Path) -> _Shard:
    for shard in manifest.shards:
        if shard.held_out if shard_id is None else shard.shard_id == shard_id:
            return shard
    raise SettingsError(f"{folder} has no shard {shard_id or 'that is held out'}")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror or error}") from error
