"""One file for each step, never edited once it has landed."""

from __future__ import annotations
