"""Runs the tests of the page's own modules, and checks their data by the contract."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from coordinator.service.view import FleetView

HERE = Path(__file__).parent
#: The first that takes a `.js` file with imports for a module without being told so.
OLDEST_NODE = (20, 19)
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def node() -> str:
    path = shutil.which("node")
    if path is None:
        pytest.skip("node is not installed: the page's modules are not tested")
    answer = subprocess.run([path, "--version"], capture_output=True, text=True)
    found = re.fullmatch(r"v(\d+)\.(\d+)\..*", answer.stdout.strip())
    assert found is not None
    if (int(found[1]), int(found[2])) < OLDEST_NODE:
        pytest.skip(f"node {answer.stdout.strip()} is older than v20.19")
    return path


def test_the_modules_of_the_page_pass_their_tests(node):
    files = sorted(HERE.glob("*.test.mjs"))
    assert files

    done = subprocess.run(
        [node, "--test", *files], capture_output=True, text=True, timeout=TIMEOUT_S
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_views_of_those_tests_have_the_shape_that_the_coordinator_sends(node):
    done = subprocess.run(
        [node, HERE / "fleet.mjs"], capture_output=True, check=True, timeout=TIMEOUT_S
    )

    view = msgspec.json.decode(done.stdout, type=FleetView)

    # Nothing was left out in decoding either: no field of the tests is invented.
    assert msgspec.to_builtins(view) == msgspec.json.decode(done.stdout)
