"""The maintenance commands: each is one function that returns what to print.

Commands that change a run go through `data/control.sock` to the coordinator that
runs; without one they take the lock of the data folder and do the same themselves.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import msgspec
from sqlalchemy import Connection

from bitnet_ext.exports.provenance import Format, Variant
from bitnet_ext.scoring import TextScore, score_text
from coordinator.app import DATABASE_NAME, open_fleet, run_settings
from coordinator.app import worker_key as stored_key
from coordinator.control import (
    KEY_IS_SET,
    OTHER_VERSION,
    Command,
    DumpTelemetry,
    KeyOrigin,
    KickStuck,
    MarkGone,
    Seed,
    SetPlan,
    Status,
    ask,
    obey,
)
from coordinator.domain.errors import FleetError, StartError
from coordinator.domain.manifest import Manifest
from coordinator.domain.plan_words import BUDGET
from coordinator.service.corpus import Recipe, Stage, prepare_corpus
from coordinator.service.exporting import Chosen, Pick, choose, export_version
from coordinator.service.fleet import RUNNING, FileFault, Fleet, Known, Served
from coordinator.service.looking import look
from coordinator.service.scoring import (
    export_to_score,
    file_text,
    held_out_text,
    version_to_score,
)
from coordinator.service.starting import (
    check_corpus,
    ensure_run,
    load_corpus,
    reconcile,
    told_schedule,
)
from coordinator.service.steering import check_task_size, the_run
from coordinator.service.telemetry import Telemetry, collect
from coordinator.service.view import FleetView
from coordinator.settings import PREFIX, CoordinatorSettings
from coordinator.store import clock, runs
from coordinator.store.engine import read_once
from coordinator.store.rows import RunRow
from coordinator.store.schema import check_newest, has_tables

T = TypeVar("T")


def command(settings: CoordinatorSettings, wish: Command) -> str:
    """Do what was asked, by the running coordinator or in its place.

    Only a new epoch is reason enough to make a fleet. Raises FleetError.
    """
    said = ask(settings.data, wish)
    if said is not None:
        return said
    if not isinstance(wish, Seed):
        _check_fleet(settings)
    if isinstance(wish, KickStuck | MarkGone):
        raise StartError(
            f"no coordinator runs on {settings.data}, so nobody can be heard: whether "
            "a worker is stuck or lost shows only once one does"
        )
    with open_fleet(settings, _tell_nobody) as fleet:
        reconcile(fleet)
        fleet.manifest = load_corpus(fleet.corpus)
        run = fleet.store.read_now(runs.newest_run)
        if _may_begin_epoch(wish):
            _check_epoch(fleet, run, wish)
        made = run is None and ensure_run(fleet, fleet.manifest, run_settings(settings))
        said = asyncio.run(obey(fleet, wish))
        if not made:
            return said
        rate = told_schedule(fleet.store.read_now(the_run))
        return f"new run in {settings.data}; {said}; its learning rate {rate}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _AtRest:
    """What is known of a fleet that no coordinator runs (`service.fleet.Known`)."""

    is_running: ClassVar[bool] = False
    manifest: Manifest | None
    heartbeat_s: float
    corpus_fault: str | None = None
    disk_fault: str | None = None
    file_faults: Mapping[Served, FileFault] = field(default_factory=dict)


def telemetry(settings: CoordinatorSettings) -> Telemetry:
    """Return all that an expert may need, whether a coordinator runs or not.

    Raises StartError for a folder without a fleet, or of another schema.
    """
    said = ask(settings.data, DumpTelemetry())
    if said is not None:
        return _understood(said, Telemetry)
    return _at_rest(settings, lambda c, known, now: collect(c, known, now=now))


def _understood(said: str, kind: type[T]) -> T:
    """Return an answer. Raises StartError for one of another version's form."""
    try:
        return msgspec.json.decode(said, type=kind)
    except msgspec.DecodeError as error:
        raise StartError(f"{OTHER_VERSION} ({error})") from error


def status(settings: CoordinatorSettings) -> tuple[FleetView, float | None]:
    """Return how the fleet is doing, without history.

    Where no coordinator runs: how it was when one last did, and that moment (Unix
    seconds). Raises StartError as `telemetry`.
    """
    said = ask(settings.data, Status())
    if said is not None:
        return _understood(said, FleetView), None

    def see(
        connection: Connection, known: Known, now: float
    ) -> tuple[FleetView, float]:
        view = look(
            connection,
            known,
            now=now,
            loop_lag_ms=0.0,
            insecure_http=False,
            history=False,
        )
        return view, now

    return _at_rest(settings, see)


def _at_rest(
    settings: CoordinatorSettings, act: Callable[[Connection, Known, float], T]
) -> T:
    """Run `act` on the database as it is, at the moment up to which it tells."""
    known = _AtRest(
        manifest=_manifest_if_any(settings), heartbeat_s=settings.heartbeat_s
    )

    def see(connection: Connection) -> T:
        ran_until = clock.ran_until(connection)
        return act(connection, known, ran_until or time.time())

    return _read(settings, see)


def _read(settings: CoordinatorSettings, act: Callable[[Connection], T]) -> T:
    """Run `act` on the database, whether a coordinator runs or not.

    Raises StartError where that is not one of a fleet, and of the newest schema.
    """
    _check_fleet(settings)

    def read(connection: Connection) -> T:
        if not has_tables(connection, settings.data):
            raise _no_fleet(settings)
        check_newest(connection)
        return act(connection)

    return read_once(settings.data / DATABASE_NAME, read)


