"""The variant of the kernels is chosen whichever door is opened first."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bitnet_ext.isa import ISA_VARIABLE, supported_isas

LOOK = "; from bitnet_ext import _kernels; print(_kernels.selected_isa())"


@pytest.mark.parametrize("door", ["codecs", "packing", "half", "outer", "ternary"])
@pytest.mark.parametrize("told", [None, "portable"])
def test_every_door_runs_the_fastest_variant_or_the_one_told(door, told):
    usual = {k: v for k, v in os.environ.items() if k != ISA_VARIABLE}
    chosen = {} if told is None else {ISA_VARIABLE: told}

    done = subprocess.run(
        [sys.executable, "-c", f"import bitnet_ext.{door}{LOOK}"],
        env=usual | chosen,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert done.stdout.strip() == (told or supported_isas()[-1])
