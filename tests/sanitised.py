"""`make test-asan`: the tests of all kernels under AddressSanitizer and UBSan.

Builds the extension into a folder of its own with gcc's sanitisers, and runs the tests
there with their library loaded first. A read or write past an end, or an operation
that C does not define, ends the run with a report. Prints a table and, as its last
line, the figures as JSON; exits with 1 unless everything passed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "build" / "asan"
#: What the build and the tests need.
SOURCES: Final = ("bitnet_ext", "tests", "setup.py", "pyproject.toml", "README.md")
TESTS: Final = ("tests/unit/bitnet_ext", "tests/contract/test_golden_frames.py")
FLAGS: Final = (
    "-fsanitize=address,undefined -fno-sanitize-recover=undefined "
    "-fno-omit-frame-pointer -g"
)
#: Asks the process that runs the tests whether the sanitiser is really there.
LOOK: Final = (
    "import ctypes, bitnet_ext._kernels as k; from pathlib import Path; "
    "assert b'__asan_report_load' in Path(k.__file__).read_bytes(), 'not built so'; "
    "ctypes.CDLL(None).__asan_address_is_poisoned; print(*k.supported_isas())"
)


def main() -> int:
    """Build, run, print; return the exit status."""
    compiler = shlex.split(os.environ.get("CC", "gcc"))
    _copy()
    _build(compiler)
    environment = _environment(compiler)
    variants = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=FOLDER,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    report = FOLDER / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *TESTS], cwd=FOLDER, env=environment
    )
    files = _counts(report)
    _print(files, variants)
    tests = sum(row["tests"] for row in files.values())
    failed = sum(row["failed"] for row in files.values())
    clean = done.returncode == 0 and tests > 0 and failed == 0
    figures = {"asan_tests": tests, "asan_failed": failed, "asan_clean": clean}
    print(json.dumps(figures | {"asan_variants": variants}), flush=True)
    return 0 if clean else 1


def _copy() -> None:
    """Copy the sources, and nothing that was built from them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_kernels.c")
    for name in SOURCES:
        source, target = ROOT / name, FOLDER / name
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy2(source, target)


def _build(compiler: list[str]) -> None:
    """Build in place; raises CalledProcessError after the compiler's words."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=FOLDER,
        env=os.environ
        | {"CC": shlex.join(compiler), "CFLAGS": FLAGS, "LDFLAGS": FLAGS},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _environment(compiler: list[str]) -> dict[str, str]:
    """Return the environment of a Python whose memory the sanitiser watches."""
    libraries = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python keeps much until it ends; and its own pools would hide ends.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(FOLDER),
    }


def _counts(report: Path) -> dict[str, Counter[str]]:
    """Return tests, failures and milliseconds of each file; nothing after a crash."""
    files: dict[str, Counter[str]] = {}
    if not report.exists():
        return files
    for case in ET.parse(report).iter("testcase"):
        row = files.setdefault(case.get("classname", "").rpartition(".")[2], Counter())
        row["tests"] += 1
        row["failed"] += any(case.find(tag) is not None for tag in ("failure", "error"))
        row["ms"] += round(1e3 * float(case.get("time", 0)))
    return files


def _print(files: dict[str, Counter[str]], variants: list[str]) -> None:
    print(f"\n## Kernels under AddressSanitizer and UBSan: {', '.join(variants)}")
    print(f"{'file':24}{'tests':>8}{'failed':>8}{'seconds':>9}")
    for name, row in sorted(files.items()):
        seconds = row["ms"] / 1e3
        print(f"{name:24}{row['tests']:8}{row['failed']:8}{seconds:9.1f}")


if __name__ == "__main__":
    sys.exit(main())
