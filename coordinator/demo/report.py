"""What the demo prints: progress while it trains, a table and JSON at its end."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

import msgspec

from coordinator.app import DATABASE_NAME
from coordinator.demo.killing import Killing
from coordinator.domain.errors import StartError
from coordinator.domain.manifest import TOKENIZER_NAME, Manifest
from coordinator.service.corpus import tokenized_folder
from coordinator.service.view import FleetView, VersionPoint
from coordinator.store import rounds
from coordinator.store.blobs import BlobKind, version_blob
from coordinator.store.engine import read_once

#: Without a terminal a line is printed this often, in seconds.
LINE_S: Final = 15.0
_BAR: Final = 24
_PROMPT: Final = "Return the "
_NUM_SAMPLED: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of the demo measured."""

    #: Tokens accepted during this run, and the seconds that it took.
    tokens: int
    seconds: float
    victim: str | None
    victim_tokens: int | None
    retrained_after_s: float | None


class Screen:
    """One line that tells how far training is."""

    def __init__(self, budget_s: float, out: TextIO) -> None:
        self._budget_s = budget_s
        self._out = out
        self._drawn_at = float("-inf")
        #: Set where training was told to end before its time.
        self.is_ending = False

    def draw(self, view: FleetView, elapsed_s: float) -> None:
        """Draw the state: in place on a terminal, else now and then."""
        on_terminal = self._out.isatty()
        if not on_terminal and time.monotonic() < self._drawn_at + LINE_S:
            return
        self._drawn_at = time.monotonic()
        is_ending = self.is_ending or elapsed_s >= self._budget_s
        line = progress_line(view, elapsed_s, self._budget_s, is_ending=is_ending)
        end = "" if on_terminal else "\n"
        start = "\r\x1b[2K" if on_terminal else ""
        print(f"{start}{line}", end=end, file=self._out, flush=True)


def progress_line(
    view: FleetView, elapsed_s: float, budget_s: float, *, is_ending: bool
) -> str:
    """Return the state of training in one line."""
    if view.run is None:
        return "no run yet"
    share = min(1.0, elapsed_s / budget_s)
    bar = ("#" * round(share * _BAR)).ljust(_BAR, ".")
    speed = view.run.tokens_per_s
    left = max(0.0, budget_s - elapsed_s)
    left_said = f"ETA {int(left) // 60}:{int(left) % 60:02d}"
    parts = [
        "ending" if is_ending else f"[{bar}] {100 * share:3.0f} %",
        f"v{view.run.newest_version}",
        f"{view.run.tokens_accepted} tokens",
        "- tokens/s" if speed is None else f"{speed:.0f} tokens/s",
        _losses(view),
        "the last round closes and is scored" if is_ending else left_said,
    ]
    return "  ".join(part for part in parts if part)


def _losses(view: FleetView) -> str:
    said = []
    if view.versions and view.versions[-1].train_loss is not None:
        said.append(f"loss {view.versions[-1].train_loss:.3f}")
    if view.evaluations:
        said.append(f"held-out {view.evaluations[-1].bits_per_byte:.3f} bits/byte")
    return "  ".join(said)


def print_corpus(manifest: Manifest) -> None:
    """Print what is trained on, and what is held out."""
    tokens = sum(shard.num_tokens for shard in manifest.train_shards())
    held_out = manifest.held_out_shard()
    print(
        f"Corpus:       {tokens} tokens to train on, vocabulary {manifest.vocab_size}; "
        f"held out {held_out.text_bytes} bytes in {held_out.num_documents} documents",
        flush=True,
    )


def outcome(
    before: FleetView, after: FleetView, started_at: float, killing: Killing
) -> Outcome:
    """Return what happened between two views of a run; `started_at` in Unix seconds."""
    known = before.versions[-1]
    newest = after.versions[-1]
    victim = killing.victim
    return Outcome(
        tokens=newest.tokens_total - known.tokens_total,
        seconds=max(newest.at - started_at, 0.0),
        victim=None if victim is None else victim.name,
        victim_tokens=None if victim is None else victim.num_tokens,
        retrained_after_s=killing.retrained_after_s,
    )


