"""Who the operator is: password, sessions, and the one door to the pages."""

from __future__ import annotations
