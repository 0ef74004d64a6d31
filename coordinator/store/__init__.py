"""All that lasts: SQLite through one writer thread, and blobs on disk."""

from __future__ import annotations
