"""What workers get of a new version: all of the master weights, or the next link."""

from __future__ import annotations

import logging

from bitnet_ext.chain import next_link
from bitnet_ext.codecs import Codec, NonFiniteError
from bitnet_ext.wire.messages import EXACT
from coordinator.service.version_blobs import (
    Link,
    Published,
    ServerState,
    read_published,
)
from coordinator.store.blobs import Blobs

log = logging.getLogger(__name__)


def publication(
    blobs: Blobs,
    state: ServerState,
    *,
    base_version: int,
    known: Published | None,
    broadcast: str,
) -> Published:
    """Return what is published of a server state. Blocking.

    `known`, which stays as it is, saves reading the base version where it is that.
    A difference that no link can hold is published whole. Raises OSError, FrameError
    or PayloadError where the published frame of the base version does not help.
    """
    whole = Published(version=state.version, weights=state.weights)
    if broadcast == EXACT:
        return whole
    if known is not None and known.version == base_version:
        weights = known.weights.copy()
    else:
        weights = read_published(blobs, base_version)
    codec = Codec(broadcast)
    try:
        payload = next_link(codec, state.weights, weights)
    except NonFiniteError as error:
        log.warning(
            "version %d is published whole, no link leads there: %s",
            state.version,
            error,
            extra={"event": "version.whole", "version": state.version},
        )
        return whole
    return Published(version=state.version, weights=weights, link=Link(codec, payload))
