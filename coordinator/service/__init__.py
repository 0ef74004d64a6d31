"""Use cases: one transaction each, then its events."""

from __future__ import annotations
