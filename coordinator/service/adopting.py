"""A corpus becomes the one of the fleet: manifest, shards and run, all or nothing.

Until all of it is there, workers are told that there is no run.
"""

from __future__ import annotations

from contextlib import ExitStack

from coordinator.domain.initial import initial_weights
from coordinator.service.corpus import tokenized_folder
from coordinator.service.corpus_lock import in_use
from coordinator.service.fleet import Fleet
from coordinator.service.shard_check import check_shards
from coordinator.service.starting import (
    Initial,
    RunSettings,
    ensure_run,
    load_corpus,
)


def adopt_corpus(
    fleet: Fleet, settings: RunSettings, initial: Initial = initial_weights
) -> bool:
    """Take the corpus of the folder, if there is one, and make its run. Blocking.

    Returns whether there is one; it can't be replaced then until `corpus_held` is
    closed. Raises ManifestError for a bad manifest, StartError for a damaged shard and
    for a corpus that is not the one of the run.
    """
    with ExitStack() as held:
        held.enter_context(in_use(tokenized_folder(fleet.corpus)))
        manifest = load_corpus(fleet.corpus)
        if manifest is None:
            ensure_run(fleet, None, settings, initial)
            return False
        stamps = check_shards(fleet.corpus, manifest)
        ensure_run(fleet, manifest, settings, initial)
        fleet.corpus_held = held.pop_all()
    fleet.shard_stamps = stamps
    # Last: with a manifest the fleet gives out work.
    fleet.manifest = manifest
    return True
