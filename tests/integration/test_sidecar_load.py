"""Hundreds of agents at a sidecar at once, and a sidecar at its limits: all are answered, and it goes on."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from skialith.config import AWAITED_THREADS
from tests.fixtures.nats import wait_until
from tests.fixtures.sidecar import Sidecar, sidecar

WAL = {"SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}
AGENTS = 500
EVENTS = 4
"""One by one; as many again come as a batch."""
MOST_MORE_MIB = 150
"""What serving them may add to the sidecar's memory."""


class Connection:
    """One agent's connection, kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and document."""
        text = b"" if body is None else json.dumps(body).encode()
        fields = {"Host": "localhost", "Content-Length": str(len(text)), **headers}
        if text:
            fields["Content-Type"] = "application/json"
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + text)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
        return int(head.split()[1]), json.loads(await self._reader.readexactly(size))

    def close(self) -> None:
        self._writer.close()


async def one_agent(made: Sidecar, number: int, begin: asyncio.Event, waits: list[float]) -> None:
    """A short life: resume, events, a batch, a checkpoint, a look at the state."""
    await begin.wait()
    connection = Connection(*await asyncio.open_connection("127.0.0.1", made.port))
    path = f"/agents/agent-{number}"

    async def ask(method: str, what: str, body: Any = None, **headers: str) -> Any:
        began = time.monotonic()
        status, document = await connection.ask(method, f"{path}/{what}", body, **headers)
        waits.append(time.monotonic() - began)
        assert status == 200, document
        return document

    state = await ask("POST", "resume")
    assert state["is_new"], state
    owner = {"Skialith-Lease": state["lease"]["token"]}
    for n in range(EVENTS):
        await ask("POST", "events", {"event_id": f"e{n}", "payload": {"n": n}, "step_index": n}, **owner)
    batch = [{"event_id": f"b{n}", "payload": n} for n in range(EVENTS)]
    assert len((await ask("POST", "events/batch", {"events": batch}, **owner))["acks"]) == EVENTS
    await ask("POST", "checkpoint", {"step_index": number, "state": {"agent": number}}, **owner)
    assert (await ask("GET", "state"))["state"] == {"agent": number}
    connection.close()


async def all_agents(made: Sidecar, waits: list[float]) -> None:
    begin = asyncio.Event()
    lives = [asyncio.create_task(one_agent(made, number, begin, waits)) for number in range(AGENTS)]
    await asyncio.sleep(0)
    begin.set()
    await asyncio.wait_for(asyncio.gather(*lives), 90)


def test_500_agents_at_once(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path, settings=WAL) as made:
        before, files = memory(made), open_files(made)
        waits: list[float] = []
        asyncio.run(all_agents(made, waits))
        more = memory(made) - before
        # Each thread that asks the database has a connection of its own by now: three files of SQLite's.
        most = files + 3 * AWAITED_THREADS + 5
        wait_until(lambda: open_files(made) <= most, 20, f"its connections are closed: {files} open files became more")
        waits.sort()
        print(f"{AGENTS} agents, {len(waits)} requests, p50 {waits[len(waits) // 2]:.3f} s, longest {waits[-1]:.3f} s")
        print(f"{more:.0f} MiB more")
        assert more < MOST_MORE_MIB
        assert made.stop() == 0, made.log
    with sqlite3.connect(tmp_path / ".skialith" / "skialith.db") as database:
        events = Counter(database.execute("SELECT agent_id, event_id FROM agent_events").fetchall())
        checkpoints = Counter(database.execute("SELECT agent_id, step_index FROM agent_checkpoints").fetchall())
    names = [f"{kind}{n}" for kind in "eb" for n in range(EVENTS)]
    assert events == Counter((f"agent-{number}", name) for number in range(AGENTS) for name in names)
    assert checkpoints == Counter((f"agent-{number}", number) for number in range(AGENTS))


def memory(made: Sidecar) -> float:
    """Of its process, resident, MiB."""
    status = Path(f"/proc/{made.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def open_files(made: Sidecar) -> int:
    return len(os.listdir(f"/proc/{made.process.pid}/fd"))


# ---- at its limits


@contextmanager
def opened(made: Sidecar, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    sockets = [socket.create_connection(("127.0.0.1", made.port), timeout=20) for _ in range(count)]
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()


def test_more_connections_than_it_takes_are_told_to_come_back(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path, settings=WAL, limits={"CONCURRENT_REQUESTS": 50.0}) as made:
        event = {"event_id": "e", "payload": 1}
        with opened(made, 60), made.client(timeout=20.0) as crowded:
            answer = crowded.post("/agents/a/events", json=event)
            assert (answer.status_code, answer.json()["type"]) == (503, "urn:skialith:problem:overloaded")
            assert answer.headers["retry-after"] == "1" and answer.json()["retryable"]
        client = made.client(timeout=20.0)
        wait_until(lambda: client.post("/agents/a/events", json=event).status_code == 200, 20, "there is room again")


def test_large_bodies_beyond_its_memory_are_told_to_come_back(tmp_path: Path) -> None:
    """Those that are told so are written when they come back; nothing is half written."""
    limits = {"BODIES_BYTES": 3_000_000.0}
    with sidecar(cwd=tmp_path, settings=WAL, limits=limits) as made:
        statuses: Counter[int] = Counter()
        asyncio.run(all_large(made, statuses))
        print(f"answers: {dict(statuses)}")
        assert set(statuses) == {200, 503} and statuses[200] == 12, statuses
        sizes = {f"e{n}": 1_000_000 for n in range(12)}
        assert made.stop() == 0, made.log
    with sqlite3.connect(tmp_path / ".skialith" / "skialith.db") as database:
        query = "SELECT event_id, length(payload) FROM agent_traces"
        assert {name: size - 2 for name, size in database.execute(query)} == sizes


async def all_large(made: Sidecar, statuses: Counter[int]) -> None:
    async def until_written(number: int) -> None:
        while True:
            connection = Connection(*await asyncio.open_connection("127.0.0.1", made.port))
            body = {"event_id": f"e{number}", "payload": "~" * 1_000_000}
            status, document = await connection.ask("POST", "/agents/large/events", body)
            connection.close()
            statuses[status] += 1
            if status == 200:
                return
            assert (status, document["outcome"], document["retryable"]) == (503, "not_written", True), document
            await asyncio.sleep(0.1)

    await asyncio.wait_for(asyncio.gather(*(until_written(n) for n in range(12))), 60)
