"""Loss curves of `small` on real text: ours next to plain fp32 fake-quantisation.

All contenders start from the same weights and see the same batches. What may part
them is looked at one by one. `plain again` starts a millionth away from plain, so what
parts those two is chance. `ours, by torch` is the worker without our kernels: its
model, data and optimizer must be plain's. `plain, int8 dx` and `plain, int8 dW` are
plain but for one rounding of gradients that ours makes too; `ours, precise` is ours
without the latter, and with a head in fp32. In the end the weights of all are scored
alike, in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bitnet_ext.layout import ModelShape, preset_shape
from coordinator.demo.text import prepare
from coordinator.domain.initial import initial_weights
from coordinator.service.corpus import tokenized_folder
from tests.bench.ours import HYPER
from tests.bench.peers.plain import BitLinear, Transformer, adamw
from tests.bench.peers.recipes import load
from tests.bench.plot import write_plot
from tests.bench.report import Figures, print_machine, print_table
from tests.bench.rounding import Int8Dw, Int8Dx
from tests.bench.text import batches
from worker.model import transformer
from worker.model.transformer import BitNetModel
from worker.train import Batch, LocalSteps, Moments

PRESET: Final = "small"
SEQUENCES: Final = 8
#: Steps whose mean is one point of a curve.
POINT: Final = 30
#: Steps at the end whose mean is the final loss.
LAST: Final = 50
#: Steps at which one can still see where curves part.
EARLY: Final = (1, 2, 3, 5, 10, 20, 40, 80)
PLAIN: Final = "plain"
OURS: Final = "ours"
AGAIN: Final = "plain again"
KEYS: Final = (
    "train_difference",
    "train_difference_worst",
    "heldout_difference",
    "chance_difference",
)


@dataclass(frozen=True, slots=True)
class Text:
    """The docstrings that the demo trains on, as ids of its tokenizer."""

    vocab_size: int
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Curve:
    """What became of one contender; losses in nats a token."""

    losses: list[float]
    held_out: float

    @property
    def last(self) -> float:
        """The mean over the last steps."""
        return statistics.mean(self.losses[-LAST:])


#: Makes one step on (B, T) inputs and targets; returns the loss before.
Step = Callable[[Tensor, Tensor], float]
#: Takes the first weights and the rate; returns a step, and the weights as they are.
Contender = Callable[[ModelShape, Tensor, float], tuple[Step, Callable[[], Tensor]]]


def peer(linear: type[BitLinear], *, shift: float = 0.0) -> Contender:
    """Return the plain peer with those linear layers, its start shifted a little."""

    def make(
        shape: ModelShape, start: Tensor, rate: float
    ) -> tuple[Step, Callable[[], Tensor]]:
        model = Transformer(shape, linear=linear)
        chance = torch.Generator().manual_seed(0)
        noise = torch.randn(start.shape, generator=chance)
        load(model, start * (1.0 + shift * noise))
        optimizer = adamw(model, fused=True)
        for group in optimizer.param_groups:
            group["lr"] = rate

        def step(ids: Tensor, targets: Tensor) -> float:
            loss = model.loss(ids, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), HYPER.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        def weights() -> Tensor:
            return nn.utils.parameters_to_vector(model.parameters()).detach()

        return step, weights

    return make


def own(*, precise: bool = False, by_torch: bool = False) -> Contender:
    """Return the steps of the worker; precise takes weights and head in fp32."""

    def make(
        shape: ModelShape, start: Tensor, rate: float
    ) -> tuple[Step, Callable[[], Tensor]]:
        model = BitNetModel(shape, precise=precise)
        model.plain = by_torch
        model.flat.load(start.numpy())
        steps = LocalSteps(model, Moments.zeros(shape), HYPER)

        def step(ids: Tensor, targets: Tensor) -> float:
            batch = Batch(ids, targets, ids.numel())
            if not precise:
                return steps.step(batch, rate)
            head = mock.patch.object(
                transformer, "head_dtype", return_value=torch.float32
            )
            with head:
                return steps.step(batch, rate)

        return step, lambda: model.flat.values

    return make


CONTENDERS: Final[Mapping[str, Contender]] = {
    PLAIN: peer(BitLinear),
    OURS: own(),
    AGAIN: peer(BitLinear, shift=1e-6),
    "ours, by torch": own(by_torch=True),
    "ours, precise": own(precise=True),
    "plain, int8 dx": peer(Int8Dx),
    "plain, int8 dW": peer(Int8Dw),
}


def demo_text() -> Text:
    """Prepare the text of the demo with the coordinator's code, and read it."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        manifest = prepare(corpus, None)
        tokens = {False: [], True: []}
        for shard in manifest.shards:
            path = tokenized_folder(corpus) / f"{shard.shard_id}.bin"
            tokens[shard.held_out].append(np.fromfile(path, dtype="<i4"))
        train, held_out = (
            np.concatenate(tokens[which]).astype(np.int64) for which in (False, True)
        )
    return Text(manifest.vocab_size, train, held_out)


