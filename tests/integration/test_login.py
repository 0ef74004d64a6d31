"""Who may see the pages: password, session cookie, Host, XSRF, redirects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.login import passwords
from coordinator.login.handlers import CSP
from coordinator.login.sessions import ABSOLUTE_S, IDLE_S
from coordinator.login.throttle import FREE_TRIES, INTERVAL_S, MAX_WAIT_S
from tests.integration.page_server import (
    PASSWORD,
    SESSION,
    Browser,
    PageServer,
    Watcher,
    page_server,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    with page_server(tmp_path) as running:
        yield running


def test_a_stranger_is_sent_to_the_login_and_back_to_the_page(
    server: PageServer,
) -> None:
    browser = Browser(server)

    away = browser.get("/admin/dashboard")
    form = browser.get(away.headers["Location"])
    back = browser.log_in(next_path="/admin/dashboard")
    page = browser.get(back.headers["Location"])

    assert away.status == 302
    assert away.headers["Location"] == "/login?next=/admin/dashboard"
    assert form.status == 200
    assert 'value="/admin/dashboard"' in form.text
    assert back.status == 303
    assert page.status == 200
    assert "<title>dashboard</title>" in page.text


def test_the_root_leads_to_the_dashboard(server: PageServer) -> None:
    answer = Browser(server).get("/")

    assert answer.status == 302
    assert answer.headers["Location"] == "/admin/dashboard"


def test_an_operator_who_is_in_need_not_log_in_again(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()

    assert browser.get("/login").headers["Location"] == "/admin/dashboard"


@pytest.mark.parametrize("password", ["", "wrong", PASSWORD + " ", "x" * 5000])
def test_a_wrong_password_lets_nobody_in(server: PageServer, password: str) -> None:
    browser = Browser(server)

    answer = browser.log_in(password)

    assert answer.status == 403
    assert "Wrong password." in answer.text
    assert SESSION not in answer.cookies
    assert server.num_sessions() == 0


def test_guesses_have_to_wait_and_the_operator_at_their_address_gets_in(
    server: PageServer,
) -> None:
    server.clock.monotonic_at = 0.0
    browser = Browser(server)

    statuses = [browser.log_in("wrong").status for _ in range(FREE_TRIES + 4)]
    operator = browser.log_in(PASSWORD)

    assert statuses == [403] * (FREE_TRIES + 4)
    assert server.pauses == [3.0, 6.0, 9.0, 12.0, 15.0]
    assert operator.status == 303


def test_tries_beyond_those_that_wait_are_refused_for_seconds_only(
    server: PageServer,
) -> None:
    guesser, operator = Browser(server), Browser(server)
    operator.log_in()
    server.clock.monotonic_at = 0.0
    num_tries = FREE_TRIES + int(MAX_WAIT_S / INTERVAL_S)

    statuses = [guesser.log_in("wrong").status for _ in range(num_tries)]
    refused = guesser.log_in(PASSWORD)
    server.clock.monotonic_at = INTERVAL_S
    later = guesser.log_in(PASSWORD)

    assert statuses == [403] * num_tries
    assert (refused.status, refused.headers["Retry-After"]) == (429, "3")
    assert "Too many tries at once. Try again in 3 s." in refused.text
    assert operator.get("/admin/dashboard").status == 200
    assert later.status == 303


def test_while_too_many_passwords_are_checked_a_login_is_asked_to_come_back(
    server: PageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passwords, "MAX_WAITING", 0)

    answer = Browser(server).log_in()

    assert (answer.status, answer.headers["Retry-After"]) == (429, "3")


def test_the_session_cookie_is_hidden_from_scripts_and_other_sites(
    server: PageServer,
) -> None:
    answer = Browser(server).log_in()

    cookie = answer.cookies[SESSION]
    assert cookie["httponly"]
    assert cookie["samesite"] == "Lax"
    assert cookie["path"] == "/"
    assert not cookie["domain"]
    assert int(cookie["max-age"]) == ABSOLUTE_S


def test_the_xsrf_cookie_is_hidden_too(server: PageServer) -> None:
    cookie = Browser(server).get("/login").cookies["bitnet_xsrf"]

    assert cookie["httponly"]
    assert cookie["samesite"] == "Lax"


def test_behind_https_both_cookies_belong_to_this_host_alone(tmp_path: Path) -> None:
    with page_server(tmp_path, secure=True) as server:
        browser = Browser(server)
        form = browser.get("/login")
        token = browser.cookies["__Host-bitnet_xsrf"]
        answer = browser.post("/login", {"_xsrf": token, "password": PASSWORD})

    for cookie in (
        form.cookies["__Host-bitnet_xsrf"],
        answer.cookies[f"__Host-{SESSION}"],
    ):
        assert cookie["secure"]
        assert cookie["path"] == "/"
        assert not cookie["domain"]


def test_a_login_gives_a_new_session_and_ends_the_one_brought_along(
    server: PageServer,
) -> None:
    victim, thief = Browser(server), Browser(server)
    victim.log_in()
    old = victim.cookies[SESSION]
    thief.cookies[SESSION] = old

    victim.log_in()

    assert victim.cookies[SESSION] != old
    assert victim.get("/admin/dashboard").status == 200
    assert thief.get("/admin/dashboard").status == 302
    assert server.num_sessions() == 1


def test_two_coordinators_of_one_machine_do_not_log_each_other_out(
    server: PageServer, tmp_path: Path
) -> None:
    browser = Browser(server)
    browser.log_in()
    with page_server(tmp_path / "other", mark="two") as other:
        browser.server = other
        browser.log_in()
        assert browser.get("/admin/dashboard").status == 200
        browser.server = server
        assert browser.get("/admin/dashboard").status == 200


def test_a_planted_session_id_is_not_taken_over(server: PageServer) -> None:
    browser = Browser(server)
    browser.cookies[SESSION] = "A" * 43

    browser.log_in()

    assert browser.cookies[SESSION] != "A" * 43


def test_logout_ends_the_session_on_the_server_too(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()
    kept = browser.cookies[SESSION]

    answer = browser.log_out()
    browser.cookies[SESSION] = kept

    assert answer.status == 303
    assert answer.headers["Location"] == "/login"
    assert answer.cookies[SESSION].value == ""
    assert browser.get("/admin/dashboard").status == 302
    assert server.num_sessions() == 0


def test_a_session_ends_by_wall_time_when_idle(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()

    server.clock.wall_ahead = IDLE_S - 60
    assert browser.get("/admin/dashboard").status == 200
    server.clock.wall_ahead += IDLE_S - 60
    assert browser.get("/admin/dashboard").status == 200
    server.clock.wall_ahead += IDLE_S + 1

    assert browser.get("/admin/dashboard").status == 302


def test_a_session_ends_after_seven_days_of_use(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()

    while server.clock.wall_ahead < ABSOLUTE_S - IDLE_S:
        server.clock.wall_ahead += IDLE_S / 2
        assert browser.get("/admin/dashboard").status == 200
    server.clock.wall_ahead = ABSOLUTE_S

    assert browser.get("/admin/dashboard").status == 302


@pytest.mark.parametrize("token", [None, "", "2|00000000|00000000|1", "other"])
def test_a_login_without_the_token_of_our_form_is_refused(
    server: PageServer, token: str | None
) -> None:
    browser = Browser(server)
    browser.xsrf()
    form = {"password": PASSWORD} | ({} if token is None else {"_xsrf": token})

    answer = browser.post("/login", form)

    assert answer.status == 403
    assert SESSION not in answer.cookies
    assert server.num_sessions() == 0


def test_a_logout_without_the_token_changes_nothing(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()

    answer = browser.post("/logout", {})

    assert answer.status == 403
    assert browser.get("/admin/dashboard").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_is_refused_even_with_the_token(
    server: PageServer, headers: dict[str, str]
) -> None:
    browser = Browser(server)
    form = {"_xsrf": browser.xsrf(), "password": PASSWORD}

    assert browser.post("/login", form, **headers).status == 403
    assert server.num_sessions() == 0


@pytest.mark.parametrize(
    "wished",
    [
        "https://evil.example/",
        "//evil.example/admin/dashboard",
        "/\\evil.example",
        "\\\\evil.example",
        "/admin/../../evil",
        "/admin//evil.example",
        "/admin/dashboard?next=//evil.example",
        "/admin/dashboard\r\nX-Evil: 1",
        "javascript:alert(1)",
        "/logout",
        "admin/dashboard",
        "",
    ],
)
def test_the_login_never_leads_to_another_site(server: PageServer, wished: str) -> None:
    browser = Browser(server)

    answer = browser.log_in(next_path=wished)

    assert answer.status == 303
    assert answer.headers["Location"] == "/admin/dashboard"
    assert answer.headers["X-Evil"] is None


def test_the_login_leads_to_another_page_of_ours(server: PageServer) -> None:
    answer = Browser(server).log_in(next_path="/admin/task-browser")

    assert answer.headers["Location"] == "/admin/task-browser"


def test_what_a_visitor_wrote_is_not_put_into_the_page_as_html(
    server: PageServer,
) -> None:
    answer = Browser(server).get("/login?next=%22%3E%3Cscript%3Ealert(1)%3C/script%3E")

    assert answer.status == 200
    assert "<script" not in answer.text


@pytest.mark.parametrize(
    "path", ["/", "/login", "/admin/dashboard", "/static/css/app.css"]
)
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("127.0.0.1.evil.example:80", 421),
        ("", 400),
        (None, 400),
    ],
)
def test_a_foreign_host_is_refused_everywhere(
    server: PageServer, path: str, host: str | None, status: int
) -> None:
    assert Browser(server).get(path, Host=host).status == status


def test_a_foreign_host_can_not_log_in(server: PageServer) -> None:
    browser = Browser(server)
    form = {"_xsrf": browser.xsrf(), "password": PASSWORD}

    assert browser.post("/login", form, Host="evil.example").status == 421
    assert server.num_sessions() == 0


def test_a_request_of_old_without_a_host_is_refused(server: PageServer) -> None:
    with Watcher(Browser(server), Host=None) as watcher:
        assert watcher.status == 400


@pytest.mark.parametrize("host", ["localhost:9999", "trainer.lan", "[::1]:7"])
def test_the_page_works_through_a_tunnel(server: PageServer, host: str) -> None:
    browser = Browser(server)
    form = {"_xsrf": browser.xsrf(), "password": PASSWORD}

    answer = browser.post("/login", form, Host=host, Origin=f"http://{host}")

    assert answer.status == 303
    assert browser.get("/admin/dashboard", Host=host).status == 200


@pytest.mark.parametrize(
    "path", ["/", "/login", "/admin/dashboard", "/static/css/app.css", "/static/css/no"]
)
def test_every_answer_carries_the_security_headers(
    server: PageServer, path: str
) -> None:
    headers = Browser(server).get(path).headers

    assert headers["Content-Security-Policy"] == CSP
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Server"] is None


def test_an_error_carries_the_security_headers_too(server: PageServer) -> None:
    headers = Browser(server).post("/logout", {}).headers

    assert headers["Content-Security-Policy"] == CSP
    assert headers["Server"] is None


def test_styles_are_for_everybody(server: PageServer) -> None:
    answer = Browser(server).get("/static/css/app.css")

    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/css")
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.text == "body { color: black }"


@pytest.mark.parametrize(
    "path",
    [
        "/static/private.txt",
        "/static/login.html",
        "/static/dashboard.html",
        "/static/css",
        "/static/css/",
        "/static/css/../private.txt",
        "/static/css/%2e%2e/private.txt",
        "/static/css/..%2f..%2ffleet.db",
        "/static/css//etc/passwd",
    ],
)
def test_nothing_but_css_js_and_vendor_is_served(server: PageServer, path: str) -> None:
    answer = Browser(server).get(path)

    assert answer.status in (403, 404)
    assert "not for everybody" not in answer.text


def test_pages_are_not_kept_by_the_browser(server: PageServer) -> None:
    browser = Browser(server)
    browser.log_in()

    assert browser.get("/admin/dashboard").headers["Cache-Control"] == "no-store"
