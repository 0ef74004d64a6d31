"""Runs a test once for each kernel variant that this machine has."""

from __future__ import annotations

import pytest

from bitnet_ext.ternary import active_isa, choose_isa, supported_isas


@pytest.fixture(params=supported_isas())
def isa(request):
    """The name of the variant that runs for the length of the test."""
    before = active_isa()
    choose_isa(request.param)
    yield request.param
    choose_isa(before)
