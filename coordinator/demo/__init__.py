"""`make demo`: a coordinator and two workers train on this machine for some minutes."""

from __future__ import annotations
