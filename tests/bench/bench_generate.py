"""`make bench-generate`: tokens a second of a text that grows, next to others.

Ours, llama.cpp on the GGUF that we export, and a dense fp32 model of PyTorch, in turn.
Prints tables and, as its last line, the figures that docs/performance.md explains.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

from bitnet_ext.decode import Decoder
from bitnet_ext.exports.gguf_file import file_name
from bitnet_ext.exports.provenance import Format, Variant
from bitnet_ext.exports.writing import write_export
from bitnet_ext.infer import Model
from bitnet_ext.layout import PRESETS
from coordinator.domain.initial import initial_weights
from coordinator.service.byte_tokenizer import ByteTokenizer
from tests.bench.peers.cached import CachedTransformer
from tests.bench.peers.llama_cpp import LlamaCpp, with_int8_head
from tests.bench.report import Figures, print_machine, print_table
from tests.bench.text import real_text, real_tokens
from tests.bench.timing import Contender, Times, interleave
from tests.exported import Finished
from worker.generate import Sampling, generate

KEYS = (
    "small_vs_llamacpp",
    "medium_vs_llamacpp",
    "small_vs_dense",
    "medium_vs_dense",
)
#: Tokens of a prompt and of what is timed after it: the middle of a window.
PROMPT: Final = 56
TIMED: Final = 16
OURS: Final = "ours"
DENSE: Final = "dense fp32"
LLAMA: Final = ("llama.cpp TQ2_0, head F16", "llama.cpp TQ2_0, head Q8_0")


def main() -> None:
    """Measure both presets on one thread, then on two where there are two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, one thread")
    quick = parser.parse_args().quick
    print_machine(
        "bench-generate", threads="1 thread unless a table says two", quick=quick
    )
    figures = Figures(KEYS)
    tokenizer = ByteTokenizer.learn([real_text()], PRESETS["small"].vocab_size)
    for preset in ("small", "medium"):
        with tempfile.TemporaryDirectory() as folder:
            _measure(figures, preset, Path(folder), tokenizer, quick=quick)
    figures.finish()


def _measure(
    figures: Figures,
    preset: str,
    folder: Path,
    tokenizer: ByteTokenizer,
    *,
    quick: bool,
) -> None:
    shape = PRESETS[preset]
    model = Finished(shape=shape, flat=initial_weights(shape, 0))
    files = _export(folder, model, preset, tokenizer)
    torch.set_num_threads(1)
    times = interleave(_contenders(model, files, 1), rounds=10 if quick else 40)
    _print(preset, times, "1 thread")
    own = times[OURS].best
    llama = min(times[name].best for name in LLAMA)
    figures.put(f"{preset}_vs_llamacpp", llama / own)
    figures.put(f"{preset}_vs_dense", times[DENSE].best / own)
    if not quick and (os.cpu_count() or 1) > 1:
        torch.set_num_threads(2)
        _print(
            preset,
            interleave(_contenders(model, files, 2), rounds=10),
            "2 threads",
        )


def _export(
    folder: Path, model: Finished, preset: str, tokenizer: ByteTokenizer
) -> Mapping[str, Path]:
    """Return the exported GGUF, and one whose head is int8 as ours is."""
    content = tokenizer.to_json()
    about = model.about(
        Format.GGUF,
        Variant.TQ2_0,
        preset=preset,
        tokenizer_hash=hashlib.sha256(content).hexdigest(),
        eot_id=tokenizer.eot_id,
    )
    write_export(folder / "exported", model.flat, about, content)
    exported = folder / "exported" / file_name(Variant.TQ2_0)
    with_int8_head(exported, folder / "int8.gguf")
    return dict(zip(LLAMA, (exported, folder / "int8.gguf"), strict=True))


def _contenders(
    model: Finished, files: Mapping[str, Path], threads: int
) -> dict[str, Contender]:
    """Return what gives the seconds of a token, by name."""
    shape = model.shape
    prompt = real_tokens(shape.vocab_size)[:PROMPT].tolist()
    contenders = {
        OURS: _ours(Model.from_flat(shape, model.flat), prompt, threads),
        DENSE: _dense(CachedTransformer(shape), prompt),
    }
    for name, path in files.items():
        peer = LlamaCpp(path, context=shape.seq_len, threads=threads)
        contenders[name] = lambda peer=peer: peer.seconds_a_token(prompt, TIMED)
    return contenders


def _ours(model: Model, prompt: list[int], threads: int) -> Contender:
    sampling = Sampling(num_tokens=TIMED + 1, temperature=0.0)
    decoder = Decoder(model, threads=threads)

    def run() -> float:
        decoder.clear()
        drawn = generate(decoder, prompt, sampling)
        next(drawn)
        began_s = time.perf_counter()
        count = sum(1 for _ in drawn)
        return (time.perf_counter() - began_s) / count

    return run


def _dense(peer: CachedTransformer, prompt: list[int]) -> Contender:
    def run() -> float:
        peer.length = 0
        token = int(peer.feed(prompt).argmax())
        began_s = time.perf_counter()
        for _ in range(TIMED):
            token = int(peer.feed([token]).argmax())
        return (time.perf_counter() - began_s) / TIMED

    return run


def _print(preset: str, times: Mapping[str, Times], threads: str) -> None:
    rows = [
        [
            name,
            f"{1 / its.best:.0f}",
            f"{1 / its.median:.0f}",
            f"{its.best / times[OURS].best:.2f}",
        ]
        for name, its in times.items()
    ]
    header = ["contender", "tokens/s best", "median", "ours is faster by"]
    print_table(
        f"{preset}: a text of {PROMPT} tokens grows by {TIMED}, {threads}", header, rows
    )


if __name__ == "__main__":
    main()
