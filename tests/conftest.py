"""Before any test: one thread for a product of NumPy, as in a coordinator."""

from __future__ import annotations

import coordinator  # noqa: F401
