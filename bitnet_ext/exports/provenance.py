"""What an export says of where it comes from: inside the model, and beside it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from bitnet_ext.layout import ModelShape, layout_hash, shape_from_json
from bitnet_ext.wire.messages import Count, Positive, Sha256

#: File of an exported folder, and the key under which the model itself holds the same:
#: in the head of a GGUF or safetensors file, or in `config.json`.
PROVENANCE_NAME: Final = "provenance.json"
PROVENANCE_KEY: Final = "bitnet_fleet.provenance"


class ExportError(ValueError):
    """An export can't be made, or is not what it should be; names the file."""


class UnwritableError(ExportError):
    """A folder can't be written; `full` where that is for want of room."""

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class Format(StrEnum):
    """Who is to read an export."""

    HF = "hf"  #: Hugging Face `transformers`
    GGUF = "gguf"  #: llama.cpp, and what is built on it
    SAFETENSORS = "safetensors"  #: whoever wants the master weights, by our names


class Variant(StrEnum):
    """How the weights are written; which ones a format has is in `VARIANTS`."""

    MASTER = "master"  #: float32, as trained; the reader quantises
    FLOAT = "float"  #: -1, 0, 1 as float32, scales apart
    PACKED = "packed"  #: four values to a byte, scales apart
    TQ1_0 = "TQ1_0"  #: 1.69 bits a weight
    TQ2_0 = "TQ2_0"  #: 2.06 bits a weight, faster
    F16 = "F16"  #: -1, 0, 1 as fp16; activations are not rounded to int8


#: The variants of each format; the first is the default.
VARIANTS: Final = {
    Format.HF: (Variant.PACKED, Variant.FLOAT, Variant.MASTER),
    Format.GGUF: (Variant.TQ2_0, Variant.TQ1_0, Variant.F16),
    Format.SAFETENSORS: (Variant.MASTER,),
}


class Provenance(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model this is, and how it was written."""

    format: Format
    variant: Variant
    #: Every size of the model, as `shape_to_json` writes it.
    model: dict[str, Any]
    preset: str
    run_id: str
    weight_version: Count
    #: SHA-256 of order and sizes of the parameters.
    layout_hash: Sha256
    #: SHA-256 of the published frame that was exported.
    frame_hash: Sha256
    corpus_hash: Sha256
    #: SHA-256 of `tokenizer.json`.
    tokenizer_hash: Sha256
    #: The token that starts, and so ends, each text.
    eot_id: Count
    tokens_trained: Count
    #: Nats a token of the held-out text; None where it was not scored.
    heldout_loss: Annotated[float, Meta(ge=0.0)] | None
    heldout_bits_per_byte: Annotated[float, Meta(ge=0.0)] | None
    num_params: Positive
    package_version: str

    def shape(self) -> ModelShape:
        """Return the shape of the model. Raises ExportError for one that is none."""
        try:
            shape = shape_from_json(self.model)
        except ValueError as error:
            raise ExportError(f"{PROVENANCE_NAME}: {error}") from error
        due = layout_hash(shape).hex()
        if self.layout_hash != due:
            raise ExportError(
                f"{PROVENANCE_NAME}: layout_hash must be {due}, got {self.layout_hash}"
            )
        return shape

    def warnings(self) -> list[str]:
        """Return what a user of the export has to know before the first use."""
        found = []
        if self.format is Format.GGUF and self.model["hidden_act"] == "relu2":
            found.append(
                "released llama.cpp builds ignore the activation relu2 and compute "
                "silu instead: this model gives wrong text there"
            )
        return found


def encode_provenance(about: Provenance) -> str:
    """Return the JSON that files hold."""
    return msgspec.json.encode(about).decode()


def decode_provenance(content: bytes) -> Provenance:
    """Return what `encode_provenance` wrote. Raises ExportError naming the field."""
    try:
        return msgspec.json.decode(content, type=Provenance)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportError(f"{PROVENANCE_NAME}: {error}") from error
