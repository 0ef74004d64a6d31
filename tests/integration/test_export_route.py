"""An operator downloads a version from the running coordinator; nobody else can."""

from __future__ import annotations

import http.client
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from bitnet_ext.exports.folder import open_export
from bitnet_ext.exports.provenance import Format, Variant
from coordinator.control import ResetPassword
from tests.integration.fleet import KEY, CoordinatorProcess, coordinator, make_corpus
from tests.integration.page_server import Browser

ROUTE = "/api/admin/export"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[CoordinatorProcess]:
    folder = tmp_path_factory.mktemp("fleet")
    make_corpus(folder / "corpus")
    with coordinator(folder) as process:
        yield process


@pytest.fixture(scope="module")
def operator(running: CoordinatorProcess) -> Browser:
    said = running.tell(ResetPassword())
    browser = Browser(running)  # type: ignore[arg-type]
    assert browser.log_in(said.rsplit(" ", 1)[1]).status == 303
    return browser


def asked(
    running: CoordinatorProcess, query: str, **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60.0)
    with closing(connection):
        connection.request("GET", ROUTE + query, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize(
    ("query", "form", "variant"),
    [
        ("?version=latest&format=gguf", Format.GGUF, Variant.TQ2_0),
        ("?version=1&format=hf&variant=packed", Format.HF, Variant.PACKED),
        ("?version=1&format=safetensors", Format.SAFETENSORS, Variant.MASTER),
    ],
)
def test_an_operator_gets_an_export_that_is_whole(
    running, operator, tmp_path, query, form, variant
) -> None:
    cookie = operator.cookie_header()

    status, headers, body = asked(running, query, Cookie=cookie)

    name = f"bitnet-tiny-v1-{form}-{variant}"
    assert status == 200
    assert headers["Content-Type"] == "application/x-tar"
    assert headers["Content-Disposition"] == f'attachment; filename="{name}.tar"'
    assert headers["Content-Length"] == str(len(body))
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        archive.extractall(tmp_path, filter="data")
    about = open_export(tmp_path / name).about
    assert (about.format, about.variant, about.weight_version) == (form, variant, 1)
    assert asked(running, query, Cookie=cookie)[2] == body
    assert not list(Path(running.data).glob(".export-*"))


@pytest.mark.parametrize("headers", [{}, {"X-Api-Key": KEY}, {"Cookie": "a=b"}])
def test_without_a_login_there_is_no_export(running, headers) -> None:
    status, _, body = asked(running, "?version=latest&format=gguf", **headers)

    assert status == 401
    assert json.loads(body)["code"] == "unauthorized"


def test_a_login_of_another_host_name_is_none(running, operator) -> None:
    cookie = operator.cookie_header()

    status, _, _ = asked(
        running, "?version=latest&format=gguf", Cookie=cookie, Host="evil.example"
    )

    assert status == 401


@pytest.mark.parametrize(
    ("query", "status", "code", "field"),
    [
        ("?version=9&format=hf", 404, "unknown_version", "version"),
        ("?version=best&format=hf", 404, "unknown_version", "version"),
        ("?version=-1&format=hf", 400, "bad_request", "version"),
        ("?version=../1&format=hf", 400, "bad_request", "version"),
        ("?version=1&format=onnx", 400, "bad_request", "format"),
        ("?version=1&format=hf&variant=TQ1_0", 400, "bad_request", "variant"),
        ("?version=1", 400, "bad_request", "format"),
        ("?format=hf", 400, "bad_request", "version"),
        ("", 400, "bad_request", "version"),
    ],
)
def test_a_wrong_wish_is_refused_with_its_field(
    running, operator, query, status, code, field
) -> None:
    answer = asked(running, query, Cookie=operator.cookie_header())

    refused = json.loads(answer[2])
    assert (answer[0], refused["code"], refused.get("field")) == (status, code, field)
