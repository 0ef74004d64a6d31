"""A GGUF file that llama.cpp loads as architecture `bitnet`, tokenizer inside.

Linear weights are written as -1, 0, 1 in the type that was asked for, and their value
of +1 apart, as float32 `.scale`: so a scale is rounded nowhere. Embeddings are fp16,
norms float32. There is no output tensor: llama.cpp takes the embeddings.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import (
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    dequantize,
    quantize,
)
from numpy.typing import NDArray

from bitnet_ext.exports.parts import Parts
from bitnet_ext.exports.provenance import (
    PROVENANCE_KEY,
    ExportError,
    Provenance,
    Variant,
    encode_provenance,
)
from bitnet_ext.infer import TernaryMatrix
from bitnet_ext.layout import ModelShape, Segment, segments

#: Columns of a block of TQ1_0 and TQ2_0.
BLOCK: Final = 256

_NAMES: Final = {"embeddings": "token_embd", "final_norm": "output_norm"}
_LAYER_NAMES: Final = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "attn_sub_norm": "attn_sub_norm",
    "o": "attn_output",
    "ffn_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "ffn_sub_norm": "ffn_sub_norm",
    "down": "ffn_down",
}
_TYPES: Final = {
    Variant.TQ1_0: (GGMLQuantizationType.TQ1_0, LlamaFileType.MOSTLY_TQ1_0),
    Variant.TQ2_0: (GGMLQuantizationType.TQ2_0, LlamaFileType.MOSTLY_TQ2_0),
    Variant.F16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}


def file_name(variant: Variant) -> str:
    """Return the name of the model file."""
    return f"model-{variant}.gguf"


def write_model(
    folder: Path, parts: Parts, about: Provenance, tokenizer: bytes
) -> None:
    """Write the file. Raises ExportError for a model that the type can't hold."""
    shape = about.shape()
    kind, _ = _TYPES[about.variant]
    _check_widths(shape, about.variant)
    with closing(GGUFWriter(folder / file_name(about.variant), "bitnet")) as writer:
        _describe(writer, about)
        _add_tokenizer(writer, tokenizer, about)
        for segment in segments(shape):
            _add_part(writer, segment, parts[segment.name], kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def read_model(folder: Path, about: Provenance) -> Parts:
    """Return the parts of a file that `write_model` wrote. Raises ExportError."""
    name = file_name(about.variant)
    try:
        reader = GGUFReader(folder / name)
        tensors = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type)
            for tensor in reader.tensors
        }
        return {
            segment.name: _read(segment, tensors) for segment in segments(about.shape())
        }
    except KeyError as error:
        raise ExportError(f"{name} has no tensor {error}") from error
    except (ValueError, IndexError, OSError) as error:
        raise ExportError(f"{name}: {error}") from error


def stored_parts(parts: Parts) -> Parts:
    """Return the parts as a file holds them: with embeddings rounded to fp16."""
    embeddings = parts["embeddings"]
    if isinstance(embeddings, TernaryMatrix):
        raise ExportError("embeddings must be float32, got a ternary matrix")
    return parts | {"embeddings": embeddings.astype(np.float16).astype(np.float32)}


def _check_widths(shape: ModelShape, variant: Variant) -> None:
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(shape, name)
        if variant is not Variant.F16 and width % BLOCK:
            raise ExportError(
                f"{variant} needs a {name} that is a multiple of {BLOCK}, got {width}: "
                f"use F16"
            )


def _describe(writer: GGUFWriter, about: Provenance) -> None:
    shape = about.shape()
    writer.add_name(f"bitnet-fleet {about.preset} v{about.weight_version}")
    writer.add_version(str(about.weight_version))
    writer.add_string(PROVENANCE_KEY, encode_provenance(about))
    writer.add_file_type(_TYPES[about.variant][1])
    writer.add_context_length(shape.seq_len)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab_size)
    if shape.hidden_act != "silu":  # absent, llama.cpp takes silu
        writer.add_string("bitnet.hidden_activation", shape.hidden_act)


def _add_tokenizer(writer: GGUFWriter, content: bytes, about: Provenance) -> None:
    """Add the byte-level BPE of a prepared corpus, as llama.cpp's `gpt2`."""
    vocabulary, merges = _byte_pairs(content, about)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    types = [TokenType.NORMAL] * len(tokens)
    types[about.eot_id] = TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(about.eot_id)
    writer.add_eos_token_id(about.eot_id)
    writer.add_add_bos_token(True)  # each text was trained after an end of text


def _byte_pairs(content: bytes, about: Provenance) -> tuple[dict[str, int], list[str]]:
    """Return the id of each token, and the merges in order."""
    try:
        model = json.loads(content)["model"]
        vocabulary: dict[str, int] = model["vocab"]
        merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in model["merges"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"tokenizer.json is no byte-level BPE: {error!r}") from error
    due = about.shape().vocab_size
    if sorted(vocabulary.values()) != list(range(due)):
        raise ExportError(
            f"tokenizer.json must have the ids 0 to {due - 1}, got {len(vocabulary)}"
        )
    return vocabulary, merges


def _add_part(
    writer: GGUFWriter,
    segment: Segment,
    part: NDArray[np.float32] | TernaryMatrix,
    kind: GGMLQuantizationType,
) -> None:
    name = tensor_name(segment)
    if isinstance(part, TernaryMatrix):
        scale = np.array([part.scale], dtype=np.float32)
        writer.add_tensor(f"{name}.scale", scale)
        values: Any = quantize(part.values.astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    elif part.ndim == 2:
        writer.add_tensor(f"{name}.weight", part.astype(np.float16))
    else:
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(part))


def tensor_name(segment: Segment) -> str:
    """Return the name of a segment's tensor, without `.weight`."""
    if segment.name in _NAMES:
        return _NAMES[segment.name]
    _, layer, field = segment.name.split(".")
    return f"blk.{layer}.{_LAYER_NAMES[field]}"


def _read(
    segment: Segment, tensors: dict[str, Any]
) -> NDArray[np.float32] | TernaryMatrix:
    name = tensor_name(segment)
    weight: NDArray[np.float32] = np.asarray(tensors[f"{name}.weight"], np.float32)
    if not segment.is_linear:
        return weight
    (scale,) = tensors[f"{name}.scale"]
    return TernaryMatrix(np.rint(weight).astype(np.int8), float(scale))
