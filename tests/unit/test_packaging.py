"""What builds and ships the project says what it should, and no secret."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    ".ci/run",
    "ci/image.sh",
    "ci/lock.sh",
    "ci/vendor.sh",
    "ci/wheel.sh",
]
DOCKERFILE = (ROOT / "Dockerfile.worker").read_text()
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()


def instructions():
    """Return (word, rest) of each instruction of the Dockerfile, lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line]


def final_stage():
    found = instructions()
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    return found[start:]


def values(word, of=None):
    return [rest for name, rest in of or instructions() if name == word]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash_that_stops_at_the_first_error(script):
    text = (ROOT / script).read_text()

    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_ci_runs_as_a_program():
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_the_workflow_calls_only_the_three_scripts():
    called = re.findall(r"run: (.+)", WORKFLOW)

    assert set(called) == {"bash .ci/run", "bash ci/wheel.sh", "bash ci/image.sh"}


def test_the_workflow_may_only_read_but_for_the_image():
    assert re.search(r"^permissions:\n  contents: read\n\n", WORKFLOW, re.MULTILINE)
    assert re.findall(r"(\w+): write", WORKFLOW) == ["packages"]


def test_actions_are_pinned_by_commit():
    used = re.findall(r"uses: (\S+)(.*)", WORKFLOW)

    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment)


def test_an_image_is_pushed_for_tags_only():
    assert (
        "PUSH: ${{ startsWith(github.ref, 'refs/tags/v') && '1' || '0' }}" in WORKFLOW
    )


def test_no_secret_is_baked_into_the_image():
    set_up = " ".join(values("ENV") + values("ARG") + values("LABEL")).upper()

    assert not re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", set_up)


def test_the_image_runs_the_worker_as_an_ordinary_user():
    stage = final_stage()

    assert values("USER", stage) == ["10001:10001"]
    assert values("ENTRYPOINT", stage) == ['["bitnet-worker", "run"]']
    assert values("STOPSIGNAL", stage) == ["SIGTERM"]
    words = [word for word, _ in stage]
    assert words.index("RUN") < words.index("USER") < words.index("ENTRYPOINT")


def test_the_image_takes_only_what_a_worker_needs():
    (install,) = values("RUN", final_stage())

    assert "--no-index" in install
    assert '"bitnet-fleet[worker]"' in install
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]["worker"]
    assert not [need for need in extra if "tokenizers" in need]


def test_the_image_installs_the_torch_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()

    (pin,) = re.findall(r"^TORCH := (\S+)$", makefile, re.MULTILINE)

    assert f"TORCH={pin}" in values("ARG")


@pytest.mark.parametrize(("age", "healthy"), [(0, True), (100, True), (200, False)])
def test_health_goes_by_the_age_of_the_beacon(tmp_path, age, healthy):
    beacon = tmp_path / "beacon"
    beacon.touch()
    modified = beacon.stat().st_mtime - age
    os.utime(beacon, (modified, modified))

    assert (health(beacon) == 0) is healthy


def test_a_worker_without_a_beacon_is_not_healthy(tmp_path):
    assert health(tmp_path / "none") != 0


def health(beacon):
    """Run the image's health check on this machine; return its exit code."""
    (check,) = values("HEALTHCHECK", final_stage())
    _, code = re.findall(r'"((?:-c)|(?:import .+))"', check)
    environment = {**os.environ, "BITNET_HEALTH_BEACON": str(beacon)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True).returncode


def test_the_image_is_built_from_named_files_only():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}

    assert rules[0] == "*"
    copied = [shlex.split(rest)[:-1] for rest in values("COPY")]
    assert {source for sources in copied for source in sources} == allowed


def test_an_image_without_an_engine_ends_with_three_and_one_line():
    done = subprocess.run(
        ["bash", ROOT / "ci/image.sh"],
        env={**os.environ, "ENGINE": "no-such-engine"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "image.sh: no container engine works here (tried: no-such-engine)"
    ]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)

    done = subprocess.run(
        ["make", "--no-print-directory", "-C", ROOT, "help"],
        capture_output=True,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")},
    )

    listed = {line.split()[0] for line in done.stdout.splitlines()}
    assert listed == set(phony.split())
