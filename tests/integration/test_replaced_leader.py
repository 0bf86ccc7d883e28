"""A leader that stood still, was replaced, and answers as of then before it hears of that: its word ends nothing.

One server plays the replicas, and what such a leader says of a message is put in its place; chaos tests have real ones.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

import pytest

from skialith.errors import AgentFenced, FlushTimeout
from skialith.records import NOWHERE
from skialith.wal.api import ApiError
from skialith.wal.client import Wal
from skialith.wal.stream import Stream
from tests.fixtures.wal import OpenWal, append, checkpoint, event, new_namespace, soon

LARGE = bytes(range(256)) * 8192


@pytest.fixture
def wal(nats_url: str, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch) -> Wal:
    """A log that takes itself for replicated."""
    original = Stream._note

    def note(self: Stream, info: dict[str, Any]) -> None:
        original(self, info)
        self.replicas = 3

    monkeypatch.setattr(Stream, "_note", note)
    return open_wal(nats_url, namespace=new_namespace())


def says(wal: Wal, monkeypatch: pytest.MonkeyPatch, message: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """From now on this is what the leader answers to who asks for a message."""

    call = wal.stream.api.call

    async def answer(name: str, body: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
        if not name.startswith("STREAM.MSG.GET."):
            return await call(name, body, **given)
        found = message(body or {})
        if found is None:
            raise ApiError(404, 10037, "no message found")
        return {"message": found}

    monkeypatch.setattr(wal.stream.api, "call", answer)


def left(wal: Wal) -> dict[str, int]:
    """Messages in the log, per subject."""
    call = wal.stream.api.call
    info = wal.call(lambda: call(f"STREAM.INFO.{wal.stream.name}", {"subjects_filter": ">"}), 5.0)
    return {name: count for name, count in (info["state"].get("subjects") or {}).items() if ".lease." not in name}


def test_what_nobody_stored_is_not_trimmed(wal: Wal, monkeypatch: pytest.MonkeyPatch) -> None:
    append(wal, event(wal, "a", "e1"), event(wal, "a", "e2", LARGE), checkpoint(wal, "a", 1))
    before = left(wal)
    assert sum(before.values()) > 3
    says(wal, monkeypatch, lambda query: None)
    wal.trim()
    assert left(wal) == before


def test_chunks_that_are_left_alone_are_trimmed_with_replicas_too(wal: Wal) -> None:
    append(wal, checkpoint(wal, "a", 1, LARGE))
    wal.call(lambda: wal.stream.set_traces(False, soon()), 5.0)
    source = wal.source("writer")
    source.ack(source.pull(1, 1 << 20, 0.0, 5.0))
    deadline = time.monotonic() + 10
    while left(wal) and time.monotonic() < deadline:
        wal.trim()
    assert left(wal) == {}


def test_a_flush_waits_for_what_a_replaced_leader_does_not_know_of(wal: Wal, monkeypatch: pytest.MonkeyPatch) -> None:
    append(wal, event(wal, "a", "e1"))
    says(wal, monkeypatch, lambda query: None)
    with pytest.raises(FlushTimeout):
        wal.flush(1.0)


def test_a_flush_of_a_large_record_ends(wal: Wal) -> None:
    append(wal, event(wal, "a", "e1", LARGE))
    for consumer in ("writer", "trace_ingest"):
        source = wal.source(consumer)
        source.ack(source.pull(1, 1 << 20, 0.0, 5.0))
    began = time.monotonic()
    wal.flush(20.0)
    assert time.monotonic() - began < 2.5


def test_an_owner_is_not_fenced_by_the_lease_before_its_own(
    wal: Wal, nats_url: str, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal.claim("a", soon())
    earlier = wal.call(lambda: wal.stream.last_message(wal.stream.subjects.lease("a"), soon()), 5.0)
    later = open_wal(nats_url, namespace=wal.stream.namespace)
    later.claim("a", soon())
    for answer in (earlier, None):
        says(later, monkeypatch, lambda query, answer=answer: answer)  # type: ignore[misc]
        later.confirm("a", soon())
    append(later, event(later, "a", "e1"))
    with pytest.raises(AgentFenced):
        append(wal, event(wal, "a", "e2"))


def test_the_newest_checkpoint_and_event_are_found_behind_its_back(wal: Wal, monkeypatch: pytest.MonkeyPatch) -> None:
    append(wal, checkpoint(wal, "a", 1))
    earlier = wal.call(lambda: wal.stream.last_message(wal.stream.subjects.checkpoint("a"), soon()), 5.0)
    append(wal, checkpoint(wal, "a", 2, LARGE), event(wal, "a", "e1"))
    says(wal, monkeypatch, lambda query: earlier if "last_by_subj" in query else None)
    found = wal.last_checkpoint("a", soon())
    assert found is not None and (found.step_index, found.body) == (2, LARGE)

    direct = wal.reader.direct

    async def lags(stream: str, query: dict[str, Any], deadline: float) -> Any:
        """A replica that has no event yet at the first try."""
        monkeypatch.setattr(wal.reader, "direct", direct)
        return []

    monkeypatch.setattr(wal.reader, "direct", lags)
    events, _ = wal.events("a", NOWHERE, soon())
    assert [each.record_id for each in events] == ["e1"]


def test_the_body_of_a_large_record_is_read_from_the_leader_where_a_replica_lacks_it(
    wal: Wal, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(wal, checkpoint(wal, "a", 1, LARGE))
    direct = wal.reader.direct

    async def lacks_chunks(stream: str, query: dict[str, Any], deadline: float) -> Any:
        return [] if ".chunk." in query.get("next_by_subj", "") else await direct(stream, query, deadline)

    monkeypatch.setattr(wal.reader, "direct", lacks_chunks)
    found = wal.last_checkpoint("a", soon())
    assert found is not None and found.body == LARGE


def test_a_mark_keeps_no_agent_from_its_lease(wal: Wal) -> None:
    """It is of no agent, ages out, and there is one per process however often it reads."""
    for _ in range(5):
        wal.last_checkpoint("a", soon())
    call = wal.stream.api.call
    marks = wal.stream.subjects.mark(">").removesuffix("~>") + "*"
    info = wal.call(lambda: call(f"STREAM.INFO.{wal.stream.name}", {"subjects_filter": marks}), 5.0)
    assert list(info["state"]["subjects"].values()) == [1]
    message = wal.call(lambda: wal.stream.last_message(next(iter(info["state"]["subjects"])), soon()), 5.0)
    assert message is not None and b"Nats-TTL: 60s" in base64.b64decode(message["hdrs"])
