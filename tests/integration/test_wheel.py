"""The wheel as a stranger gets it: built, installed into an empty venv, looked into."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
#: The C library's own parts; any other would have to be shipped or asked for.
SYSTEM_LIBRARIES = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libm.so.6",
    "libpthread.so.0",
}


def run(*command, **options):
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the script that also builds the released one."""
    folder = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable}

    printed = run("bash", ROOT / "ci/wheel.sh", env=environment)

    return Path(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def names(wheel):
    """The paths of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An interpreter that has the wheel, NumPy and msgspec, and nothing else."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pins = folder / "pins.txt"
    pins.write_text(locked("numpy") + locked("msgspec"))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install")
    # Nothing here lives long enough to pay for byte code.
    pip += ("--quiet", "--no-deps", "--no-compile")
    run(*pip, "--only-binary=:all:", "--require-hashes", "-r", pins)
    run(*pip, "--no-index", wheel)
    return folder / "bin/python"


def locked(package):
    """Return the pin of a package with its hashes, as the lock has it."""
    text = (ROOT / "ci/requirements.lock").read_text()
    found = re.search(rf"^{package}==.*(?:\n    --hash=.*)+", text, re.MULTILINE)
    return found[0] + "\n"


def test_one_wheel_serves_every_python_from_3_11_on(wheel, names):
    assert re.fullmatch(r"bitnet_fleet-[\d.]+-cp311-abi3-\w+_x86_64\.whl", wheel.name)
    assert {name for name in names if name.endswith(".so")} == {
        "bitnet_ext/_kernels.abi3.so"
    }


def test_the_top_level_names_are_the_four_folders(names):
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}

    assert top == {"bitnet_ext", "coordinator", "worker", "webui"}


def test_sources_of_the_extension_stay_out(names):
    assert not [name for name in names if name.endswith((".c", ".h", ".pyx"))]


def test_every_file_of_the_page_is_in_the_wheel(names):
    page = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "webui").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    assert {name for name in names if name.startswith("webui/")} == page
    assert "webui/dashboard.html" in page


def test_every_migration_and_type_marker_is_in_the_wheel(names):
    migrations = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "coordinator/store/migrations").rglob("*.py")
    }

    assert len(migrations) > 2
    assert migrations <= names
    assert {
        f"{name}/py.typed" for name in ("bitnet_ext", "coordinator", "worker")
    } <= names


def test_the_kernels_load_where_neither_torch_nor_openmp_is(python, tmp_path):
    code = (
        "import importlib.util, bitnet_ext.ternary\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(bitnet_ext.ternary.__file__)\n"
        "print(open('/proc/self/maps').read())\n"
    )

    printed = run(python, "-I", "-c", code, cwd=tmp_path)

    module, maps = printed.split("\n", 1)
    assert module.startswith(str(python.parents[1]))
    assert "_kernels.abi3.so" in maps
    assert "libgomp" not in maps
    assert "libiomp" not in maps


def test_the_kernels_need_only_the_c_library(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("bitnet_ext/_kernels.abi3.so", tmp_path)

    printed = run("readelf", "--dynamic", "--wide", library)

    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", printed))
    assert "libc.so.6" in needed
    assert needed <= SYSTEM_LIBRARIES


def test_the_base_install_brings_no_torch_and_no_server(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().splitlines()

    needs = [line for line in lines if line.startswith("Requires-Dist:")]
    base = {re.split(r"[ <>=!]", need)[1] for need in needs if "extra ==" not in need}
    assert base == {"numpy", "msgspec"}
