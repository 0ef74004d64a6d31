"""What the guards have added up is merged as it is, and gives the same bytes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from bitnet_ext.codecs import Codec
from bitnet_ext.layout import layout_hash
from bitnet_ext.wire.verdicts import RoundKind
from coordinator.service.judging import judge_round
from coordinator.service.stepping import Closing, next_state
from coordinator.service.version_blobs import write_version
from coordinator.store import rounds
from coordinator.store.blobs import BlobKind
from tests.unit.coordinator.fleets import NUM_PARAMS, PLAN, SHAPE, World, body, frame

#: Factors of honest submissions, and whether the guards' last sum is what is merged.
ROUNDS = {
    "one": ([1.0], False),
    "two": ([1.0] * 2, False),
    "three": ([1.0] * 3, True),
    "eight": ([1.0] * 8, True),
    "nine": ([1.0] * 9, True),
    "one clipped": ([1.0, 1.0, 4.0, 1.0], True),
    "one left out": ([1.0, -5.0, 1.0, 1.0], True),
    "one left out before they are compared": ([1.0, 0.0, 1.0, 1.0], True),
    "one left out and two left": ([1.0, -5.0, 1.0], False),
    "one clipped and one left out": ([1.0, 4.0, 1.0, -1.0, 1.0], True),
}


def noise(seed):
    return np.random.default_rng(seed).normal(size=NUM_PARAMS)


def ready(world: World, factors, plan) -> Closing:
    """Return a round in which a worker for each factor has handed in."""
    world.start_run(plan)
    names = [f"w{place}" for place in range(len(factors))]
    for name in names:
        world.register(name)
        world.set_speed(name, 0.5)
    held = [world.claimed(name) for name in names]
    for place, (task, name) in enumerate(zip(held, names, strict=True)):
        value = factors[place] * (noise(0) + 0.5 * noise(place + 1))
        sent = frame(task, value.astype(np.float32), codec=Codec(plan.codec))
        world.send(body(world.meta(task, name), sent))
    live = world.live_round()
    return Closing(
        run=world.run_row(),
        live=live,
        submissions=world.read(lambda c: rounds.accepted_in_round(c, live.round_id)),
        version=2,
        tokens_before=0,
    )


def version_after(world: World, closing: Closing):
    """Return the hashes of the version that a judged round makes."""
    state = next_state(world.fleet.blobs, closing, world.state(1), None)
    assert state is not None
    made = write_version(world.fleet.blobs, state, layout_hash(SHAPE))
    return made.state.sha256, made.published.sha256


CASES = [
    *((name, Codec.TERNARY) for name in ROUNDS),
    *(("one clipped and one left out", codec) for codec in (Codec.FP32, Codec.INT8)),
]


@pytest.mark.parametrize("kind", RoundKind)
@pytest.mark.parametrize(("name", "codec"), CASES)
def test_a_version_is_the_same_with_the_mean_of_the_guards(
    world: World, name, codec, kind
):
    factors, is_handed_over = ROUNDS[name]
    plan = msgspec.structs.replace(PLAN, round_kind=kind, codec=codec)

    kept = judge_round(world.fleet.blobs, ready(world, factors, plan)).kept

    assert (kept.mean is not None) == is_handed_over
    assert len(kept.factors) == sum(factor > 0 for factor in factors)
    assert sum(factor < 1 for factor in kept.factors) == ("clipped" in name)
    added_again = version_after(world, replace(kept, mean=None))
    assert version_after(world, kept) == added_again


@pytest.mark.parametrize("kind", RoundKind)
def test_payloads_that_the_guards_have_added_up_are_not_read_again(world: World, kind):
    plan = msgspec.structs.replace(PLAN, round_kind=kind)
    kept = judge_round(world.fleet.blobs, ready(world, [1.0] * 3, plan)).kept
    for row in kept.submissions:
        world.fleet.blobs.path(BlobKind.PAYLOAD, row.payload_file or "").unlink()

    assert version_after(world, kept)
    with pytest.raises(FileNotFoundError):
        version_after(world, replace(kept, mean=None))


def test_a_stale_submission_is_added_up_again_with_less_weight(world: World):
    closing = ready(world, [1.0] * 4, PLAN)
    live = msgspec.structs.replace(closing.live, base_version=2)
    stale, *fresh = closing.submissions
    fresh = [msgspec.structs.replace(row, base_version=2) for row in fresh]

    mixed = replace(closing, live=live, submissions=[stale, *fresh])
    kept = judge_round(world.fleet.blobs, mixed).kept

    assert kept.mean is None
    all_fresh = replace(
        mixed, submissions=[msgspec.structs.replace(stale, base_version=2), *fresh]
    )
    other = judge_round(world.fleet.blobs, all_fresh).kept
    assert other.mean is not None
    assert version_after(world, kept) != version_after(world, other)
