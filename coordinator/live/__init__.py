"""The live dashboard feed: hub, snapshot, websocket."""

from __future__ import annotations
