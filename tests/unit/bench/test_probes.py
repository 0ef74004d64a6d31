"""The C loops compile here and measure something."""

from __future__ import annotations

import numpy as np
import pytest

from tests.bench.probes import Probe, Probes


@pytest.fixture(scope="module")
def probes():
    return Probes()


def test_every_loop_of_this_cpu_counts_its_operations(probes):
    for probe in filter(probes.supported, Probe):
        seconds = probes.peak(probe, least_s=1e-3)()

        # Between one operation in 4 ns and 10,000 in one: the unit is right.
        assert 1e-4 < seconds < 4.0


def test_more_threads_than_cpus_are_refused(probes):
    supported = [probe for probe in Probe if probes.supported(probe)]
    if not supported:
        pytest.skip("no loop for this CPU")

    with pytest.raises(OSError, match="no 65 CPUs for 65 threads"):
        probes.peak(supported[0], threads=65, least_s=1e-3)()


def test_memcpy_is_timed(probes):
    assert probes.memcpy(1 << 12, least_s=1e-3)() > 0.0


def test_a_cold_call_is_made_as_often_as_asked(probes):
    calls = []
    run = probes.cold(lambda: calls.append(1), np.zeros(100), repeats=3)
    if run is None:
        pytest.skip("caches can't be emptied on this CPU")

    assert run() > 0.0
    assert len(calls) == 3
