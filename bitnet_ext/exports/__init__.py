"""Finished models in files that other software reads, and reading them back.

Map of the package:

- `provenance`: what a file says of where its model comes from
- `hugging_face`: folders for `transformers`, in three layouts
- `gguf_file`: files for llama.cpp, in three types
- `plain`: the master weights under our own names
- `card`: the page that people read
- `folder`: an exported folder, opened: nothing is believed before it was hashed
- `writing`: a flat vector into such a folder, whole or not at all, and checked

It needs the packages `safetensors` and `gguf` (the extra `export`), never torch.
"""

from __future__ import annotations
