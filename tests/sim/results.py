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
#: The code that decides what one worker alone gives. Of plans the numbers decide
#: (`Job.numbers`), which hardly ever change, not their code, which often does;
ALONE_CODE: Final = (
    *(f"tests/sim/{name}.py" for name in ("net", "text", "steps", "alone")),
    "bitnet_ext/fused.py",
    "bitnet_ext/kernels_fused*",
    "bitnet_ext/layout.py",
    "coordinator/domain/initial.py",
)
#: what the fastest alone gives in the time of a fleet,
WALLTIME_CODE: Final = (*ALONE_CODE, "tests/sim/setting.py")
#: what ideal parallel training gives,
PARALLEL_CODE: Final = (*ALONE_CODE, "coordinator/domain/muon.py")
#: and what a fleet gives: all that it may go through.
CODE: Final = (
    *WALLTIME_CODE,
    *(f"tests/sim/{name}.py" for name in ("fleet", "crew")),
    *(
        f"bitnet_ext/{name}.py"
        for name in ("chain", "codecs", "frames", "outer", "trits")
    ),
    *(f"bitnet_ext/kernels_{name}*" for name in ("codec", "dot", "outer", "trits")),
    "coordinator/domain/*.py",
)

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a function of this process, and plain arguments for it."""

    name: str
    act: Callable[..., Result]
    arguments: dict[str, Any]
    code: tuple[str, ...] = CODE
    #: What else the result depends on.
    numbers: str = ""

    def file_name(self) -> str:
        """Return the name of its result: another for another code or argument."""
        text = json.dumps(self.arguments, sort_keys=True, default=str)
        made_of = f"{digest_of(self.code)}{self.numbers}{self.name}{text}"
        digest = hashlib.sha256(made_of.encode())
        return f"{self.name}-{digest.hexdigest()[:12]}.json"


def kept_or_done(path: Path, job: Job) -> Result:
    """Return the result of a job: from the file at `path`, or by doing it now."""
    if path.exists():
        found: Result = json.loads(path.read_text())
        return found
    result = job.act(**job.arguments)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(path)
    return result


@lru_cache
def digest_of(code: tuple[str, ...]) -> str:
    """Return the hash of the files that match; the first call decides.

    To be called before anything runs: who edits a file while a study goes on must not
    have what the old code gave taken for what the new one gives.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in code for path in ROOT.glob(pattern)}):
        digest.update(path.read_bytes())
    return digest.hexdigest()
