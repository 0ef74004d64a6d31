"""The client of the load benchmark, and how its figures are made."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.bench.bench_load import _numbers, print_loads, report
from tests.bench.load import Closing, Load
from tests.bench.report import Figures
from tests.bench.talk import Connection


async def answers(*bodies: bytes, closes: bool = False) -> asyncio.Server:
    """Serve one body after another; `closes` ends each connection after one."""
    left = list(bodies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left and await reader.readuntil(b"\r\n\r\n"):
            body = left.pop(0)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            await writer.drain()
            if closes:
                break
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1")


async def ask_twice(*, closes: bool) -> list[bytes]:
    server = await answers(b"one", b"two", closes=closes)
    async with server:
        connection = Connection(server.sockets[0].getsockname()[1])
        said = []
        for _ in range(2):
            said.append((await connection.ask("GET", "/")).body)
            await asyncio.sleep(0)
        connection.close()
    return said


@pytest.mark.parametrize("closes", [False, True])
def test_a_connection_is_kept_and_made_anew_where_the_server_has_closed_it(closes):
    assert asyncio.run(ask_twice(closes=closes)) == [b"one", b"two"]


def test_what_is_only_counted_is_not_kept():
    async def ask():
        server = await answers(b"x" * 1_000_000)
        async with server:
            connection = Connection(server.sockets[0].getsockname()[1])
            answer = await connection.ask("GET", "/", count_only=True)
            connection.close()
        return answer

    answer = asyncio.run(ask())

    assert (answer.num_bytes, answer.body) == (1_000_000, b"")


@pytest.fixture
def a_load() -> Load:
    return Load(
        num_workers=2,
        round_s=10.0,
        seconds=20.0,
        closings=[
            Closing(took_s=12.0, close_s=1.0, stages={"judge_s": 0.5}),
            Closing(took_s=10.0, close_s=3.0, stages={"judge_s": 0.7}),
        ],
        num_rounds=2,
        num_tasks=4,
        claim_s=[0.1] * 99 + [5.0],
        heartbeat_s=[],
        submit_s=[0.2],
        scrape_s=[],
        lag_s=0.05,
        cpu_s=2.0,
        peak_bytes=2**20,
        database_bytes=4096,
        feed_bytes=400,
        refusals=Counter({"/gradient busy": 3}),
        num_expired=1,
    )


def test_tables_of_loads_say_what_was_refused(a_load, capsys):
    print_loads("tiny", [a_load])

    said = capsys.readouterr().out
    assert "## tiny: what it takes" in said
    assert "100.0 / 5000.0" in said
    assert "2 of 2  11.0 of 10" in said
    assert "3 /gradient busy" in said


def test_figures_of_a_load_are_of_its_tasks_and_seconds(a_load):
    figures = Figures(["tiny_2"])

    report(figures, "tiny", a_load)

    found = figures._values["tiny_2"]
    assert isinstance(found, dict)
    assert found["claim_p50_ms"] == 100.0
    assert found["claim_p99_ms"] == 5000.0
    assert found["heartbeat_p99_ms"] is None
    assert found["cpu_share"] == 0.1
    assert found["cpu_ms_a_task"] == 500.0
    assert found["close_s"] == 2.0
    assert found["judge_s"] == 0.6
    assert found["round_ratio"] == 1.1
    assert found["feed_bytes_a_s"] == 20
    assert found["database_bytes_a_task"] == 1024
    assert found["refusals"] == 3


def test_numbers_of_workers_are_whole_and_positive():
    assert _numbers("10 50") == [10, 50]
    for wrong in ("0", "ten", "1.5", "-3"):
        with pytest.raises(Exception, match="must be positive numbers, got"):
            _numbers(wrong)
