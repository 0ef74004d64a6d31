"""One weight version into an exported folder: which one, and what is said of it.

Everything is only read, so it works beside a running coordinator as without one.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from bitnet_ext.codecs import decode
from bitnet_ext.exports.provenance import ExportError, Format, Provenance, Variant
from bitnet_ext.exports.writing import Report, write_export
from bitnet_ext.frames import FrameKind, check_header, decode_frame
from bitnet_ext.layout import num_params, shape_from_json
from bitnet_ext.wire.verdicts import ErrorCode
from coordinator.domain.errors import RefusedError
from coordinator.domain.manifest import MANIFEST_NAME, TOKENIZER_NAME, load_manifest
from coordinator.service.corpus import tokenized_folder
from coordinator.service.evaluating import bits_per_byte
from coordinator.store import runs, versions
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.rows import EvaluationRow, RunRow, VersionRow


class Pick(StrEnum):
    """Versions of the newest run that need no number."""

    LATEST = "latest"  #: the newest
    BEST = "best"  #: the one with the lowest held-out loss


def parse_version(given: str) -> int | Pick:
    """Return a number, or what stands for one. Raises RefusedError `bad_request`."""
    if given in list(Pick):
        return Pick(given)
    if given.isascii() and given.isdecimal() and len(given) <= 18:
        return int(given)
    raise RefusedError(
        ErrorCode.BAD_REQUEST,
        f"version must be a number, latest or best, got {given[:80]!r}",
        field="version",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A version that still has its frame, and all that is known of it."""

    run: RunRow
    version: VersionRow
    #: None where it was not scored.
    score: EvaluationRow | None


def choose(connection: Connection, wish: int | Pick) -> Chosen:
    """Return the version that is wished for.

    Raises RefusedError: no_run, or unknown_version where there is none or its frame is
    no longer kept.
    """
    run = runs.newest_run(connection)
    if run is None:
        raise RefusedError(ErrorCode.NO_RUN, "there is no run yet")
    version = versions.find_version(connection, _number(connection, run, wish))
    if version is None or version.pruned:
        kept = [row.version for row in versions.kept_versions(connection)]
        raise _unknown(f"one that is kept ({', '.join(map(str, kept))})", wish)
    run = runs.find_run(connection, version.run_id)
    score = versions.score_of(connection, version.version)
    return Chosen(run=run, version=version, score=score)


def _number(connection: Connection, run: RunRow, wish: int | Pick) -> int:
    if wish is Pick.LATEST:
        return versions.newest_version(connection, run.run_id).version
    if wish is Pick.BEST:
        best = versions.best_version(connection, run.run_id)
        if best is None:
            raise _unknown("latest or a number while none was scored", wish)
        return best
    return wish


def _unknown(due: str, wish: int | Pick) -> RefusedError:
    return RefusedError(
        ErrorCode.UNKNOWN_VERSION, f"version must be {due}, got {wish}", field="version"
    )


def export_version(
    data: Path,
    corpus: Path,
    chosen: Chosen,
    variant: tuple[Format, Variant],
    target: Path,
) -> tuple[Provenance, Report]:
    """Write a version of the data folder to the new folder `target`. Blocking.

    Raises ExportError, ManifestError or OSError naming what is missing, damaged or in
    the way, UnwritableError where the disk fails; `target` is not made then.
    """
    flat = read_weights(data, chosen)
    tokenizer, eot_id = read_tokenizer(corpus, chosen.run)
    about = _provenance(chosen, variant, eot_id)
    return about, write_export(target, flat, about, tokenizer)


def read_weights(data: Path, chosen: Chosen) -> NDArray[np.float32]:
    """Return the published weights of a version, float32 in the order of the layout.

    Raises ExportError when they are not whole, OSError when they are gone.
    """
    path = data / BlobKind.PUBLISHED / version_blob(chosen.version.version)
    frame = path.read_bytes()
    if hashlib.sha256(frame).hexdigest() != chosen.version.published_sha256:
        raise ExportError(f"{path} is damaged: restore it from a backup")
    shape = shape_from_json(json.loads(chosen.run.model_json))
    header, payload = decode_frame(frame)
    check_header(
        header,
        kind=FrameKind.WEIGHTS,
        layout_hash=bytes.fromhex(chosen.run.layout_hash),
        num_elements=num_params(shape),
    )
    return decode(header.codec, payload, header.num_elements)


def read_tokenizer(corpus: Path, run: RunRow) -> tuple[bytes, int]:
    """Return the content of a run's `tokenizer.json`, and its end of text.

    Raises ExportError for that of another run, OSError where there is none.
    """
    folder = tokenized_folder(corpus)
    content = (folder / TOKENIZER_NAME).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != run.tokenizer_hash:
        raise ExportError(
            f"{folder / TOKENIZER_NAME} must be the tokenizer of run {run.run_id}, "
            f"with SHA-256 {run.tokenizer_hash}, got {found}: name its corpus with "
            f"--corpus"
        )
    return content, load_manifest(folder / MANIFEST_NAME).eot_id


def _provenance(
    chosen: Chosen, variant: tuple[Format, Variant], eot_id: int
) -> Provenance:
    run, score = chosen.run, chosen.score
    model = json.loads(run.model_json)
    return Provenance(
        format=variant[0],
        variant=variant[1],
        model=model,
        preset=run.preset,
        run_id=run.run_id,
        weight_version=chosen.version.version,
        layout_hash=run.layout_hash,
        frame_hash=chosen.version.published_sha256,
        corpus_hash=run.corpus_hash,
        tokenizer_hash=run.tokenizer_hash,
        eot_id=eot_id,
        tokens_trained=chosen.version.tokens_total,
        heldout_loss=None if score is None else score.nats / score.tokens,
        heldout_bits_per_byte=None if score is None else bits_per_byte(score),
        num_params=num_params(shape_from_json(model)),
        package_version=package_version("bitnet-fleet"),
    )
