"""What the page ships: vendored files are as noted, nothing is inline or from afar."""

from __future__ import annotations

import hashlib
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from coordinator.login.handlers import STATIC_FOLDERS

ROOT = Path(__file__).parents[2]
WEBUI = ROOT / "webui"
MAX_BYTES = 250_000
MAX_LINES = 250
SHIPPED = sorted(
    path
    for path in WEBUI.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".pyc")
)
OURS = [path for path in SHIPPED if path.parent.name != "vendor"]
PAGES = [path for path in OURS if path.suffix == ".html"]
MODULES = [path for path in OURS if path.suffix == ".js"]
VENDOR = WEBUI / "vendor"


def name(path):
    return str(path.relative_to(WEBUI))


def vendored():
    """Return {file name: hash} as VERSIONS.md has it."""
    rows = re.findall(
        r"^\| (\S+) \| .+ \| ([0-9a-f]{64}) \|$",
        (VENDOR / "VERSIONS.md").read_text(),
        re.MULTILINE,
    )
    return dict(rows)


def test_every_vendored_file_is_the_one_that_was_noted():
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.iterdir()
        if path.name != "VERSIONS.md"
    }

    assert found == vendored()


def test_the_versions_are_those_of_the_script():
    script = (ROOT / "ci/vendor.sh").read_text()
    pins = set(re.findall(r"^\w+=(\d+\.\d+\.\d+)$", script, re.MULTILINE))

    noted = set(re.findall(r"-(\d+\.\d+\.\d+)\.", " ".join(vendored())))

    assert noted == pins


def test_the_page_stays_small():
    assert sum(path.stat().st_size for path in SHIPPED) < MAX_BYTES


def test_every_file_is_in_the_package_data():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = setup["tool"]["setuptools"]["package-data"]["webui"]

    def ships(path):
        # As setuptools globs: a star stays within one folder.
        parts = name(path).split("/")
        return any(
            len(parts) == len(pattern.split("/"))
            and all(map(fnmatch, parts, pattern.split("/")))
            for pattern in patterns
        )

    assert [name(path) for path in SHIPPED if not ships(path)] == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_page_has_nothing_inline(path):
    text = path.read_text()

    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", text) == []
    for attributes, body in re.findall(r"<script([^>]*)>(.*?)</script>", text, re.S):
        assert "src=" in attributes
        assert body == ""


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_module_makes_no_markup_and_no_code_out_of_text(path):
    text = path.read_text()

    banned = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
    )
    assert re.findall(banned, text) == []
    assert re.findall(r"""<style|\sstyle=["'`]|\son\w+=["'`]""", text) == []
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", OURS, ids=name)
def test_nothing_is_fetched_from_another_host(path):
    assert re.findall(r"https?://|[\"'(]//\w", path.read_text()) == []


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=name)
def test_what_a_file_refers_to_is_there(path):
    text = path.read_text()
    asked = re.findall(r"""(?:src|href)="(/[^"]+)\"""", text)
    imported = re.findall(r"""\bfrom "([^"]+)\"""", text)

    for address in asked:
        served = address.removeprefix("/static/")
        assert served.split("/")[0] in STATIC_FOLDERS
        assert (WEBUI / served).is_file(), address
    for address in imported:
        assert address.startswith("."), address
        assert (path.parent / address).is_file(), address


def test_vendored_modules_import_each_other_by_path():
    for path in VENDOR.glob("*.js"):
        for address in re.findall(r'\bfrom ?"([^"]+)"', path.read_text()):
            assert (VENDOR / address).is_file(), (path.name, address)


def test_a_link_leads_only_to_what_exists():
    for path in PAGES:
        for address in re.findall(
            r'<(?:a|form)[^>]*(?:href|action)="([^"]+)"', path.read_text()
        ):
            assert address in ("#main", "/login", "/logout")
