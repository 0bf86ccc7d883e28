"""Appending to a real nats-server: order, duplicates, retries, limits, large records, trimming."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from skialith import SkialithAgent, graphs
from skialith.errors import FlushTimeout, WalFull, WalUnavailable
from skialith.history import History, NothingStored
from skialith.records import NOWHERE, Record
from skialith.stores import open_store
from skialith.wal.client import Wal
from skialith.wal.lane import Ticket
from skialith.wal.source import ConsumerSource
from skialith.wal.stream import TRACE_INGEST, WRITER
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import OpenWal, append, checkpoint, event, new_namespace, soon

MIB = 1024 * 1024


_sources: WeakKeyDictionary[Wal, dict[str, ConsumerSource]] = WeakKeyDictionary()


def drain(wal: Wal, consumer: str) -> int:
    """Acknowledge all that a consumer has; one source per consumer and connection, as in a writer."""
    sources = _sources.setdefault(wal, {})
    source = sources.get(consumer) or sources.setdefault(consumer, wal.source(consumer))
    count = 0
    while messages := source.pull(512, 4 * MIB, 0.02, 1.0):
        source.ack(messages)
        count += len(messages)
    return count


def stored_messages(wal: Wal) -> int:
    return wal.status(5.0).messages


def test_the_same_id_is_stored_once(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    first, again = append(wal, event(wal, "a", "e1")), append(wal, event(wal, "a", "e1"))
    assert (first[0].duplicate, again[0].duplicate) == (False, True)
    assert first[0].seq == again[0].seq
    assert stored_messages(wal) == 1


def test_a_batch_keeps_its_order_and_acks_each(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    acks = append(wal, *(event(wal, "a", f"e{n}") for n in range(400)))
    assert [ack.seq for ack in acks] == list(range(acks[0].seq, acks[0].seq + 400))
    page, more = wal.events("a", NOWHERE, soon())
    assert [record.record_id for record in page] == [f"e{n}" for n in range(256)]
    assert more
    rest, more = wal.events("a", page[-1].position, soon())
    assert [record.record_id for record in rest] == [f"e{n}" for n in range(256, 400)]
    assert not more


def test_a_batch_with_ids_that_are_there_already_is_settled_one_by_one(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, *(event(wal, "a", f"e{n}") for n in range(20)))
    acks = append(wal, *(event(wal, "a", f"e{n}") for n in range(10, 60)))
    assert [ack.duplicate for ack in acks] == [True] * 10 + [False] * 40
    assert stored_messages(wal) == 60


def test_what_comes_behind_a_failed_part_of_a_call_is_not_sent(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace(), wal_bytes=MIB)
    ticket = Ticket("a", 3)
    wal.log.append(ticket, [event(wal, "a", f"e{n}", os.urandom(600_000)) for n in range(2)], soon())
    with pytest.raises(WalFull):
        wal.log.wait(ticket)
    wal.log.append(ticket, [event(wal, "a", "e2")], soon())
    assert wal.log.drained(soon())
    assert stored_messages(wal) == 0


def test_threads_that_share_an_agent_keep_their_own_order(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    wal.claim("a", soon())
    seqs: dict[int, list[int]] = {n: [] for n in range(8)}

    def work(number: int) -> None:
        for n in range(50):
            seqs[number].append(append(wal, event(wal, "a", f"t{number}-{n}"))[0].seq)

    threads = [threading.Thread(target=work, args=(n,)) for n in seqs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(seqs[n] == sorted(seqs[n]) and len(seqs[n]) == 50 for n in seqs)
    assert len({seq for each in seqs.values() for seq in each}) == 400


@pytest.mark.parametrize("size", [MIB - 9 * 1024, MIB, 5 * MIB + 1])
def test_a_large_body_comes_back_whole(nats_url: str, open_wal: OpenWal, size: int) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    wal.claim("a", soon())
    body = os.urandom(size)
    append(wal, checkpoint(wal, "a", 7, body))
    found = wal.last_checkpoint("a", soon())
    assert found is not None
    assert (found.step_index, found.body) == (7, body)


def test_a_large_record_with_an_id_that_is_there_already_is_a_duplicate(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    body = os.urandom(3 * MIB)
    first, again = append(wal, event(wal, "a", "big", body)), append(wal, event(wal, "a", "big", body))
    assert (again[0].seq, again[0].duplicate) == (first[0].seq, True)


def test_every_class_of_record_alone_is_trimmed_to_nothing(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    kinds = {
        "events": [event(wal, "a", f"e{n}") for n in range(30)],
        "checkpoints": [checkpoint(wal, "a", n) for n in range(30)],
        "chunks": [checkpoint(wal, "a", 99, os.urandom(3 * MIB))],
        "graphs": [graphs.record(wal.stream.namespace, graphs.Delete("a"), MIB) for _ in range(30)],
    }
    for name, records in kinds.items():
        append(wal, *records)
        drain(wal, WRITER)
        drain(wal, TRACE_INGEST)

        def empty() -> bool:
            wal.trim()
            return stored_messages(wal) == 0

        wait_until(empty, 10, f"{name} trimmed")


def test_events_stay_until_both_consumers_have_them_and_bodies_until_the_writer_has(
    nats_url: str, open_wal: OpenWal
) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, event(wal, "a", "big", os.urandom(3 * MIB)))
    assert drain(wal, TRACE_INGEST) == 1
    wal.trim()
    record = wal.events("a", NOWHERE, soon())[0][0]
    assert wal.with_body(record, soon()).body is not None
    assert drain(wal, WRITER) == 1

    def empty() -> bool:
        wal.trim()
        return stored_messages(wal) == 0

    wait_until(empty, 10, "the large event trimmed")


def test_flush_waits_for_the_writers_ack_and_tells_what_is_missing(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, event(wal, "a", "e1"), event(wal, "a", "e2"))
    with pytest.raises(FlushTimeout) as caught:
        wal.flush(0.3)
    assert caught.value.outcome == "durable"
    assert caught.value.remaining == 2
    drain(wal, WRITER)
    wal.flush(5.0)


def test_a_full_log_refuses_records_and_still_takes_leases(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url, wal_bytes=2 * MIB)
    wal.claim("a", soon())
    with pytest.raises(WalFull) as caught:
        for n in range(100):
            append(wal, event(wal, "a", f"e{n}", os.urandom(100_000)))
    assert caught.value.outcome == "not_written"
    assert caught.value.retryable
    wal.claim("another", soon())
    drain(wal, WRITER)
    drain(wal, TRACE_INGEST)

    def room() -> bool:
        wal.trim()
        return stored_messages(wal) < 5

    wait_until(room, 10, "room in the log")
    assert not append(wal, event(wal, "a", "after"))[0].duplicate


def test_an_append_outlives_a_server_restart(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    wal.claim("a", soon())
    append(wal, event(wal, "a", "before"))
    nats_server.kill()
    result: list[object] = []

    def call() -> None:
        result.extend(append(wal, event(wal, "a", "during"), seconds=20))

    thread = threading.Thread(target=call)
    thread.start()
    nats_server.start()
    thread.join(30)
    assert len(result) == 1
    page, _ = wal.events("a", NOWHERE, soon())
    assert [record.record_id for record in page] == ["before", "during"]


def test_no_server_means_not_written_at_the_deadline(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    nats_server.kill()
    wait_until(lambda: not wal.connection.is_open, 10, "the loss of the connection noticed")
    began = time.monotonic()
    with pytest.raises(WalUnavailable) as caught:
        append(wal, event(wal, "a", "e"), seconds=1.0)
    assert caught.value.outcome == "not_written"
    assert caught.value.retryable
    assert time.monotonic() - began < 4.0


def test_a_silent_server_means_unknown_at_the_deadline(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    append(wal, event(wal, "a", "first"))
    nats_server.pause()
    try:
        with pytest.raises(WalUnavailable) as caught:
            append(wal, event(wal, "a", "e"), seconds=1.0)
        assert caught.value.outcome == "unknown"
    finally:
        nats_server.resume()
    again = append(wal, event(wal, "a", "e"), seconds=20)
    assert stored_messages(wal) == 2
    assert again[0].seq > 0


def test_messages_pulled_on_an_older_connection_are_delivered_again(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    append(wal, event(wal, "a", "e"))
    source = wal.source(WRITER)
    pulled = source.pull(10, MIB, 0.01, 5.0)
    assert len(pulled) == 1
    nats_server.restart()
    wait_until(lambda: wal.connection.is_open and wal.connection.epoch != pulled[0].epoch, 20, "a new connection")
    source.ack(pulled)
    again: list[object] = []

    def delivered() -> bool:
        again.extend(source.pull(10, MIB, 0.01, 1.0))
        return bool(again)

    wait_until(delivered, 20, "the message delivered again")


def test_a_consumer_that_was_deleted_is_made_anew(nats_server: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(nats_server.url)
    source = wal.source(WRITER)
    append(wal, event(wal, "a", "e"))
    source.ack(source.pull(10, MIB, 0.01, 5.0))
    wal.call(lambda: wal.stream.api.call(f"CONSUMER.DELETE.{wal.stream.name}.{WRITER}"), 5.0)
    append(wal, event(wal, "a", "f"))
    found: set[str] = set()

    def both() -> bool:
        try:
            messages = source.pull(10, MIB, 0.01, 1.0)
        except WalUnavailable:
            return False
        found.update(message.subject for message in messages)
        return bool(found)

    wait_until(both, 30, "records pulled from the new consumer")


def test_pages_of_messages_that_do_not_decode_are_passed_over(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, event(wal, "a", "first"))

    async def junk() -> None:
        for _ in range(300):
            await wal.connection.request(wal.stream.subjects.event("a"), b"junk", timeout=5.0)

    wal.call(junk, 30.0)
    append(wal, event(wal, "a", "last"))
    history = History(wal, NothingStored, wal.stream.namespace, "a", 10.0)
    assert [record.record_id for record, _, _ in history.entries(NOWHERE)] == ["first", "last"]


def test_a_large_checkpoint_that_is_trimmed_while_it_is_read_is_left_to_the_database(
    nats_url: str, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, checkpoint(wal, "a", 1, os.urandom(3 * MIB)))
    read = wal.reader.with_body

    async def trimmed(record: Record, deadline: float) -> Record:
        for kind in (wal.stream.subjects.checkpoints, wal.stream.subjects.chunks):
            await wal.stream.api.call(f"STREAM.PURGE.{wal.stream.name}", {"filter": kind}, deadline=deadline)
        return await read(record, deadline)

    monkeypatch.setattr(wal.reader, "with_body", trimmed)
    assert wal.last_checkpoint("a", soon()) is None


def test_a_full_log_that_was_acknowledged_but_not_trimmed_takes_records_again(
    nats_server: NatsServer, open_wal: OpenWal, tmp_path: Path
) -> None:
    wal = open_wal(nats_server.url, wal_bytes=2 * MIB)
    with pytest.raises(WalFull):
        for n in range(3000):
            append(wal, event(wal, "a", f"e{n}"), event(wal, "a", f"f{n}", os.urandom(1000)))
    drain(wal, WRITER)
    drain(wal, TRACE_INGEST)
    wal.flush(5.0)
    wal.close()
    database = f"sqlite:///{tmp_path / 'skialith.db'}"
    store = open_store(database)
    store.migrate()
    store.bind_wal(wal.stream.namespace, wal.stream.wal_id)
    store.close()
    agent = SkialithAgent("a", nats_url=nats_server.url, database_url=database, directory=str(tmp_path / "d"))

    def room() -> bool:
        try:
            return agent.save_event("after", os.urandom(3000)).seq > 0
        except WalFull:
            return False

    try:
        wait_until(room, 10, "room in the log")
    finally:
        agent.close()


def test_history_ends_at_what_was_durable_when_it_began(nats_url: str, open_wal: OpenWal) -> None:
    wal = open_wal(nats_url, namespace=new_namespace())
    append(wal, *(event(wal, "a", f"e{n}") for n in range(300)))
    entries = History(wal, NothingStored, wal.stream.namespace, "a", 10.0).entries(NOWHERE)
    found = [next(entries)[0].record_id]
    append(wal, *(event(wal, "a", f"later{n}") for n in range(600)))
    found += [record.record_id for record, _, _ in entries]
    assert found == [f"e{n}" for n in range(300)]
