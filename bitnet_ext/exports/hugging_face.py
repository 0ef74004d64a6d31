"""A folder that Hugging Face `transformers` loads as `BitNetForCausalLM`.

| variant | linear weights | `transformers` |
|---|---|---|
| `master` | float32 as trained | quantises them anew in each step |
| `float` | -1, 0, 1 as float32, `weight_scale` the value of +1 | multiplies by it |
| `packed` | four rows to a byte, `weight_scale` its inverse | divides by it |

A byte of `packed` holds rows r, r + N/4, r + N/2 and r + 3N/4 of a weight (N, K), the
first in the lowest two bits, as value plus one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

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

MODEL_NAME: Final = "model.safetensors"
#: The text of the token `eot_id` in every tokenizer of a prepared corpus.
END_OF_TEXT: Final = "<|endoftext|>"

_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "down": "mlp.down_proj",
}
_NAMES: Final = {"embeddings": "model.embed_tokens", "final_norm": "model.norm"}
#: Without one, `transformers` would run the weights as plain floats.
_QUANTISATION: Final = {
    Variant.MASTER: ("autobitlinear", "online"),
    Variant.FLOAT: ("autobitlinear", "offline"),
    Variant.PACKED: ("bitlinear", "offline"),
}
_SHIFTS: Final = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None, None]


def write_model(folder: Path, parts: Parts, about: Provenance) -> None:
    """Write weights, configuration and what the tokenizer needs besides its file.

    Raises ExportError for a model that the variant can't hold.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for segment in segments(about.shape()):
        tensors |= _written(segment, parts[segment.name], about.variant)
    # Older `transformers` read no file that does not name its framework so. Nothing
    # more: the library writes several entries in an order of chance.
    save_file(tensors, folder / MODEL_NAME, metadata={"format": "pt"})
    for name, content in _side_files(about).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_model(folder: Path, about: Provenance) -> Parts:
    """Return the parts of a folder that `write_model` wrote. Raises ExportError."""
    tensors = load_tensors(folder / MODEL_NAME)
    try:
        return {
            segment.name: _read(segment, tensors, about.variant)
            for segment in segments(about.shape())
        }
    except KeyError as error:
        raise ExportError(f"{MODEL_NAME} has no tensor {error}") from error


def load_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a safetensors file. Raises ExportError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path.name}: {error}") from error


def tensor_name(segment: Segment) -> str:
    """Return the name of a segment's tensor, without `.weight`."""
    if segment.name in _NAMES:
        return _NAMES[segment.name]
    _, layer, field = segment.name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[field]}"


def _written(
    segment: Segment, part: NDArray[np.float32] | TernaryMatrix, variant: Variant
) -> dict[str, NDArray[Any]]:
    name = tensor_name(segment)
    if not isinstance(part, TernaryMatrix):
        return {f"{name}.weight": np.ascontiguousarray(part)}
    scale = np.array([part.scale], dtype=np.float32)
    if variant is Variant.PACKED:
        return {
            f"{name}.weight": _pack(segment.name, part.values),
            f"{name}.weight_scale": 1 / scale,
        }
    return {
        f"{name}.weight": part.values.astype(np.float32),
        f"{name}.weight_scale": scale,
    }


def _read(
    segment: Segment, tensors: dict[str, NDArray[Any]], variant: Variant
) -> NDArray[np.float32] | TernaryMatrix:
    name = tensor_name(segment)
    weight = tensors[f"{name}.weight"]
    if variant is Variant.MASTER or not segment.is_linear:
        return weight
    (scale,) = tensors[f"{name}.weight_scale"]
    if variant is Variant.PACKED:
        values = ((weight[None] >> _SHIFTS) & 3).reshape(-1, weight.shape[1])
        return TernaryMatrix(values.astype(np.int8) - np.int8(1), float(1 / scale))
    return TernaryMatrix(weight.astype(np.int8), float(scale))


def _pack(name: str, values_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    num_rows, num_columns = values_NK.shape
    if num_rows % 4:
        raise ExportError(
            f"the packed layout needs weights with a multiple of 4 rows, "
            f"{name} has {num_rows}: use another layout"
        )
    codes = (values_NK + 1).astype(np.uint8).reshape(4, num_rows // 4, num_columns)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(codes << _SHIFTS, axis=0)
    return packed


def _side_files(about: Provenance) -> dict[str, dict[str, Any]]:
    ends = {"bos_token_id": about.eot_id, "eos_token_id": about.eot_id}
    return {
        "config.json": _config(about.shape(), about.variant)
        | ends
        | {PROVENANCE_KEY: json.loads(encode_provenance(about))},
        "generation_config.json": ends,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "model_max_length": about.shape().seq_len,
            "clean_up_tokenization_spaces": False,
        },
    }


def _config(shape: ModelShape, variant: Variant) -> dict[str, Any]:
    linear_class, mode = _QUANTISATION[variant]
    return {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "dtype": "float32",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": shape.hidden_act,
        "max_position_embeddings": shape.seq_len,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": linear_class,
            "quantization_mode": mode,
            "modules_to_not_convert": ["lm_head"],
        },
    }
