"""Question: what does an acknowledged event cost over HTTP, beside a handler of the same app that does nothing?

The sidecar is a process of its own with its writer on, as users run it. One connection measures latency: both routes and
the blocking save_event of another process on the same log take turns in short blocks. Then many connections at once measure how
many requests are answered.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tests.fixtures.nats import NatsServer, free_port, wait_until

from .child import Child
from .conftest import versions
from .measure import ROUNDS, Call, Samples, collect, median_ratio, percentile, scaled, take_turns
from .report import NO_SYNC, NOT_A_WRITE, Report, rate
from .sides import PAYLOAD, save_event

CALLS = scaled(1000)
TOGETHER = scaled(6000)
CONNECTIONS = 32
QUESTION = f"Over HTTP ({ROUNDS} rounds of {CALLS} calls of each, one connection; then {CONNECTIONS} at once)"
EVENT, EMPTY, IN_PROCESS = (
    "POST events",
    "the same request, an empty handler",
    "save_event in another process",
)


class Connection:
    """One kept connection; a client that costs little, so that the server is what is measured."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(60)
        self._left = b""

    def post(self, path: str, body: object, token: str = "") -> bytes:
        """The answer's body; AssertionError unless the status is 200."""
        data = json.dumps(body).encode()
        lease = f"Skialith-Lease: {token}\r\n" if token else ""
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{lease}"
        self._socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        received = b""
        while (end := received.find(b"\r\n\r\n")) < 0:
            received += self._some()
        head_lines, answer = received[:end].lower(), received[end + 4 :]
        assert b" 200 " in head_lines[:20], received
        size = int(head_lines.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while len(answer) < size:
            answer += self._some()
        return answer

    def _some(self) -> bytes:
        data = self._socket.recv(65536)
        assert data, "the sidecar closed the connection"
        return data

    def close(self) -> None:
        self._socket.close()


@contextmanager
def poster(port: int, route: str, agent: str) -> Iterator[Call]:
    """One event after the other on a connection of its own, by the agent's owner."""
    connection = Connection(port)
    token = json.loads(connection.post(f"/agents/{agent}/resume", {}))["lease"]["token"]
    path, numbers, run = f"/agents/{agent}/{route}", itertools.count(), secrets.token_hex(4)
    try:
        yield lambda: connection.post(path, {"event_id": f"{run}-{next(numbers)}", "payload": PAYLOAD}, token)
    finally:
        connection.close()


def latencies(url: str, port: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each call of each side. Runs in a child."""
    with ExitStack() as stack:
        sides = {
            EVENT: stack.enter_context(poster(port, "events", "one")),
            EMPTY: stack.enter_context(poster(port, "empty", "none")),
            IN_PROCESS: stack.enter_context(save_event(url)),
        }
        return take_turns(sides, calls)


def answered(port: int, route: str, requests: int) -> float:
    """Requests per second of many connections at once, each with an agent of its own. Runs in a child."""
    with ExitStack() as stack:
        calls = [stack.enter_context(poster(port, route, f"many{n}")) for n in range(CONNECTIONS)]
        each = requests // CONNECTIONS

        def work(call: Call) -> None:
            for _ in range(each):
                call()

        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return each * CONNECTIONS / (time.perf_counter() - began)


@pytest.fixture
def served(nats: NatsServer, tmp_path: Path) -> Iterator[int]:
    """Port of a sidecar with both routes, on SQLite."""
    port = free_port()
    settings = {"SKIALITH_NATS_URL": nats.url, "SKIALITH_NAMESPACE": f"b{secrets.token_hex(6)}"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.sidecar_server", "serve", "--port", str(port)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **settings, "SKIALITH_DIRECTORY": str(tmp_path), "SKIALITH_WAL_BYTES": str(2**30)},
            stdout=log,
            stderr=log,
        )

    def up() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0 and "Skialith serves" in (tmp_path / "log").read_text()

    try:
        wait_until(up, 30, "the sidecar serves")
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_sidecar(benchmark: BenchmarkFixture, nats: NatsServer, served: int, report: Report) -> None:
    report.facts["sidecar"] = f"{versions('fastapi', 'uvicorn', 'httptools')}, one worker, its writer into SQLite"
    measured: dict[str, Samples] = {}
    rates: dict[str, list[float]] = {"events": [], "empty": []}
    with Child() as child:

        def take_round() -> None:
            collect(measured, child.run(latencies, nats.url, served, CALLS))
            for route, found in rates.items():
                found.append(child.run(answered, served, route, TOGETHER))

        benchmark.pedantic(take_round, rounds=ROUNDS, iterations=1)
    event, empty, local = (measured[name] for name in (EVENT, EMPTY, IN_PROCESS))
    parts = {percent: _sums(empty, local, percent) for percent in (50, 99)}
    over = {
        percent: median_ratio([percentile(each, percent) for each in event.rounds], parts[percent])
        for percent in (50, 99)
    }
    report.latency(QUESTION, EVENT, event, NO_SYNC, f"{over[50]:.2f} x the two below, p99 {over[99]:.2f} x")
    report.latency(QUESTION, EMPTY, empty, NOT_A_WRITE)
    report.latency(QUESTION, IN_PROCESS, local, NO_SYNC)
    share = f"{median_ratio(rates['events'], rates['empty']):.2f} x the empty handler"
    for route, name, ratio in (("events", EVENT, share), ("empty", EMPTY, "")):
        figure = rate(sorted(rates[route])[ROUNDS // 2], "requests")
        report.figure(
            QUESTION, f"{CONNECTIONS} connections: {name}", figure, NO_SYNC if route == "events" else NOT_A_WRITE, ratio
        )
    report.bar("http", over[50])


def _sums(one: Samples, other: Samples, percent: int) -> list[float]:
    return [percentile(a, percent) + percentile(b, percent) for a, b in zip(one.rounds, other.rounds, strict=True)]
