"""The page of an export that people read: README.md, as a model card."""

from __future__ import annotations

import math
from typing import Final

from bitnet_ext.exports.provenance import Format, Provenance, Variant

_FORMS: Final = {
    Variant.MASTER: "float32 as trained; whoever reads them makes them ternary",
    Variant.FLOAT: "-1, 0, 1 as float32, scales apart",
    Variant.PACKED: "-1, 0, 1 in two bits each, scales apart",
    Variant.TQ1_0: "TQ1_0 of -1, 0, 1, scales apart; embeddings fp16",
    Variant.TQ2_0: "TQ2_0 of -1, 0, 1, scales apart; embeddings fp16",
    Variant.F16: "fp16 of -1, 0, 1, scales apart; embeddings fp16",
}
_HOW: Final = {
    Format.HF: (
        "With `transformers` and `accelerate`:\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        "```\n\n"
        "A text was always trained after an end of text: put `tokenizer.bos_token` "
        "before a prompt."
    ),
    Format.GGUF: (
        "With llama.cpp: `llama-cli -m model-{variant}.gguf -p 'a prompt'`. "
        "Microsoft's fork and its type I2_S are another format."
    ),
    Format.SAFETENSORS: (
        "`model.safetensors` holds each parameter under the name that bitnet-fleet "
        "gives it; `provenance.json` has the sizes of the model."
    ),
}


def model_card(about: Provenance) -> str:
    """Return the content of README.md."""
    shape = about.shape()
    head = "---\nlibrary_name: transformers\n---\n" if about.format is Format.HF else ""
    warned = "".join(f"**Warning:** {one}.\n\n" for one in about.warnings())
    rows = [
        ("weight version", f"{about.weight_version} of run {about.run_id}"),
        ("trained on", f"{about.tokens_trained:,} tokens"),
        ("held-out loss", _score(about)),
        ("parameters", f"{about.num_params:,} (`{about.preset}`)"),
        ("context", f"{shape.seq_len} tokens"),
        ("weights", _FORMS[about.variant]),
        ("layout hash", f"`{about.layout_hash}`"),
        ("corpus hash", f"`{about.corpus_hash}`"),
        ("tokenizer hash", f"`{about.tokenizer_hash}`"),
        ("written by", f"bitnet-fleet {about.package_version}"),
    ]
    table = "".join(f"| {name} | {value} |\n" for name, value in rows)
    how = _HOW[about.format].replace("{variant}", about.variant)
    return (
        f"{head}# BitNet b1.58 `{about.preset}`, version {about.weight_version}\n\n"
        "A ternary language model, trained by a fleet of CPUs with bitnet-fleet.\n\n"
        f"{warned}| | |\n|---|---|\n{table}\n{how}\n\n"
        "`sha256sum -c SHA256SUMS` tells whether all files are whole.\n"
    )


def _score(about: Provenance) -> str:
    if about.heldout_loss is None:
        return "not scored"
    return (
        f"{about.heldout_loss:.4f} nats a token "
        f"(perplexity {math.exp(about.heldout_loss):.2f}), "
        f"{about.heldout_bits_per_byte:.4f} bits per byte"
    )
