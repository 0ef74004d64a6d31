"""Claims a task, trains it, submits the pseudo-gradient. Never imports coordinator."""

from __future__ import annotations
