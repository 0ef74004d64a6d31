"""`make bench-leases`: leases, task sizes and verdicts of a fleet that has bad days.

Every figure is computed in the run. Fleets run side by side, one for each seed. A
table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np

from coordinator.domain import leases
from tests.sim import reference
from tests.sim.happenings import Detected, Seen
from tests.sim.leases import HEARTBEAT_S, Fleet

#: No rule was looked at with these. A dozen: what is wasted differs by a tenth from
#: fleet to fleet, as luck kills young tasks or old ones.
SEEDS: Final = tuple(range(600, 612))
NUM_BOXES: Final = 60
HOURS: Final = 22.0
QUICK_HOURS: Final = 3.0
#: Below this step time the limit of a stuck worker is STUCK_LIMIT_S ...
QUICK_STEP_S: Final = 10.0
STUCK_LIMIT_S: Final = 120.0
#: ... else so many steps and seconds.
STUCK_STEPS, STUCK_SLACK_S = 5.0, 60.0

Figures = dict[str, Any]


def simulated(seed: int, hours: float) -> Seen:
    """Run one fleet."""
    return Fleet(seed=seed, num_boxes=NUM_BOXES).run(hours)


def figures(runs: Sequence[Seen]) -> Figures:
    """Return what is promised, over all runs."""
    ratios = np.array([ratio for seen in runs for ratio in seen.ratios])
    task_s = [s for seen in runs for s in seen.task_s]
    settled_s = [s for seen in runs for s in seen.settled_task_s]
    trained = sum(seen.trained for seen in runs)
    wasted = sum((Counter(seen.wasted) for seen in runs), Counter[str]())
    apart = wasted.pop("partition", 0)
    return {
        "worker_hours": sum(seen.hours for seen in runs),
        "alive_leases_lost": sum(len(seen.alive_lost) for seen in runs),
        "partitions_lost": sum(seen.partitions_lost for seen in runs),
        "predicted_within_2x": _share((ratios >= 0.5) & (ratios <= 2.0)),
        "task_time_p5_s": _percentile(task_s, 5),
        "task_time_p95_s": _percentile(task_s, 95),
        "settled_task_time_p5_s": _percentile(settled_s, 5),
        "settled_task_time_p95_s": _percentile(settled_s, 95),
        "wasted_share": sum(wasted.values()) / trained,
        "wasted_by": {k: round(n / trained, 5) for k, n in sorted(wasted.items())},
        "wasted_by_partitions": apart / trained,
        **_stuck([found for seen in runs for found in seen.detected]),
        "slow_called_stuck": sum(seen.slow_called_stuck for seen in runs),
        "alive_called_lost": sum(seen.alive_called_lost for seen in runs),
        "heartbeats_called_slow": sum(seen.called_slow for seen in runs),
        "reissue_s_max": _most([s for seen in runs for s in seen.free_again_s]),
        "reissue_after_pause_s_max": _most([s for seen in runs for s in seen.graced_s]),
        "leased_again_s_max": _most([s for seen in runs for s in seen.leased_again_s]),
        "tasks_handed_in_early": sum(seen.parts for seen in runs),
        "tasks_given_up": sum(seen.given_up for seen in runs),
    }


def _stuck(found: Sequence[Detected]) -> Figures:
    """Return how long workers that stood still went unnoticed."""
    known = [one for one in found if one.was_measured]
    called = [one for one in known if one.called]
    slow = [one for one in called if one.step_s >= QUICK_STEP_S]
    return {
        "num_stuck": len(found),
        "stuck_detect_s_max": _most(
            [one.after_s for one in called if one.step_s < QUICK_STEP_S]
        ),
        # Of workers with longer steps: the worst as a share of 5 steps + 60 s.
        "stuck_detect_slow_ratio_max": _most(
            [one.after_s / (STUCK_STEPS * one.step_s + STUCK_SLACK_S) for one in slow],
            digits=3,
        ),
        "stuck_lease_ended_first": len(known) - len(called),
        "stuck_never_measured": len(found) - len(known),
    }


def _most(values: Sequence[float], digits: int = 1) -> float | None:
    return round(max(values), digits) if values else None


def _share(hits: Any) -> float | None:
    return float(np.mean(hits)) if len(hits) else None


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def reference_share(hours: float) -> float:
    """Return the share of leases that run out by the reference's rules."""
    speeds = [1.0, *np.geomspace(10.0, 1000.0, NUM_BOXES - 1)]
    return reference.expired_share(
        speeds,
        hours=max(hours, 200.0),
        too_hopeful=reference.TOO_HOPEFUL,
        seed=SEEDS[0],
    )


def bars() -> dict[str, tuple[str, float]]:
    """Return what each figure should be: at least, or at most."""
    return {
        "reference_expired_share": (">=", 0.5),
        "alive_leases_lost": ("<=", 0),
        "predicted_within_2x": (">=", 0.95),
        "task_time_p5_s": (">=", 450.0),
        "task_time_p95_s": ("<=", 750.0),
        "wasted_share": ("<=", 0.02),
        "stuck_detect_s_max": ("<=", STUCK_LIMIT_S),
        "stuck_detect_slow_ratio_max": ("<=", 1.0),
        "slow_called_stuck": ("<=", 0),
        "alive_called_lost": ("<=", 0),
        "reissue_s_max": ("<=", leases.ttl_s(HEARTBEAT_S) + 5.0),
    }


def _table(found: Figures) -> None:
    due = bars()
    for name, value in found.items():
        sign, limit = due.get(name, ("", 0.0))
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        if not sign:
            print(f"{name:30} {shown}")
            continue
        met = value is not None and (value >= limit if sign == ">=" else value <= limit)
        print(f"{name:30} {shown:>10} {sign} {limit:g} {'ok' if met else 'MISSED'}")


def main() -> None:
    """Run the fleets, print the table and the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="an eighth of the hours")
    hours = QUICK_HOURS if parser.parse_args().quick else HOURS
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(partial(simulated, hours=hours), SEEDS))
    found = {"reference_expired_share": reference_share(hours), **figures(runs)}
    _table(found)
    for seen in runs:
        for story in seen.alive_lost[:5]:
            print(f"lost while alive: {story}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
