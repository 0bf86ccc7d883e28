"""Reading checkpoints while records move from the log to the database, and while one of the two cannot tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from skialith import _fastpath
from skialith.graphs import Drop, PutWrites, record
from skialith.langchain import SkialithCheckpointer
from skialith.records import DeadLetter, Position
from tests.fixtures.graphs import OpenSaver, at, id_of, put
from tests.fixtures.nats import wait_until


def between_pages(saver: SkialithCheckpointer, monkeypatch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    """Read the log message by message, and let something happen behind the first one."""
    reader = saver._door.open().wal.reader
    direct, pages = reader.direct, 0

    async def paged(stream: str, query: dict[str, Any], deadline: float) -> Any:
        nonlocal pages
        pages += 1
        if pages == 2:
            happen()
        return await direct(stream, {**query, "batch": 1} if "next_by_subj" in query else query, deadline)

    monkeypatch.setattr(reader, "direct", paged)


def test_a_deleted_thread_is_gone_though_its_deletion_is_trimmed_while_the_log_is_read(
    open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The trim runs on a connection of its own, because this one's loop waits for it.
    saver, other = open_saver(writer="off"), open_saver()
    put(saver, at("t"), {"a": 1})
    put(saver, at("t"), {"a": 2})
    saver.delete_thread("t")

    def store_and_trim() -> None:
        wal = other._door.open().wal
        wait_until(lambda: wal.status(5).consumers[0].records == 0, 20, "all is stored")
        wal.trim()

    between_pages(saver, monkeypatch, store_and_trim)
    assert saver.get_tuple(at("t")) is None
    assert [*saver.list(at("t"))] == []


def test_a_deletion_is_seen_though_its_body_is_trimmed_before_what_it_deletes(open_saver: OpenSaver) -> None:
    """The chunks of a large record go as soon as it is stored; operations stay for a while."""
    saver = open_saver()
    first = put(saver, at("t"), {"a": 1})
    second = put(saver, first, {"a": 1, "b": 2}, new={"b": 1})
    saver.put_writes(first, [("a", 3)], "task")
    engine = saver._door.open()
    saver._append(engine, Drop("t", [("", id_of(first)), ("n" * 2**20, "filler")], []))
    assert [each.config for each in saver.list(at("t"))] == [second]
    assert engine.flush(20) == 0
    engine.wal.trim()
    assert not engine.wal.operations("t", time.monotonic() + 5).whole
    assert [each.config for each in saver.list(at("t"))] == [second]
    assert saver.get_tuple(first) is None


def test_a_flush_counts_dead_letters_while_new_threads_begin(
    saver: SkialithCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = saver._door.open()
    made = record(engine.config.namespace, PutWrites("t", "", "1", "task", "", []), 2**20)
    made = made._replace(position=Position(time.time_ns(), engine._since.seq + 1))
    raw = _fastpath.encode_record(*made[:1], *made[2:10], None)
    engine.wal.source("writer").bury(
        DeadLetter(made.key, "writer", made.namespace, "subject", made.position, 1406, "too long", 1, raw, made)
    )
    direct, asked = engine.wal.reader.direct, 0

    async def counted(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        engine.note_thread(f"new {asked}")
        return await direct(*args)

    for n in range(1000):
        engine.note_thread(f"thread {n}")
    assert saver.flush() == 0
    engine.note_thread("t")
    monkeypatch.setattr(engine.wal.reader, "direct", counted)
    assert saver.flush() == 1
    assert asked < 10