def _manifest_if_any(settings: CoordinatorSettings) -> Manifest | None:
    """Return the manifest; what is wrong with the corpus must not hide the fleet."""
    try:
        return load_corpus(settings.corpus)
    except FleetError:
        return None


def worker_key(settings: CoordinatorSettings) -> str:
    """Return the key that workers need; makes it where the fleet has none yet.

    Raises StartError where the folder has no fleet, or the coordinator that runs has
    its key from elsewhere.
    """
    if settings.worker_api_key is not None:
        return settings.worker_api_key
    origin = ask(settings.data, KeyOrigin())
    if origin == KEY_IS_SET:
        raise StartError(
            f"the key of the running coordinator comes from {PREFIX}WORKER_API_KEY in "
            f"its environment, not from {settings.data}: take it from there"
        )
    if origin is None:
        _check_fleet(settings)
    return stored_key(settings)


def _check_fleet(settings: CoordinatorSettings) -> None:
    """Refuse a data folder that has no fleet; nothing is made there."""
    if not (settings.data / DATABASE_NAME).exists():
        raise _no_fleet(settings)


def _no_fleet(settings: CoordinatorSettings) -> StartError:
    return StartError(
        f"{settings.data} holds no fleet ({DATABASE_NAME}): name its folder with "
        f"--data or {PREFIX}DATA, or begin one with `bitnet-coordinator serve`"
    )


def _may_begin_epoch(wish: Command) -> bool:
    """Return whether there may be another epoch: it is asked for, or has its tokens."""
    return isinstance(wish, Seed) or (
        isinstance(wish, SetPlan) and BUDGET in wish.words
    )


def _check_epoch(fleet: Fleet, run: RunRow | None, wish: Command) -> None:
    """Refuse an epoch before anything is made for it."""
    if run is not None:
        # Tasks on another text could never be trained.
        check_corpus(run, fleet.manifest, fleet.corpus)
    if isinstance(wish, Seed):
        check_task_size(fleet.the_manifest(), wish.tokens)


def tokenize_corpus(settings: CoordinatorSettings, recipe: Recipe) -> str:
    """Prepare the corpus of these settings. Raises FleetError."""
    manifest = prepare_corpus(
        settings.corpus,
        recipe,
        now=time.time(),
        protected_hash=protected_corpus(settings),
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    held_out = manifest.held_out_shard()
    return (
        f"{sum(shard.num_tokens for shard in manifest.train_shards())} tokens to "
        f"train on in {len(manifest.train_shards())} shards, {held_out.num_tokens} "
        f"tokens ({held_out.text_bytes} bytes) held out, vocabulary "
        f"{manifest.vocab_size}"
    )


def export(
    settings: CoordinatorSettings,
    wish: int | Pick,
    variant: tuple[Format, Variant],
    target: Path,
) -> str:
    """Write a weight version for other software; works beside a running coordinator.

    Raises FleetError, ExportError or OSError; `target` is not made then.
    """
    about, report = export_version(
        settings.data, settings.corpus, _chosen(settings, wish), variant, target
    )
    for warning in about.warnings():
        print(f"WARNING: {warning}", file=sys.stderr)
    return (
        f"version {about.weight_version} as {' '.join(variant)} in {target}: "
        f"{report.num_bytes} bytes; read back, its logits ({report.logits:.3g}) differ "
        f"by {report.difference:.2g} (root mean square)"
    )


def score(
    settings: CoordinatorSettings,
    what: int | Pick | Path,
    text: Path | None,
    threads: int,
) -> TextScore:
    """Score a version or an exported folder on a file, or on the held-out text.

    Raises FleetError, ExportError or OSError.
    """
    if isinstance(what, Path):
        scored = export_to_score(what)
    else:
        chosen = _chosen(settings, what)
        scored = version_to_score(settings.data, settings.corpus, chosen)
    if text is None:
        found = held_out_text(settings.corpus, scored)
    else:
        found = file_text(text, scored)
    return score_text(
        scored.model,
        found.tokens,
        eot_id=scored.tokenizer.eot_id,
        num_bytes=found.num_bytes,
        threads=threads,
    )


def _chosen(settings: CoordinatorSettings, wish: int | Pick) -> Chosen:
    """Return the version that is wished for."""
    return _read(settings, lambda connection: choose(connection, wish))


def protected_corpus(settings: CoordinatorSettings) -> str | None:
    """Return the hash of the corpus that a running run trains on.

    Raises StartError for a database that is damaged or empty beside weights.
    """
    path = settings.data / DATABASE_NAME
    if not path.exists():
        return None

    def find(connection: Connection) -> str | None:
        if not has_tables(connection, settings.data):
            return None
        run = runs.newest_run(connection)
        return run.corpus_hash if run is not None and run.state == RUNNING else None

    return read_once(path, find)


def _tell_nobody(_kind: str, _body: object, _at: float) -> None:
    """Publish nothing: no page is watching."""


def _show_progress(stage: Stage, done: int, total: int) -> None:
    share = 100 * done // max(1, total)
    end = "\n" if done >= total else ""
    print(f"\r{stage:>9} {share:3d} %", end=end, file=sys.stderr, flush=True)
