"""Before any test: one thread for a product of NumPy, as in a coordinator."""

from __future__ import annotations

from hypothesis import settings

import coordinator  # noqa: F401

# Machines are shared, and kernels under a sanitiser slow: time decides no test.
settings.register_profile("fleet", deadline=None)
settings.load_profile("fleet")
