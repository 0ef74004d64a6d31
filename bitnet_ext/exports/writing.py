"""A flat vector into an exported folder: all of it or nothing, and never unchecked.

The folder is written beside its target under a name that starts with a dot, read back,
compared, synced, and only then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec
import numpy as np
from safetensors import SafetensorError

from bitnet_ext.exports import gguf_file, hugging_face, plain
from bitnet_ext.exports.card import model_card
from bitnet_ext.exports.folder import (
    TOKENIZER_NAME,
    Export,
    open_export,
    write_sums,
)
from bitnet_ext.exports.parts import (
    Floats,
    Parts,
    difference,
    master_parts,
    ternary_parts,
)
from bitnet_ext.exports.provenance import (
    PROVENANCE_NAME,
    ExportError,
    Format,
    Provenance,
    UnwritableError,
    Variant,
    encode_provenance,
)
from bitnet_ext.infer import Model

CARD_NAME: Final = "README.md"
#: Tokens of the probe on which an export has to answer like the model, at most.
PROBE_TOKENS: Final = 64
#: How far the answers may be apart, as a share of how far logits are from zero, both as
#: root of the mean square. Embeddings in fp16, or a scale stored as its inverse, make
#: single activations round the other way, most in a deep model that is hardly trained.
#: That all numbers are in their places is known by then.
TOLERANCE: Final = {Format.HF: 0.05, Format.GGUF: 0.25, Format.SAFETENSORS: 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found when an export was read back."""

    num_bytes: int
    #: Root mean square of the model's logits on the probe, and of their difference.
    logits: float
    difference: float


def write_export(
    target: Path, flat: Floats, about: Provenance, tokenizer: bytes
) -> Report:
    """Write a model, float32 in the order of the layout, to the new folder `target`.

    Raises ExportError where something is there already, where the format can't hold
    the model, or where what is read back is not the model; UnwritableError where it
    can't be written. Nothing is left behind then.
    """
    with _appearing(target, flat.nbytes) as folder:
        due = _write(folder, flat, about, tokenizer)
        report = check_export(folder, due, Model.from_flat(about.shape(), flat))
    return report


@contextlib.contextmanager
def _appearing(target: Path, num_bytes: int) -> Iterator[Path]:
    """Give a folder to fill, which gets the name `target` once the block has ended.

    Raises UnwritableError for what the system or a library says of a failed write.
    """
    fresh = target.with_name(f".{target.name}-{uuid4().hex[:8]}")
    try:
        if target.exists() or target.is_symlink():
            raise ExportError(f"{target} is there already: name a folder that is not")
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            _sync(path)
        fresh.rename(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritable(target, error, _free(fresh) < num_bytes) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unwritable(
    target: Path, error: OSError | SafetensorError, low: bool
) -> UnwritableError:
    """Return what to say; the libraries lose the number of the error."""
    number = getattr(error, "errno", None)
    full = low if number is None else number in (errno.ENOSPC, errno.EDQUOT)
    said = getattr(error, "strerror", None) or error
    what = f"there is no room for {target}" if full else f"{target} can't be written"
    return UnwritableError(f"{what}: {said}", full=full)


def _free(fresh: Path) -> int:
    """Return the bytes left on the disk of a folder that may never have been made."""
    there = next(path for path in (fresh, *fresh.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(folder: Path, flat: Floats, about: Provenance, tokenizer: bytes) -> Parts:
    """Write all files; return what the model file has to hold."""
    shape = about.shape()
    is_master = about.variant is Variant.MASTER
    parts = (master_parts if is_master else ternary_parts)(shape, flat)
    match about.format:
        case Format.HF:
            hugging_face.write_model(folder, parts, about)
        case Format.GGUF:
            gguf_file.write_model(folder, parts, about, tokenizer)
            parts = gguf_file.stored_parts(parts)
        case Format.SAFETENSORS:
            plain.write_model(folder, parts, about)
    (folder / TOKENIZER_NAME).write_bytes(tokenizer)
    (folder / CARD_NAME).write_text(model_card(about))
    readable = msgspec.json.format(encode_provenance(about)) + "\n"
    (folder / PROVENANCE_NAME).write_text(readable)
    write_sums(folder)
    return parts


def check_export(folder: Path, due: Parts, model: Model) -> Report:
    """Read a folder back, and compare it with what it has to hold.

    Raises ExportError where a part is not the one that is due, or where the logits on
    the probe are not those of the model.
    """
    export = open_export(folder)
    wrong = difference(due, export.parts)
    if wrong is not None:
        raise ExportError(f"read back, {wrong} is not what was written")
    probe = _probe(export)
    expected = model.logits(probe)
    found = Model.from_parts(export.shape, export.parts).logits(probe)
    report = Report(
        num_bytes=sum(path.stat().st_size for path in folder.iterdir()),
        logits=_size(expected),
        difference=_size(found - expected),
    )
    if not report.difference <= TOLERANCE[export.about.format] * report.logits:
        raise ExportError(
            f"read back, the model answers differently: logits of {report.logits:.3g} "
            f"differ by {report.difference:.3g} (root mean square)"
        )
    return report


def _probe(export: Export) -> list[int]:
    """Return a text of every kind of token: the start of one, then ids at random."""
    length = min(PROBE_TOKENS, export.shape.seq_len)
    chance = np.random.default_rng(0)
    ids = chance.integers(export.shape.vocab_size, size=length)
    return [export.about.eot_id, *ids.tolist()[1:]]


def _size(x: Floats) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))
