"""The master weights in one safetensors file, under the names of the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bitnet_ext.exports.hugging_face import MODEL_NAME, load_tensors
from bitnet_ext.exports.parts import Parts
from bitnet_ext.exports.provenance import (
    PROVENANCE_KEY,
    Provenance,
    encode_provenance,
)
from bitnet_ext.infer import TernaryMatrix


def write_model(folder: Path, parts: Parts, about: Provenance) -> None:
    """Write the file."""
    tensors = {
        name: np.ascontiguousarray(part)
        for name, part in parts.items()
        if not isinstance(part, TernaryMatrix)
    }
    marks = {PROVENANCE_KEY: encode_provenance(about)}
    save_file(tensors, folder / MODEL_NAME, metadata=marks)


def read_model(folder: Path, about: Provenance) -> Parts:
    """Return the parts of a folder that `write_model` wrote. Raises ExportError."""
    return dict(load_tensors(folder / MODEL_NAME))
