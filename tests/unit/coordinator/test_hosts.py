"""Which Host headers name this server."""

from __future__ import annotations

import pytest

from coordinator.login.hosts import host_allowed

OURS = frozenset({"trainer.lan", "10.0.0.5", "fd00::5"})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LocalHost:9999",  # the far end of a tunnel
        "127.0.0.1",
        "127.0.0.1:1",
        "127.8.9.10:65535",
        "[::1]",
        "[::1]:8080",
        "[0:0:0:0:0:0:0:1]:8080",
    ],
)
def test_loopback_is_allowed_at_every_port(host: str) -> None:
    assert host_allowed(host, frozenset())


@pytest.mark.parametrize(
    "host", ["trainer.lan", "TRAINER.lan:8080", "10.0.0.5:80", "[fd00::5]:443"]
)
def test_names_of_the_settings_are_allowed_and_no_others(host: str) -> None:
    assert host_allowed(host, OURS)
    assert not host_allowed(host, frozenset())


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "localhost.evil.example",
        "evil.localhost",
        "localhost.",
        "trainer.lan.evil.example:8080",
        "xtrainer.lan",
        "128.0.0.1",
        "0.0.0.0:8080",
        "127.1",
        "0177.0.0.1",
        "2130706433",
        "::1",
        "[::2]:8080",
        "[::ffff:10.0.0.9]",
        "localhost:",
        "localhost:port",
        "localhost:123456",
        "localhost@evil.example",
        "localhost,evil.example",
        "localhost evil.example",
        "localhost\n",
        " localhost",
        "lоcalhost",  # noqa: RUF001 - a Cyrillic letter is the point
    ],
)
def test_everything_else_is_refused(host: str | None) -> None:
    assert not host_allowed(host, OURS)
