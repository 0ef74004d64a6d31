"""Results of single runs, kept in a folder so that a broken-off study goes on.

A result is found again only by what made it: its name, its figures and the code that
it ran through. Whoever changes that code trains anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
#: The code that decides what one worker alone gives,
ALONE_CODE: Final = (
    *(f"tests/sim/{name}.py" for name in ("net", "text", "steps", "alone")),
    "coordinator/domain/initial.py",
    "coordinator/domain/plan.py",
)
#: what the fastest alone gives in the time of a fleet,
WALLTIME_CODE: Final = (*ALONE_CODE, "tests/sim/setting.py")
#: what ideal parallel training gives,
PARALLEL_CODE: Final = (*ALONE_CODE, "coordinator/domain/muon.py")
#: and what a fleet gives: all of it.
CODE: Final = (
    *WALLTIME_CODE,
    "coordinator/domain/muon.py",
    "tests/sim/fleet.py",
    "tests/sim/crew.py",
    "bitnet_ext/chain.py",
    "bitnet_ext/codecs.py",
    "bitnet_ext/outer.py",
    "bitnet_ext/kernels_dot.c",
    "bitnet_ext/kernels_trits.c",
    "bitnet_ext/trits.py",
    "coordinator/domain/guards.py",
    "coordinator/domain/outer_step.py",
    "coordinator/domain/rounds.py",
    "coordinator/domain/sizing.py",
    "coordinator/domain/throughput.py",
)

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a function of this process, and plain arguments for it."""

    name: str
    act: Callable[..., Result]
    arguments: dict[str, Any]
    code: tuple[str, ...] = CODE

    def file_name(self) -> str:
        """Return the name of its result: another for another code or argument."""
        text = json.dumps(self.arguments, sort_keys=True, default=str)
        digest = hashlib.sha256(f"{_digest(self.code)}{self.name}{text}".encode())
        return f"{self.name}-{digest.hexdigest()[:12]}.json"


def kept_or_done(folder: Path, job: Job) -> Result:
    """Return the result of a job: from the folder, or by doing it now."""
    path = folder / job.file_name()
    if path.exists():
        found: Result = json.loads(path.read_text())
        return found
    result = job.act(**job.arguments)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(path)
    return result


@lru_cache
def _digest(code: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in code:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()
