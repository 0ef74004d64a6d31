"""The worker API over HTTP: parse, call, reply."""

from __future__ import annotations