def run(
    contender: Contender,
    shape: ModelShape,
    text: Text,
    *,
    seed: int,
    num_steps: int,
    rate: float,
) -> Curve:
    """Train one contender; the seed decides on first weights and on batches."""
    start = torch.from_numpy(initial_weights(shape, seed))
    step, weights = contender(shape, start, rate)
    seen = islice(batches(text.train, SEQUENCES, shape.seq_len, seed), num_steps)
    losses = [step(ids, targets) for ids, targets in seen]
    return Curve(losses, held_out_loss(shape, text, weights()))


@torch.no_grad()
def held_out_loss(shape: ModelShape, text: Text, weights: Tensor) -> float:
    """Return the loss of the plain peer with those weights on the held-out text."""
    model = Transformer(shape)
    load(model, weights)
    return statistics.mean(
        model.loss(ids, targets).item() for ids, targets in _windows(shape, text)
    )


def _windows(shape: ModelShape, text: Text) -> Iterator[tuple[Tensor, Tensor]]:
    return islice(batches(text.held_out, SEQUENCES, shape.seq_len, seed=1), 16)


def main() -> None:
    """Train all contenders with each seed, one after the other, and compare."""
    options = _options()
    torch.set_num_threads(1)
    print_machine("bench-curves", threads="1 thread", quick=options.quick)
    text = demo_text()
    shape = preset_shape(PRESET, vocab_size=text.vocab_size)
    print(f"{len(text.train)} tokens, vocabulary {text.vocab_size}")
    names = (PLAIN, OURS) if options.quick else tuple(CONTENDERS)
    found: dict[str, list[Curve]] = {name: [] for name in names}
    for seed in range(options.seeds):
        for name in names:
            curve = run(
                CONTENDERS[name],
                shape,
                text,
                seed=seed,
                num_steps=options.steps,
                rate=options.rate,
            )
            found[name].append(curve)
            said = f"last {LAST} {curve.last:.4f}, held out {curve.held_out:.4f}"
            print(f"seed {seed}, {name}: {said}", flush=True)
    _report(found)
    if options.plot is not None:
        title = f"Loss of {PRESET}, means of {POINT} steps and {options.seeds} seeds"
        write_plot(options.plot, title, {name: _points(found[name]) for name in names})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--plot", type=Path, help="an SVG to write")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 1, 60
    return options


def _report(found: Mapping[str, list[Curve]]) -> None:
    plain = found[PLAIN]
    steps = [f"{x:.0f}" for x, _ in _points(plain)]
    rows = [[n, *(f"{y:.3f}" for _, y in _points(c))] for n, c in found.items()]
    print_table(f"loss, means of {POINT} steps up to", ["", *steps], rows)
    steps = [str(step) for step in EARLY if step <= len(plain[0].losses)]
    rows = [
        [name, *(f"{parting(curves, plain, int(step)):.1e}" for step in steps)]
        for name, curves in found.items()
        if name != PLAIN
    ]
    print_table("how they part: |loss - plain| at step", ["", *steps], rows)
    rows = []
    for name, curves in found.items():
        train, held_out = differences(curves, plain)
        each = ", ".join(f"{100 * one:+.2f}" for one in train)
        mean, other = statistics.mean(train), statistics.mean(held_out)
        rows.append([name, f"{100 * mean:+.2f} %", each, f"{100 * other:+.2f} %"])
    header = ["", f"last {LAST}", "each seed", "held out"]
    print_table("difference to plain", header, rows)
    _put_figures(found)


def _put_figures(found: Mapping[str, list[Curve]]) -> None:
    figures = Figures(KEYS)
    train, held_out = differences(found[OURS], found[PLAIN])
    figures.put("train_difference", statistics.mean(train))
    figures.put("train_difference_worst", max(train, key=abs))
    figures.put("heldout_difference", statistics.mean(held_out))
    if AGAIN in found:
        chance, _ = differences(found[AGAIN], found[PLAIN])
        figures.put("chance_difference", max(map(abs, chance)))
    else:
        figures.leave_out("plain is not run twice (quick)", "chance_difference")
    figures.finish()


def differences(
    curves: list[Curve], plain: list[Curve]
) -> tuple[list[float], list[float]]:
    """Return how far above plain each ends, as a share: in training, and held out."""
    pairs = list(zip(curves, plain, strict=True))
    train = [own.last / other.last - 1.0 for own, other in pairs]
    return train, [own.held_out / other.held_out - 1.0 for own, other in pairs]


def parting(curves: list[Curve], plain: list[Curve], step: int) -> float:
    """Return |loss - plain| at a step, counted from 1: the mean over the seeds."""
    return statistics.mean(
        abs(own.losses[step - 1] - other.losses[step - 1])
        for own, other in zip(curves, plain, strict=True)
    )


def _points(curves: list[Curve]) -> list[tuple[float, float]]:
    """Return (steps, loss) points, each the mean of the steps before and all seeds."""
    losses = np.mean([curve.losses for curve in curves], axis=0)
    ends = range(POINT, len(losses) + 1, POINT)
    return [(float(end), float(losses[end - POINT : end].mean())) for end in ends]


if __name__ == "__main__":
    main()
