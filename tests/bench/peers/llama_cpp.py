"""llama.cpp as it is shipped in the package `xllamacpp`, on a file that we exported.

Its own clock counts: from the first token on, without what its server does around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize

_HEAD = "token_embd.weight"


class LlamaCpp:
    """A server within this process that has loaded one file."""

    def __init__(self, path: Path, *, context: int, threads: int) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        # The faster here; what it chooses by itself was no faster.
        params.flash_attn_type = (
            xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        )
        params.warmup = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)

    def seconds_a_token(self, prompt: Sequence[int], num_tokens: int) -> float:
        """Return the mean time of the likeliest tokens after the first."""
        asked: dict[str, Any] = {
            "prompt": list(prompt),
            "temperature": 0,
            "n_predict": num_tokens + 1,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        timings = self._server.handle_completions(asked)["timings"]
        if timings["predicted_n"] != num_tokens + 1:
            raise ValueError(f"llama.cpp stopped early: {timings}")
        return float(timings["predicted_ms"]) / num_tokens / 1000


def with_int8_head(source: Path, target: Path) -> None:
    """Write a file again with its embeddings, which are also the head, as Q8_0."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "bitnet")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind, *inner = field.types
        is_list = kind is GGUFValueType.ARRAY
        writer.add_key_value(
            field.name, field.contents(), kind, inner[-1] if is_list else None
        )
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name == _HEAD:
            kind = GGMLQuantizationType.Q8_0
            data = quantize(data.astype(np.float32), kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
