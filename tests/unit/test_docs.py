"""The docs name everything that can be typed, set, asked for or read in an answer."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from enum import StrEnum
from pathlib import Path

import pytest
from msgspec import Struct
from tornado.web import RequestHandler

import coordinator.api.metrics
import coordinator.cli
import worker.cli
import worker.settings
from bitnet_ext.ternary import ISA_VARIABLE
from bitnet_ext.wire import messages, verdicts
from coordinator.api.base import STATUS
from coordinator.api.exports import export_routes
from coordinator.api.files import file_routes
from coordinator.api.gradient import gradient_routes
from coordinator.api.status import status_routes
from coordinator.api.workers import worker_routes
from coordinator.app import DATABASE_NAME, KEY_NAME
from coordinator.control import SOCKET_NAME
from coordinator.domain.plan import TrainingPlan
from coordinator.live.socket import live_route
from coordinator.login.handlers import page_routes
from coordinator.service import view
from coordinator.settings import PREFIX, CoordinatorSettings
from coordinator.store.blobs import BlobKind
from coordinator.store.lock import LOCK_NAME
from coordinator.store.tables import metadata

ROOT = Path(__file__).parents[2]
FILES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
DOCS = "\n".join(path.read_text() for path in FILES)
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
# Routes of `webui/` take a path, those of a worker an id; in the table both are groups.
PARAMETERS = {
    "/tasks/": "{task_id}",
    "/weights/": "{version}",
    "/corpus/": "{shard_id}",
    "/static/": "{path}",
}


def doc(name):
    return (ROOT / "docs" / name).read_text()


def names(module, base):
    return [
        found
        for _, found in inspect.getmembers(module, inspect.isclass)
        if issubclass(found, base) and found.__module__ == module.__name__
    ]


def verbs(parser):
    (commands,) = (
        action
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return commands.choices


def commands():
    """Return (program, verb, its options) of both programs."""
    for program, parser in (
        ("bitnet-coordinator", coordinator.cli._parser()),
        ("bitnet-worker", worker.cli._parser()),
    ):
        for verb, its in verbs(parser).items():
            options = {
                name for action in its._actions for name in action.option_strings
            }
            yield program, verb, options - {"-h", "--help"}


def routes():
    """Return every `METHOD /path` that the coordinator answers."""
    nobody = object()
    table = [
        *worker_routes(nobody),
        *gradient_routes(nobody),
        *file_routes(nobody),
        *export_routes(nobody),
        *status_routes(nobody),
        *page_routes(nobody),
        live_route(nobody),
    ]
    return sorted(
        f"{method.upper()} {written(pattern)}"
        for pattern, handler, _ in table
        for method in ("get", "post", "put", "patch", "delete")
        if getattr(handler, method) is not getattr(RequestHandler, method)
    )


def written(pattern):
    start = next((name for name in PARAMETERS if pattern.startswith(name)), "")
    return re.sub(r"\([^)]*\)", PARAMETERS.get(start, "?"), pattern)


def rows(text):
    """Return the cells of each table row that starts with a word in backticks."""
    found = re.findall(r"^\| `([^`]+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def settings():
    """Return each variable of the coordinator with its default."""
    given = CoordinatorSettings.from_env({})
    for name in CoordinatorSettings.__slots__:
        if name != "plan":
            yield PREFIX + name.upper(), getattr(given, name)
    for name in TrainingPlan.__struct_fields__:
        yield PREFIX + name.upper(), getattr(given.plan, name)


def worker_settings():
    source = inspect.getsource(worker.settings.WorkerSettings.from_env)
    source += inspect.getsource(worker.settings)
    return sorted({ISA_VARIABLE, *re.findall(r'"(BITNET_[A-Z_]+)"', source)})


@pytest.mark.parametrize(("program", "verb", "options"), list(commands()))
def test_a_command_and_its_options_are_documented(program, verb, options):
    row = re.search(rf"^\| `{program} {verb}\b.*$", doc("operations.md"), re.MULTILINE)

    assert row is not None
    everywhere = {"--data", "--corpus"} if program == "bitnet-coordinator" else set()
    assert [o for o in sorted(options - everywhere) if f"`{o}`" not in row[0]] == []


@pytest.mark.parametrize(("variable", "default"), list(settings()))
def test_a_setting_of_the_coordinator_is_documented_with_its_default(variable, default):
    shown = rows(doc("operations.md"))[variable][0].strip("`")

    match default:
        case bool():
            assert shown == str(default).lower()
        case int() | float():
            assert float(shown) == default
        case None | frozenset():
            assert shown == "-"
        case _:
            assert shown == str(default)


@pytest.mark.parametrize("variable", worker_settings())
def test_a_setting_of_a_worker_is_documented(variable):
    assert variable in rows(doc("operations.md"))


def test_no_setting_is_documented_that_does_not_exist():
    known = {name for name, _ in settings()} | set(worker_settings())

    assert set(re.findall(r"BITNET_[A-Z0-9_]+[A-Z0-9]", DOCS)) <= known


@pytest.mark.parametrize("route", routes())
def test_a_route_is_documented(route):
    assert f"`{route}`" in doc("protocol.md")


def test_no_route_is_documented_that_does_not_exist():
    assert set(re.findall(r"`((?:GET|POST|PUT) /[^` ]*)`", DOCS)) <= set(routes())


@pytest.mark.parametrize(("code", "status"), list(STATUS.items()))
def test_an_error_code_is_documented_with_its_status(code, status):
    assert rows(doc("protocol.md"))[code][0] == str(status)


def test_every_error_code_has_a_status():
    assert set(STATUS) == set(verdicts.ErrorCode)


@pytest.mark.parametrize("enum", names(verdicts, StrEnum))
def test_the_words_of_an_enum_are_documented(enum):
    text = doc("states.md") + doc("protocol.md")

    assert [word for word in enum if f"`{word}`" not in text] == []


@pytest.mark.parametrize("message", names(messages, Struct))
def test_the_fields_of_a_message_are_documented(message):
    text = doc("protocol.md")
    # The shape of an error is written out as one piece of JSON.
    quotes = '"' if message is messages.ErrorBody else "`"

    assert [
        field
        for field in message.__struct_fields__
        if f"{quotes}{field}{quotes}" not in text
    ] == []


@pytest.mark.parametrize("part", [view.TrainingView, view.LastRoundView])
def test_the_fields_of_how_a_run_trains_are_documented(part):
    text = doc("protocol.md").partition("### How a run trains")[2]
    section = text.partition("\n### ")[0]

    assert [name for name in part.__struct_fields__ if f"`{name}`" not in section] == []


@pytest.mark.parametrize("table", sorted(metadata.tables))
def test_a_table_is_documented(table):
    assert table in rows(doc("architecture.md"))


def test_the_files_of_the_data_folder_are_documented():
    files = [DATABASE_NAME, KEY_NAME, SOCKET_NAME, LOCK_NAME]
    files += [f"{kind}/" for kind in BlobKind]

    assert [name for name in files if f"`{name}`" not in doc("operations.md")] == []


def test_the_events_of_the_live_feed_are_documented():
    kinds = said_in_the_code(r'publish\(\s*"([a-z]+\.[a-z_]+)"')

    assert kinds
    assert kinds <= set(rows(doc("protocol.md")))


def test_the_events_that_are_stored_are_documented():
    kinds = said_in_the_code(r'kind="([a-z]+\.[a-z_]+)"')

    assert kinds
    assert [kind for kind in kinds if f"`{kind}`" not in doc("architecture.md")] == []


def said_in_the_code(pattern):
    sources = (ROOT / "coordinator").rglob("*.py")
    return {word for path in sources for word in re.findall(pattern, path.read_text())}


def test_the_metrics_are_documented():
    source = inspect.getsource(coordinator.api.metrics)
    metrics = set(re.findall(r'"(fleet_[a-z_]+)"', source))

    assert metrics
    assert [name for name in sorted(metrics) if f"`{name}`" not in DOCS] == []


@pytest.mark.parametrize(
    "target", re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
)
def test_a_make_target_is_documented(target):
    assert f"make {target}" in rows((ROOT / "CONTRIBUTING.md").read_text())


@pytest.mark.parametrize("variable", re.findall(r"(?m)^([A-Z_]+) \?=", MAKEFILE))
def test_a_variable_of_make_is_documented(variable):
    assert variable in rows(README)


@pytest.mark.parametrize(
    "reference",
    sorted(
        set(
            re.findall(
                r"`((?:bitnet_ext|coordinator|worker|webui)/[\w/]+\.\w+) ([\w.]+)`",
                DOCS,
            )
        )
    ),
    ids=" ".join,
)
def test_a_function_that_the_docs_name_exists(reference):
    path, name = reference
    source = (ROOT / path).read_text()

    if path.endswith(".js"):
        assert re.search(rf"^(export function |  (async )?){name}\(", source, re.M)
        return
    scope = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in scope if getattr(node, "name", None) == part]
        assert found, f"{path} has no {name}"
        scope = found[0].body


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)

    assert [link for link in links if not leads_somewhere(path, link)] == []


def leads_somewhere(path, link):
    if link.startswith("https://"):
        return True
    file, _, anchor = link.partition("#")
    target = path.parent / file if file else path
    if not target.resolve().is_relative_to(ROOT) or not target.exists():
        return False
    return not anchor or anchor in anchors(target)


def anchors(path):
    """Return what the headings of a file are called in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}


def test_every_page_is_reachable_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        pages = sorted(path.glob("*.md")) if path.is_dir() else []
        links = [] if pages else re.findall(r"\]\(([^)#\s]+)", path.read_text())
        waiting += pages
        waiting += [
            (path.parent / link).resolve()
            for link in links
            if not link.startswith("https://") and link.endswith((".md", "/"))
        ]

    assert [path for path in FILES if path not in seen] == []
