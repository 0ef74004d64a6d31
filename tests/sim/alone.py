"""What a fleet is compared with: one worker alone, and ideal data-parallel training.

Both see the windows of the fleet in the fleet's order, and the same schedule. Several
recipes of one worker are trained side by side, as replicas of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple

import msgspec
import numpy as np

from bitnet_ext.wire.verdicts import Optimiser
from coordinator.domain.initial import initial_vector
from coordinator.domain.muon import OptimiserState, gradient_step
from coordinator.domain.plan import TrainingPlan, hyper_parameters, step_sizes
from tests.sim import setting as costs
from tests.sim.net import SEQ_LEN, Net
from tests.sim.setting import Setting
from tests.sim.steps import Local, Moments, clipped, local_step
from tests.sim.text import Text, Windows


def alone(
    net: Net, text: Text, plans: Sequence[TrainingPlan], *, num_windows: int, seed: int
) -> list[float]:
    """Return the held-out loss of one worker under each plan, after the same text.

    A step is `batch_size` windows, which all plans share. With a batch of 8 this is
    data-parallel training over 8 workers, without loss and without delay.
    """
    flat_RP = np.repeat(
        initial_vector(net.segments, net.shape.num_layers, seed)[None], len(plans), 0
    )
    moments = [Moments.zeros(net.num_params) for _ in plans]
    tokens = 0
    for batch in batches(text, num_windows, plans[0].batch_size, seed):
        _, grads_RP = net.gradients(flat_RP, np.repeat(batch[None], len(plans), 0))
        for row, plan in enumerate(plans):
            hyper = hyper_parameters(plan, tokens_accepted=tokens, task_tokens=0)
            task = Local([batch], hyper, moments[row])
            local_step(net.segments, flat_RP[row], grads_RP[row], task, 0)
        tokens += len(batch) * SEQ_LEN
    return [net.loss(flat_P, text.held_out) for flat_P in flat_RP]


def alone_by_muon(
    net: Net, text: Text, plan: TrainingPlan, *, num_windows: int, seed: int
) -> float:
    """Return the held-out loss of one worker that steps as a gradient round does.

    With a batch of 8: ideal data-parallel training with the coordinator's optimiser.
    """
    first = initial_vector(net.segments, net.shape.num_layers, seed)
    zeros = np.zeros_like(first)
    state = OptimiserState(weights=first, momentum=zeros, square=zeros)
    tokens = 0
    cut = batches(text, num_windows, plan.batch_size, seed)
    for step, batch in enumerate(cut, start=1):
        _, grads_RP = net.gradients(state.weights[None], batch[None])
        clip = np.float32(clipped(grads_RP[0], plan.clip_norm))
        size = len(batch) * SEQ_LEN
        sizes = step_sizes(plan, tokens_before=tokens, tokens=size, step=step)
        state = gradient_step(state, grads_RP[0] * clip, net.segments, sizes)
        tokens += size
    return net.loss(state.weights, text.held_out)


def batches(
    text: Text, num_windows: int, batch_size: int, seed: int
) -> Iterator[Windows]:
    """Yield the batches of so many windows, epoch after epoch."""
    num_epochs = -(-num_windows // len(text.train))
    order = np.concatenate([text.order(seed, epoch) for epoch in range(num_epochs)])
    for start in range(0, num_windows, batch_size):
        yield text.train[order[start : min(start + batch_size, num_windows)]]


def windows_within(seconds: float, net: Net, setting: Setting) -> int:
    """Return the windows that the fastest worker alone trains in that time."""
    speed = max(setting.speeds)
    adamw_s = setting.optimiser_s(
        costs.ADAMW * net.num_params, num_params=net.num_params, speed=speed
    )
    mean_jitter = 1 + setting.jitter / 2
    return int(seconds / ((1 / speed + adamw_s) * mean_jitter))


def numbers_of(plans: Sequence[Mapping[str, object]]) -> str:
    """Return all that these plans tell an optimiser along a run, at 67 places of it.

    The run has 1,000 windows: a plan gives the same numbers along a longer one.
    """
    num_windows, places = 1000, range(0, 1001, 15)
    told = [
        (
            hyper_parameters(plan, tokens_accepted=at * SEQ_LEN, task_tokens=0),
            astuple(step_sizes(plan, tokens_before=at * SEQ_LEN, tokens=1, step=at)),
            plan.clip_norm,
        )
        for plan in (plan_for(num_windows, **fields) for fields in plans)
        for at in places
    ]
    return msgspec.json.encode(told).decode()


def plan_for(num_windows: int, **fields: object) -> TrainingPlan:
    """Return the plan of a run over so many windows: 3 % warm-up, two stages.

    Local steps are those of AdamW, where `fields` don't say otherwise.
    """
    tokens = num_windows * SEQ_LEN
    base = TrainingPlan(
        local_optimiser=Optimiser.ADAMW,
        warmup_tokens=int(0.03 * tokens),
        schedule_tokens=tokens,
        batch_size=1,
    )
    return msgspec.structs.replace(base, **fields)
