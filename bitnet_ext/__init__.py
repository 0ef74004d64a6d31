"""The floor that coordinator and worker share: kernels, layout, frames, contracts.

Map of the package:

- `layout`: ModelShape -> ordered segments of the flat vector, and its hash
- `ternary`: int8 activations x packed ternary weights (the door to the C kernels)
- `operands`: what those products take
- `fused`: what surrounds those products in a training step: norms, gate, AdamW, ...
- `packing`: ternary values at 2 bits each, or five to a byte
- `codecs`: how a flat vector becomes payload bytes (fp32, block int8 with error
  feedback); finite checks
- `half`: bf16 and fp16 conversion
- `outer`: the coordinator's step from submissions to new weights, in one pass
- `isa`: which variant of the kernels runs
- `memory`: where their results go
- `frames`: header + payload + SHA-256, the only binary format on wire and disk
- `reference`: the plain NumPy twin of every kernel
- `wire`: messages, verdicts and errors that both processes speak

It imports NumPy and the standard library (msgspec in `wire`), never torch.
"""

from __future__ import annotations

from bitnet_ext import isa as isa
