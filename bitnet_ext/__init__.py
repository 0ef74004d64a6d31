"""The floor that coordinator and worker share: kernels, layout, frames, contracts.

Map of the package:

- `layout`: ModelShape -> ordered segments of the flat vector, and its hash
- `ternary`: int8 activations x packed ternary weights (the door to the C kernels)
- `operands`: what those products take
- `fused`: what surrounds those products in a training step: norms, gate, AdamW, ...
- `head`: logits, softmax and both gradients of the head in int8
- `attention`: causal attention with its rotary embedding
- `infer`: the forward pass of a finished model, in our numerics and in llama.cpp's
- `decode`: the same for a text that grows token by token, one call of C each
- `scoring`: how well a model predicts a text, and the windows that texts are cut into
- `packing`: ternary values at 2 bits each, or five to a byte
- `codecs`: how a flat vector becomes payload bytes (fp32, block int8 with error
  feedback); finite checks
- `half`: bf16 and fp16 conversion
- `outer`: the coordinator's step from submissions to new weights, in one pass
- `isa`: which variant of the kernels runs
- `memory`: where their results go
- `errors`: what importing the kernels can end with
- `frames`: header + payload + SHA-256, the only binary format on wire and disk
- `exports`: finished models in the files of other software
- `reference`, `reference_attention`, `reference_decode`, `reference_head`: plain NumPy
  twins of the kernels
- `wire`: messages, verdicts and errors that both processes speak

It imports NumPy and the standard library (msgspec in `wire`; in
`exports` also `safetensors` and `gguf`), never torch.
"""

from __future__ import annotations
