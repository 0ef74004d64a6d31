"""With the sign of the outer step turned round, the sign tests must fail.

They run again in processes of their own, against a coordinator that walks uphill.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from tests.integration.fleet import MODULE_VARIABLE, ROOT

HERE = "tests/integration"
FILES = ("test_signs", "test_fleet")
UPHILL = "tests.integration.uphill_coordinator"
MUST_FAIL = {
    "test_the_new_weights_are_the_trained_ones",
    "test_through_int8_they_are_off_by_half_a_quantisation_step",
    "test_one_step_lowers_the_loss_of_its_own_batch",
    "test_the_new_weights_are_one_step_down_the_gradient",
    "test_one_gradient_step_lowers_the_loss_of_its_own_batch",
    "test_the_held_out_loss_falls",
}
MUST_PASS = {"test_both_workers_took_part"}


def test_a_wrong_sign_is_caught(tmp_path: Path) -> None:
    chosen = " or ".join(MUST_FAIL | MUST_PASS)
    reports = [tmp_path / f"{name}.xml" for name in FILES]

    # Side by side: each file mostly waits for processes of its own.
    running = [
        subprocess.Popen(
            [
                *[sys.executable, "-m", "pytest", f"{HERE}/{name}.py", "-k", chosen],
                *[f"--junitxml={report}", f"--basetemp={tmp_path / name}"],
            ],
            cwd=ROOT,
            env={**os.environ, MODULE_VARIABLE: UPHILL},
            stdout=subprocess.DEVNULL,
        )
        for name, report in zip(FILES, reports, strict=True)
    ]
    for process in running:
        process.wait(600.0)

    cases: dict[str, list[set[str]]] = {}
    for report in reports:
        for case in ET.parse(report).iter("testcase"):
            name = str(case.get("name")).partition("[")[0]
            cases.setdefault(name, []).append({child.tag for child in case})
    assert cases.keys() == MUST_FAIL | MUST_PASS
    for name in MUST_FAIL:
        # With each codec where there are several.
        assert all("failure" in found for found in cases[name]), name
    for name in MUST_PASS:
        assert not any(found & {"failure", "error"} for found in cases[name]), name
