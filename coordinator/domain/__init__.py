"""Pure rules: no I/O, no clock, no SQL; time and randomness are arguments."""

from __future__ import annotations
