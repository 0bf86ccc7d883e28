"""Reading checkpoints while records move from the log to the database, and while one of the two cannot tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skialith.langchain import SkialithCheckpointer
from tests.fixtures.graphs import OpenSaver, at, put
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