def sample(folder: Path, view: FleetView) -> str:
    """Return a text that the newest version writes, by a worker's own command."""
    if view.run is None:
        return ""
    published = folder / "data" / BlobKind.PUBLISHED
    command = [
        sys.executable,
        "-m",
        "worker",
        "generate",
        "--weights",
        str(published / version_blob(view.run.newest_version)),
        "--preset",
        view.run.preset,
        "--tokenizer",
        str(tokenized_folder(folder / "corpus") / TOKENIZER_NAME),
        "--prompt",
        _PROMPT,
        "--num-tokens",
        str(_NUM_SAMPLED),
        "--temperature",
        "0.7",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
    if done.returncode != 0:
        raise StartError(f"no sample: {done.stderr.strip()}")
    return f"\nA sample of version {view.run.newest_version}:\n{_PROMPT}{done.stdout}"


def print_result(
    data: Path, manifest: Manifest, view: FleetView, measured: Outcome
) -> int:
    """Print the scores over time, then the figures as one line of JSON."""
    if view.run is None:
        return 1
    run_id, run = view.run.run_id, view.run
    by_worker = read_once(
        data / DATABASE_NAME, lambda c: rounds.applied_tokens_by_worker(c, run_id)
    )
    _print_scores(manifest, view)
    held_out = manifest.held_out_shard()
    figures = {
        "bits_per_byte_start": round(view.evaluations[0].bits_per_byte, 4),
        "bits_per_byte_end": round(_newest_score(view), 4),
        "gzip_bits_per_byte": round(manifest.gzip_bits_per_byte(), 4),
        "heldout_bytes": held_out.text_bytes,
        "tokens": view.versions[-1].tokens_total,
        "tasks_done": view.tasks.done if view.tasks else 0,
        "versions": len(view.versions),
        "tokens_per_second": round(measured.tokens / max(measured.seconds, 1e-9), 1),
        "tokens_by_worker": by_worker,
        "seconds": round(measured.seconds, 1),
        "newest_version": run.newest_version,
        "loop_lag_ms": view.server.loop_lag_ms,
    }
    if measured.victim is not None:
        figures["killed"] = measured.victim
        figures["killed_tokens"] = measured.victim_tokens
        figures["retrained_after_s"] = _rounded(measured.retrained_after_s)
    print(msgspec.json.encode(figures).decode(), flush=True)
    return 0


def _newest_score(view: FleetView) -> float:
    """Return the score of the newest version; a finished run has one."""
    newest = view.evaluations[-1]
    if view.run is None or newest.version != view.run.newest_version:
        raise StartError(
            f"the newest version has no score, version {newest.version} has the last"
        )
    return newest.bits_per_byte


def running_minutes(points: list[VersionPoint]) -> dict[int, float]:
    """Return how long each version had been trained for: the time of all rounds so far.

    What passed between them, most of all between two runs of the demo, is left out.
    """
    minutes, minutes_so_far, tokens_before = {}, 0.0, 0
    for point in points:
        if point.tokens_per_s:
            tokens = point.tokens_total - tokens_before
            minutes_so_far += tokens / point.tokens_per_s / 60.0
        tokens_before = point.tokens_total
        minutes[point.version] = minutes_so_far
    return minutes


def _print_scores(manifest: Manifest, view: FleetView) -> None:
    minutes = running_minutes(view.versions)
    rows = [
        (
            f"{score.version}",
            f"{minutes[score.version]:.2f}",
            f"{score.tokens_total}",
            f"{score.loss:.4f}",
            f"{score.bits_per_byte:.4f}",
        )
        for score in view.evaluations
    ]
    rows.append(("gzip -9", "", "", "", f"{manifest.gzip_bits_per_byte():.4f}"))
    for row in [("version", "minute", "tokens", "nats/token", "bits/byte"), *rows]:
        print("  ".join(cell.rjust(10) for cell in row))


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)
