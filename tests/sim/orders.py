"""`python -m tests.sim.orders`: what it costs to shuffle a task less than as a whole.

One worker, tasks that are stretches of the text, the same stretches for all orders. An
order shuffles so many steps of a task at a time; with one, the text stays as it is but
for the windows of a step. Prints the held-out loss of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coordinator.domain.initial import initial_vector
from coordinator.domain.plan import hyper_parameters
from tests.sim.alone import plan_for
from tests.sim.net import SEQ_LEN, Net, Shape
from tests.sim.steps import Local, Moments, local_step
from tests.sim.text import read_text

BATCH = 8


def shuffled(
    rng: np.random.Generator, num_steps: int, together: int
) -> NDArray[np.int64]:
    """Return the windows of a task, shuffled `together` steps at a time."""
    windows = np.arange(num_steps * BATCH)
    cuts = range(together * BATCH, len(windows), together * BATCH)
    return np.concatenate([rng.permutation(p) for p in np.split(windows, list(cuts))])


def losses(
    seed: int, *, num_tasks: int, num_steps: int, orders: Sequence[int]
) -> list[float]:
    """Return the held-out loss after tasks of `num_steps`, for each order."""
    net, text, rng = Net(Shape()), read_text(), np.random.default_rng(seed)
    plan = plan_for(num_tasks * num_steps * BATCH, batch_size=BATCH)
    first = initial_vector(net.segments, net.shape.num_layers, seed)
    flat_RP = np.repeat(first[None], len(orders), 0)
    moments = [Moments.zeros(net.num_params) for _ in orders]
    places = rng.permutation(len(text.train) // (num_steps * BATCH))[:num_tasks]
    for done, place in enumerate(places):
        stretch = text.train[place * num_steps * BATCH :]
        chosen = [shuffled(rng, num_steps, together) for together in orders]
        for step in range(num_steps):
            part = slice(step * BATCH, (step + 1) * BATCH)
            batch = np.stack([stretch[windows[part]] for windows in chosen])
            _, grads_RP = net.gradients(flat_RP, batch)
            tokens = (done * num_steps + step) * BATCH * SEQ_LEN
            hyper = hyper_parameters(plan, tokens_accepted=tokens, task_tokens=0)
            for row, mine in enumerate(moments):
                task = Local([batch[row]], hyper, mine)
                local_step(net.segments, flat_RP[row], grads_RP[row], task, 0)
    return [net.loss(flat_P, text.held_out) for flat_P in flat_RP]


def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--orders", type=int, nargs="+", default=[32, 8, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing by more
    for seed in args.seeds:
        found = losses(
            seed, num_tasks=args.tasks, num_steps=args.steps, orders=args.orders
        )
        shown = (
            f"{order}: {loss:.4f}"
            for order, loss in zip(args.orders, found, strict=True)
        )
        print(f"seed {seed}, steps shuffled together:", *shown, flush=True)


if __name__ == "__main__":
    main()
