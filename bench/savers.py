"""The checkpointers that are compared, each opened as its documentation says."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from langgraph.checkpoint.base import BaseCheckpointSaver

FLUSH_SECONDS = 25.0

Saver = BaseCheckpointSaver[Any]


@dataclass(frozen=True)
class Opened:
    """A checkpointer; ``settle()`` waits for what its database does in the background.

    ``forget(thread_id)``: what the process remembers of the thread's latest checkpoint.
    """

    saver: Saver
    settle: Callable[[], object] = lambda: None
    forget: Callable[[str], object] = lambda _: None


@contextmanager
def skialith(nats_url: str, database_url: str, writer: str) -> Iterator[Opened]:
    """Skialith's; with ``writer="off"`` nothing is stored before ``settle()``, which runs a writer until all is."""
    from skialith import SkialithAgent
    from skialith.langchain import SkialithCheckpointer

    settings: dict[str, Any] = {
        "nats_url": nats_url,
        "database_url": database_url,
        "namespace": f"b{secrets.token_hex(6)}",
        "writer": writer,
        "wal_bytes": 2**30,
    }

    with SkialithAgent("first", **{**settings, "writer": "on"}):
        pass  # makes the tables
    with SkialithCheckpointer(**settings) as saver:

        def settle() -> None:
            with SkialithAgent("writes", **{**settings, "writer": "on"}) as agent:
                saver.flush(FLUSH_SECONDS)
                # What a writer that lives on does seconds later.
                agent._runtime.wal.stream.keep_graphs_seconds = 0.0
                agent._runtime.wal.trim()

        def forget(thread_id: str) -> None:
            saver._door.open()._recent.forget((thread_id, ""))

        yield Opened(saver, settle, forget)


@contextmanager
def postgres(url: str) -> Iterator[Opened]:
    from langgraph.checkpoint.postgres import PostgresSaver

    with PostgresSaver.from_conn_string(url) as saver:
        saver.setup()
        yield Opened(saver, lambda: saver.conn.execute("ANALYZE"))


@contextmanager
def mysql(url: str) -> Iterator[Opened]:
    from langgraph.checkpoint.mysql.pymysql import PyMySQLSaver

    with PyMySQLSaver.from_conn_string(url) as saver:
        saver.setup()
        yield Opened(saver)


@contextmanager
def sqlite(path: str) -> Iterator[Opened]:
    from langgraph.checkpoint.sqlite import SqliteSaver

    with SqliteSaver.from_conn_string(path) as saver:
        saver.setup()
        yield Opened(saver)


WAYS: dict[str, Callable[..., AbstractContextManager[Opened]]] = {
    "skialith": skialith,
    "postgres": postgres,
    "mysql": mysql,
    "sqlite": sqlite,
}
