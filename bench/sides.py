"""The ways to have one event acknowledged, each as a call that returns when it is."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .floor import RawPublisher
from .measure import Call

PAYLOAD = {"kind": "thought", "text": "x" * 180}
"""About 200 bytes as msgpack."""
BODY = b"x" * 200


@dataclass(frozen=True)
class Database:
    """Where a MariaDB listens; a value, so that it can be handed to another process."""

    port: int
    user: str
    password: str

    def connect(self, database: str = "") -> Any:
        """A connection as mysqlclient's users open it, in autocommit."""
        import MySQLdb

        return MySQLdb.connect(
            host="127.0.0.1",
            port=self.port,
            user=self.user,
            password=self.password,
            database=database,
            autocommit=True,
            charset="utf8mb4",
        )


@contextmanager
def floor(url: str, *, fenced: bool = False, replicas: int = 1) -> Iterator[Call]:
    """The raw socket; ``fenced``: with the headers by which the server checks a lease."""
    raw = RawPublisher(url, f"FLOOR_{secrets.token_hex(6)}")
    raw.make_stream(replicas)
    headers = raw.lease_headers() if fenced else b""
    try:
        yield lambda: raw.append(BODY, headers)
    finally:
        raw.remove_stream()
        raw.close()


@contextmanager
def save_event(url: str, *, fenced: bool = True, **settings: Any) -> Iterator[Call]:
    """``agent.save_event``, in a namespace of its own; the writer is elsewhere and off unless the settings say otherwise."""
    from skialith import SkialithAgent

    settings = {"namespace": f"b{secrets.token_hex(6)}", "writer": "off", "wal_bytes": 2**30, **settings}
    with SkialithAgent("bench", nats_url=url, **settings) as agent:
        if fenced:
            agent.resume()
        numbers = itertools.count()
        yield lambda: agent.save_event(f"e{next(numbers)}", PAYLOAD)


@contextmanager
def bridge(url: str) -> Iterator[Call]:
    """What one writes first: nats-py on a loop thread, and ``run_coroutine_threadsafe(js.publish(...), loop).result()``."""
    import nats

    loop = _new_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    stream = f"BRIDGE_{secrets.token_hex(6)}"
    raw = RawPublisher(url, stream)
    raw.make_stream()

    def wait(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    client = wait(nats.connect(url))
    context = client.jetstream()
    subject = f"{stream}.a"
    try:
        yield lambda: wait(context.publish(subject, BODY, headers={"Nats-Msg-Id": os.urandom(16).hex()}))
    finally:
        wait(client.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        raw.remove_stream()
        raw.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


@contextmanager
def insert(database: Database) -> Iterator[Call]:
    """An autocommitted INSERT of one event with mysqlclient into a table as one would make it."""
    name = f"bench_{secrets.token_hex(6)}"
    connection = database.connect()
    cursor = connection.cursor()
    cursor.execute(f"CREATE DATABASE {name}")
    cursor.execute(f"USE {name}")
    cursor.execute(
        "CREATE TABLE events (id BIGINT AUTO_INCREMENT PRIMARY KEY, agent_id VARCHAR(64) NOT NULL, "
        "event_id VARCHAR(64) NOT NULL, body BLOB NOT NULL) ENGINE=InnoDB"
    )
    numbers = itertools.count()
    statement = "INSERT INTO events (agent_id, event_id, body) VALUES (%s, %s, %s)"
    try:
        yield lambda: cursor.execute(statement, ("bench", f"e{next(numbers)}", BODY))
    finally:
        cursor.execute(f"DROP DATABASE {name}")
        connection.close()
