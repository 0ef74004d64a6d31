"""Going back: a new version that is an earlier one again, and when that is due.

A rollback begins a new *line* of versions. Only scores of the newest line count when
held-out loss is judged, so one rise leads to one rollback.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from coordinator.domain.guards import NUM_RISEN, has_risen

#: So many rollbacks to one version, with nothing better in between, and no more by
#: itself: where loss rises from there again and again, the plan is to blame.
MOST_IN_VAIN: Final = 2


class RollBack(StrEnum):
    """When a run goes back to its best version by itself."""

    NEVER = "never"
    ALARM = "alarm"  #: when held-out loss has risen


@dataclass(frozen=True, slots=True)
class Rollback:
    """Version `version` is version `to` again."""

    version: int
    to: int


def newest_line(
    losses: Mapping[int, float], rollbacks: Sequence[Rollback]
) -> dict[int, float]:
    """Return held-out loss by version since the last rollback, oldest first.

    The version that a rollback made has the loss of the one that it is, also before it
    is scored itself. `rollbacks` are in order.
    """
    if not rollbacks:
        return dict(sorted(losses.items()))
    last = rollbacks[-1]
    known = dict(losses)
    if last.to in known:
        known.setdefault(last.version, known[last.to])
    return {n: known[n] for n in sorted(known) if n >= last.version}


def deciding_losses(
    line: Mapping[int, float], whole: Collection[int]
) -> dict[int, float]:
    """Return the losses of a line by which to go back to one of the `whole` versions.

    The newest ones say that loss has risen, whatever has become of their files.
    """
    newest = list(line)[-NUM_RISEN:]
    return {n: loss for n, loss in line.items() if n in whole or n in newest}


def rollback_due(
    line: Mapping[int, float], rollbacks: Sequence[Rollback]
) -> int | None:
    """Return the version to go back to: the best of the line; None: go on."""
    if not has_risen(list(line.values())):
        return None
    best = best_of(line)
    return best if num_in_vain(best, rollbacks) < MOST_IN_VAIN else None


def loss_alarm(line: Mapping[int, float], rollbacks: Sequence[Rollback]) -> str | None:
    """Return what is wrong with the losses of the newest line; None: nothing."""
    losses = list(line.values())
    if not has_risen(losses):
        return None
    best = best_of(line)
    least = 100.0 * (min(losses[-NUM_RISEN:]) / line[best] - 1.0)
    said = (
        f"The last {NUM_RISEN} evaluations are {least:.1f} % or more above version "
        f"{best}, the best."
    )
    count = num_in_vain(best, rollbacks)
    if not count:
        return said
    times = "once" if count == 1 else f"{count} times"
    return (
        f"{said} The run has gone back there {times} already, and nothing was better."
    )


def best_of(line: Mapping[int, float]) -> int:
    """Return the version with the lowest loss; the first of several."""
    return min(line, key=lambda version: (line[version], version))


def num_in_vain(best: int, rollbacks: Sequence[Rollback]) -> int:
    """Return how many rollbacks in a row led to a version with nothing better since."""
    gone_back = {each.version: each.to for each in rollbacks}
    count = 0
    while best in gone_back:
        best, count = gone_back[best], count + 1
    return count


def num_steps(
    version: int,
    root_version: int,
    rollbacks: Sequence[Rollback],
    of_other_kind: Sequence[int] = (),
) -> int:
    """Return how many steps of one kind in a row lead to the state of a version.

    Every version of a run is one step more than the one before, but for its root and
    for those that are earlier ones again. `of_other_kind` are the versions that a step
    of the other kind has made: none counts up to there. Both are in order.
    """
    last = max((n for n in of_other_kind if n <= version), default=root_version)
    for each in reversed(rollbacks):
        if last < each.version <= version:
            steps = num_steps(each.to, root_version, rollbacks, of_other_kind)
            return steps + version - each.version
    return version - last
