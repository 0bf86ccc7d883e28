"""What every store promises, on real databases: rows, idempotence, errors, reading back, threads and forks."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from skialith.config import DATABASE_CONNECTIONS, PAYLOAD_PART_BYTES
from skialith.errors import InvalidArgument, StoreDataError, StoreUnavailable
from skialith.records import Codec, Kind, Position, Record
from skialith.stores import Store, migrate, open_store, read
from skialith.stores.base import Counts, LetterPlace
from skialith.stores.sql import SqlStore

from ..fixtures.stores import (
    NAMESPACE,
    TIME_NS,
    Run,
    checkpoint,
    event,
    letter,
    manifest,
    noise,
    trace,
)

START = Position(0, 0)
BIG = 2 * PAYLOAD_PART_BYTES + 17
ODD_IDS = [
    "a",
    "A",
    "a ",
    "a  ",
    " a",
    "a\0",
    "\0",
    "a\0b",
    "á",
    "a\u0301",
    "ß",
    "ss",
    "🦜" * 255,
    "🦜" * 254 + "x",
    "%s",
    "?",
    "'",
    '"; --',
    "\\",
    "\x1a",
    "\n",
    "a.b*c>",
    "\ufeff",
    "\U0010ffff",
]


def events(store: Store, agent: str = "agent", **options: Any) -> list[Record]:
    """All events of an agent, without their flags."""
    return [record for record, _ in store.events(NAMESPACE, agent, START, None, 1000, **options)]


def at_once(*calls: Callable[[], object]) -> list[BaseException | None]:
    """Run ``calls`` on threads that start together; the error of each, or None."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> BaseException | None:
        barrier.wait()
        try:
            call()
        except Exception as error:  # noqa: BLE001 - the caller asserts what it may be
            return error
        return None

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


# ---- rows


def test_records_come_back_as_they_went_in(store: Store) -> None:
    wrote = [
        event(1, body=b"", step=-(2**63)),
        event(2, body=bytes(range(256)), step=2**63 - 1),
        event(3, event_type="")._replace(codec=Codec.ZSTD_MSGPACK, created_us=-1),
        event(4, event_type="🦜 " * 100),
        event(5, body=b"'; DROP TABLE agent_events; -- %s ? \\"),
    ]
    store.write_records([*wrote, checkpoint(6, step=7, body=b"state")])
    assert events(store) == wrote
    latest = store.latest_checkpoint(NAMESPACE, "agent")
    assert latest is not None
    assert latest._replace(key=b"") == checkpoint(6, step=7, body=b"state", key=b"")


def test_nothing_to_write_is_no_error(store: Store) -> None:
    store.write_records([])
    store.write_traces([])
    assert store.counts(NAMESPACE) == Counts(0, 0, 0, 0)


def test_odd_ids_are_all_distinct(store: Store) -> None:
    agents = [event(n, agent=name, event_id="e") for n, name in enumerate(ODD_IDS, 1)]
    ids = [event(n, agent="ids", event_id=name) for n, name in enumerate(ODD_IDS, 1)]
    store.write_records(agents + ids + [checkpoint(n, agent=name, step=n) for n, name in enumerate(ODD_IDS, 1)])
    store.write_traces([trace(n, agent=name, event_id=name) for n, name in enumerate(ODD_IDS, 1)])
    for n, record in enumerate(agents, 1):
        assert events(store, record.agent_id) == [record]
        latest = store.latest_checkpoint(NAMESPACE, record.agent_id)
        assert latest is not None
        assert (latest.agent_id, latest.step_index) == (record.agent_id, n)
    assert events(store, "ids") == ids
    listed = [agent.agent_id for agent in store.agents(NAMESPACE, limit=1000)]
    assert listed == sorted([*ODD_IDS, "ids"], key=str.encode)


def test_any_byte_of_a_key_counts(store: Store, sql: Run) -> None:
    keys = [
        bytes(16),
        b"\0" * 15 + b"\1",
        b"\0" * 15 + b" ",
        b" " * 16,
        b"\xff" * 16,
        b"a" * 15 + b"\0",
        b"a" * 15 + b" ",
    ]
    store.write_records([event(n, key=key) for n, key in enumerate(keys, 1)])
    assert {bytes(row[0]) for row in sql("SELECT record_key FROM agent_events")} == set(keys)


def test_namespaces_do_not_see_each_other(store: Store) -> None:
    store.write_records([event(1), event(2, namespace="other"), checkpoint(3, namespace="other")])
    assert len(events(store)) == 1
    assert store.latest_checkpoint(NAMESPACE, "agent") is None
    assert store.counts("other") == Counts(1, 1, 0, 0)
    assert [agent.checkpoints for agent in store.agents(NAMESPACE)] == [0]


@pytest.mark.parametrize("make", [event, checkpoint])
def test_a_64_mib_record(store: Store, make: Callable[..., Record]) -> None:
    record = make(1, body=noise(64 * 2**20 - 3, 1))
    store.write_records([record])
    store.write_records([record])
    found = events(store)[0] if record.kind == Kind.EVENT else store.latest_checkpoint(NAMESPACE, "agent")
    assert found == record


@pytest.mark.parametrize(
    "size", [PAYLOAD_PART_BYTES - 1, PAYLOAD_PART_BYTES, PAYLOAD_PART_BYTES + 1, 2 * PAYLOAD_PART_BYTES]
)
def test_sizes_around_a_part(store: Store, sql: Run, size: int) -> None:
    # Zeros: every byte of them is escaped on its way to MySQL.
    record = event(1, body=bytes(size))
    store.write_records([record])
    assert events(store) == [record]
    parts = 0 if size <= PAYLOAD_PART_BYTES else -(-size // PAYLOAD_PART_BYTES)
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(parts,)]


def test_a_batch_longer_than_any_packet(store: Store) -> None:
    batch = [event(n, body=noise(PAYLOAD_PART_BYTES, n)) for n in range(1, 41)]
    store.write_records(batch)
    assert events(store) == batch


# ---- idempotence


def test_a_batch_again_changes_nothing(store: Store) -> None:
    batch = [event(1), event(2, body=noise(BIG, 2)), checkpoint(3), checkpoint(4, body=noise(BIG, 4))]
    store.write_records(batch)
    store.write_records([*reversed(batch), event(5)])
    assert store.counts(NAMESPACE) == Counts(3, 2, 0, 0)
    assert events(store)[:2] == batch[:2]
    assert store.latest_checkpoint(NAMESPACE, "agent") == batch[3]


BODIES = {
    "small": b"small",
    "large": noise(BIG, 1),
    "larger": noise(BIG + PAYLOAD_PART_BYTES, 2),
    "same size": noise(BIG, 3),
}


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(BODIES, 2)])
@pytest.mark.parametrize("kind", [Kind.EVENT, Kind.CHECKPOINT])
def test_the_first_of_a_key_wins_whole(store: Store, sql: Run, one: str, other: str, kind: Kind) -> None:
    make = event if kind == Kind.EVENT else checkpoint
    key, again = os.urandom(16), os.urandom(16)
    first, second = make(1, key=key, body=BODIES[one], step=1), make(2, key=key, body=BODIES[other], step=2)
    together = [make(4, agent="t", key=again, body=BODIES[other]), make(3, agent="t", key=again, body=BODIES[one])]
    store.write_records([first])
    store.write_records([second])
    store.write_records(together)
    for agent, expected in (("agent", first), ("t", together[1])):
        found = events(store, agent)[0] if kind == Kind.EVENT else store.latest_checkpoint(NAMESPACE, agent)
        assert found == expected
    size = len(BODIES[one])
    parts = 2 * -(-size // PAYLOAD_PART_BYTES) if size > PAYLOAD_PART_BYTES else 0
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(parts,)]


def test_two_payloads_of_one_key_written_at_once(store: Store, sql: Run) -> None:
    parts = 0
    for n in range(1, 9):
        key = os.urandom(16)
        rivals = [event(n, key=key, body=noise(BIG + i * PAYLOAD_PART_BYTES * (n % 2), 10 * n + i)) for i in range(3)]
        errors = at_once(
            *(lambda record=record, n=n: store.write_records([record, event(n, agent="beside")]) for record in rivals)
        )
        assert errors == [None] * 3
        found = events(store)[-1]
        assert found in rivals
        parts += -(-len(found.body or b"") // PAYLOAD_PART_BYTES)
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(parts,)]


def test_parts_that_were_lost_are_written_again(store: Store, sql: Run) -> None:
    record = event(1, body=noise(BIG, 1))
    store.write_records([record])
    sql("DELETE FROM payload_parts WHERE n = 1")
    with pytest.raises(StoreUnavailable, match="parts of its payload are missing"):
        events(store)
    store.write_records([record])
    assert events(store) == [record]


def test_overlapping_batches_at_once(store: Store) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    records = [event(n) if n % 3 else checkpoint(n) for n in range(1, 601)]
    batches = [rng.sample(records, 200) for _ in range(12)] + [records]

    def write(some: list[list[Record]]) -> None:
        for batch in some:
            store.write_records(batch)

    assert at_once(*(lambda i=i: write(batches[i::4]) for i in range(4))) == [None] * 4
    assert store.counts(NAMESPACE) == Counts(400, 200, 0, 0)
    assert events(store) == [record for record in records if record.kind == Kind.EVENT]


# ---- errors


def test_a_bad_row_is_a_data_error_and_leaves_nothing(store: Store) -> None:
    good, bad = [event(1), checkpoint(2), event(3, body=noise(BIG, 3))], event(4, agent="x" * 1021)
    with pytest.raises(StoreDataError) as caught:
        store.write_records([*good, bad])
    assert caught.value.__cause__ is not None
    assert caught.value.code != 0
    assert store.counts(NAMESPACE) == Counts(0, 0, 0, 0)
    store.probe()
    store.write_records(good)
    assert store.counts(NAMESPACE) == Counts(2, 1, 0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        event(1, event_id="x" * 1021),
        event(1, event_type="x" * 256),
        event(1)._replace(position=Position(2**63, 1)),
        event(1)._replace(position=Position(1, 2**64)),
        event(1)._replace(step_index=2**63),
        event(1)._replace(codec=256),
        event(1)._replace(kind=9),
        event(1, agent="\ud800"),
        checkpoint(1)._replace(step_index=2**63),
    ],
)
def test_what_no_row_can_hold_is_a_data_error(store: Store, bad: Record) -> None:
    with pytest.raises(StoreDataError):
        store.write_records([bad])
    store.probe("writer")


@pytest.mark.parametrize("payload", ["", "{", "nope", "[1", '{"a": NaN}'])
def test_bad_json_is_a_data_error(store: Store, payload: str) -> None:
    with pytest.raises(StoreDataError):
        store.write_traces([trace(1), trace(2, payload=payload)])
    assert store.counts(NAMESPACE).traces == 0
    store.probe("trace_ingest")


def test_a_record_without_its_body_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="without its body"):
        store.write_records([event(1)._replace(body=None, manifest=manifest())])


def test_a_missing_table_is_not_the_records_fault(store: Store, sql: Run) -> None:
    sql("DROP TABLE agent_events")
    calls: list[Callable[[], None]] = [
        lambda: store.write_records([event(1)]),
        store.probe,
        lambda: store.probe("writer"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="skialith migrate"):
            call()
    store.probe("trace_ingest")
    store.ping()


def test_without_tables_everything_is_transient(empty_store: Store) -> None:
    for call in (
        lambda: empty_store.write_records([event(1)]),
        lambda: empty_store.write_traces([trace(1)]),
        lambda: empty_store.write_dead_letter(letter(event(1))),
        lambda: empty_store.bind_wal(NAMESPACE, "w"),
        lambda: empty_store.latest_checkpoint(NAMESPACE, "agent"),
        lambda: empty_store.counts(NAMESPACE),
        empty_store.probe,
    ):
        with pytest.raises(StoreUnavailable) as caught:
            call()
        assert not isinstance(caught.value, StoreDataError)
        assert caught.value.retryable
        assert caught.value.__cause__ is not None
    empty_store.ping()


def test_a_probe_leaves_nothing(store: Store, sql: Run) -> None:
    for sink in (None, "writer", "trace_ingest"):
        store.probe(sink)
    for table in ("agent_events", "agent_checkpoints", "agent_traces", "payload_parts"):
        assert sql(f"SELECT COUNT(*) FROM {table}") == [(0,)]


def test_closed_twice_and_then_refused(store: Store) -> None:
    store.close()
    store.close()
    for call in (store.ping, store.migrate, lambda: store.write_records([event(1)])):
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


# ---- schema and binding


def migrations(store: Store) -> list[int]:
    """The versions of all migrations there are."""
    return [migration.version for migration in migrate.load(store.name)]


def test_migrate_says_what_it_applied(empty_store: Store, sql: Run) -> None:
    every = migrations(empty_store)
    assert empty_store.migrate() == every
    assert empty_store.migrate() == []
    found = [row[0] for row in sql("SELECT version FROM skialith_migrations ORDER BY version")]
    assert found == every


def test_a_migration_cut_short_is_taken_up_again(empty_store: Store, sql: Run) -> None:
    empty_store.migrate()
    sql("DELETE FROM skialith_migrations")
    sql("DROP TABLE payload_parts")
    empty_store.write_records([event(1)])
    assert empty_store.migrate() == migrations(empty_store)
    assert empty_store.migrate() == []
    assert len(events(empty_store)) == 1


def test_a_newer_schema_is_refused(store: Store, sql: Run) -> None:
    sql("INSERT INTO skialith_migrations (version, name, applied_us) VALUES (999, 'later', 1)")
    with pytest.raises(ValueError, match="schema version 999"):
        store.migrate()


def test_the_first_log_is_bound_and_another_refused(store: Store) -> None:
    store.bind_wal(NAMESPACE, "log-1")
    store.bind_wal(NAMESPACE, "log-1")
    store.bind_wal("other", "log-2")
    with pytest.raises(ValueError, match=r"'log-1'.*'log-2'.*skialith migrate --adopt-wal"):
        store.bind_wal(NAMESPACE, "log-2")
    store.bind_wal(NAMESPACE, "log-2", adopt=True)
    store.bind_wal(NAMESPACE, "log-2")
    with pytest.raises(ValueError, match="'log-2'"):
        store.bind_wal(NAMESPACE, "log-1")


def test_of_logs_that_bind_at_once_one_wins(store: Store) -> None:
    for n in range(10):
        errors = at_once(*(lambda i=i, n=n: store.bind_wal(f"ns{n}", f"log-{i}") for i in range(4)))
        assert sum(error is None for error in errors) == 1
        assert all(error is None or isinstance(error, ValueError) for error in errors)


# ---- traces


def test_traces_are_for_peoples_sql(store: Store, sql: Run) -> None:
    text = '{"kind": "thought", "text": "🦜 \\u0000 \'quoted\' \\\\ %s ?", "n": [1, {"deep": null}]}'
    store.write_traces([trace(1, payload=text, agent="agent ", step=3)])
    store.write_traces([trace(1, payload=text, event_type="tool_call")])
    found = sql(
        "SELECT event_id, step_index, event_type, JSON_EXTRACT(payload, '$.n[1].deep') IS NOT NULL, created_at, logged_at, "
        "store_time_ns, seq FROM agent_traces WHERE event_type = 'thought' AND JSON_EXTRACT(payload, '$.n[0]') = 1"
    )
    assert len(found) == 1
    event_id, step, event_type, _, created_at, logged_at, time_ns, seq = found[0]
    assert (event_id if isinstance(event_id, str) else event_id.decode()) == "e1"
    assert (step, event_type, time_ns, seq) == (3, "thought", TIME_NS + 1, 1)
    assert (str(created_at), str(logged_at)[:19]) == ("2026-01-01 00:00:00.123457", "2026-01-01 00:00:00")


def test_a_trace_is_stored_once(store: Store) -> None:
    first = trace(1)
    store.write_traces([first, trace(2)])
    store.write_traces([first._replace(payload_json="{}"), first])
    assert store.counts(NAMESPACE).traces == 2


@pytest.mark.parametrize("created_us", [-(2**63), 0, 2**63 - 1])
def test_no_clock_is_too_wrong_for_a_trace(store: Store, created_us: int) -> None:
    store.write_traces([trace(1)._replace(created_us=created_us)])
    assert store.counts(NAMESPACE).traces == 1


def test_the_largest_and_deepest_trace(store: Store) -> None:
    deepest = '{"a":' * 30 + "1" + "}" * 30
    largest = '"' + "\\\\" * (PAYLOAD_PART_BYTES // 2 - 1) + '"'
    store.write_traces([trace(1, payload=deepest), trace(2, payload=largest)])
    assert store.counts(NAMESPACE).traces == 2


# ---- dead letters

LETTERS = {
    "event": letter(event(1)),
    "checkpoint": letter(checkpoint(1, step=5)),
    "undecodable": letter(None, raw=b"\xc1garbage"),
    "empty": letter(None, raw=b""),
    "large": letter(event(1, body=noise(BIG, 1)), raw=noise(BIG, 2)),
    "large and alike": letter(event(1, body=noise(BIG, 1)), raw=noise(BIG, 1)),
    "with manifest": letter(event(1, body=noise(BIG, 1))._replace(manifest=manifest(BIG))),
    "body lost": letter(event(1)._replace(body=None, manifest=manifest())),
    "of traces": letter(event(1), sink="trace_ingest"),
    "odd": letter(event(1, agent="a \0🦜", event_id="\0 " + "x" * 5000, event_type="t" * 5000)),
    "no table for it": letter(event(1)._replace(kind=9, codec=200)),
}


@pytest.mark.parametrize("name", LETTERS)
def test_dead_letters_come_back_as_they_went_in(store: Store, sql: Run, name: str) -> None:
    wrote = LETTERS[name]
    store.write_dead_letter(wrote)
    store.write_dead_letter(wrote)
    assert store.dead_letter(wrote.sink, wrote.key) == wrote
    assert store.dead_letters(NAMESPACE) == [wrote]
    assert store.counts(NAMESPACE).dead_letters == 1
    assert store.discard_dead_letter(wrote.sink, wrote.key)
    assert not store.discard_dead_letter(wrote.sink, wrote.key)
    assert store.dead_letter(wrote.sink, wrote.key) is None
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(0,)]


def test_a_dead_letter_always_finds_its_place(store: Store) -> None:
    wrote = letter(event(1, agent="x" * 1021), error="\ud800" * 9000)
    store.write_dead_letter(wrote)
    found = store.dead_letter("writer", wrote.key)
    assert found is not None
    assert found.raw == wrote.raw
    assert found.record is None


def test_the_first_dead_letter_of_a_key_wins_whole(store: Store, sql: Run) -> None:
    key = os.urandom(16)
    first = letter(event(1, key=key, body=noise(BIG, 1)), raw=noise(BIG, 2))
    second = letter(event(2, key=key, body=noise(2 * BIG, 3)), raw=noise(2 * BIG, 4))
    beside = second._replace(sink="trace_ingest")
    store.write_dead_letter(first)
    store.write_dead_letter(second)
    store.write_dead_letter(beside)
    assert store.dead_letter("writer", key) == first
    assert store.dead_letter("trace_ingest", key) == beside
    store.discard_dead_letter("trace_ingest", key)
    assert store.dead_letter("writer", key) == first
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(6,)]


def test_dead_letters_are_listed_by_position(store: Store) -> None:
    late = event(1, time_ns=TIME_NS + 50)
    wrote = [letter(event(3)), letter(None, n=4), letter(event(5), sink="trace_ingest"), letter(late)]
    for one in reversed(wrote):
        store.write_dead_letter(one)
    store.write_dead_letter(letter(event(1, namespace="other")))
    assert store.dead_letters(NAMESPACE) == wrote
    assert store.dead_letters(NAMESPACE, sink="writer") == [wrote[0], wrote[1], wrote[3]]
    assert store.dead_letters(NAMESPACE, limit=2) == wrote[:2]
    place = LetterPlace(wrote[1].position, "writer", wrote[1].key)
    assert store.dead_letters(NAMESPACE, after=place) == wrote[2:]
    assert store.dead_letters(NAMESPACE, after=place._replace(key=b"")) == wrote[1:]
    assert store.dead_letters(NAMESPACE, after=LetterPlace(Position(TIME_NS + 5, 6), "", b"")) == wrote[3:]


@pytest.mark.parametrize("body", [b"small", noise(BIG, 1)], ids=["small", "large"])
@pytest.mark.parametrize("make", [event, checkpoint])
def test_a_replayed_letter_is_a_record_and_gone(
    store: Store, sql: Run, make: Callable[..., Record], body: bytes
) -> None:
    record = make(1, body=body)
    one = letter(record, raw=noise(BIG, 2))
    store.write_dead_letter(one)
    store.replay_dead_letter(one, record, None)
    store.replay_dead_letter(one, record, None)
    assert store.dead_letter("writer", one.key) is None
    found = events(store)[0] if record.kind == Kind.EVENT else store.latest_checkpoint(NAMESPACE, "agent")
    assert found == record
    assert sql("SELECT COUNT(*) FROM payload_parts") == [(3 if len(body) > 9 else 0,)]


def test_a_replayed_trace_is_a_trace_and_gone(store: Store) -> None:
    one = letter(event(1), sink="trace_ingest")
    store.write_dead_letter(one)
    store.replay_dead_letter(one, None, trace(1, key=one.key))
    assert store.counts(NAMESPACE) == Counts(0, 0, 1, 0)


def test_a_replay_that_is_refused_keeps_the_letter(store: Store) -> None:
    record = event(1, event_id="x" * 1021)
    one = letter(record)
    store.write_dead_letter(one)
    with pytest.raises(StoreDataError):
        store.replay_dead_letter(one, record, None)
    with pytest.raises(InvalidArgument, match="discard it"):
        store.replay_dead_letter(one, None, None)
    assert store.dead_letter("writer", one.key) == one
    assert store.counts(NAMESPACE) == Counts(0, 0, 0, 1)


def test_stored_means_done_with(store: Store) -> None:
    records = [event(1), checkpoint(2), event(3), event(4), event(5, namespace="other")]
    store.write_records([*records[:2], records[4]])
    store.write_dead_letter(letter(records[2]))
    store.write_dead_letter(letter(records[3], sink="trace_ingest"))
    assert store.stored(NAMESPACE, [record.key for record in records]) == {record.key for record in records[:3]}
    assert store.stored(NAMESPACE, []) == set()
    many = [os.urandom(16) for _ in range(1300)]
    assert store.stored(NAMESPACE, [*many, records[0].key]) == {records[0].key}


# ---- reading


def test_the_latest_checkpoint_is_the_greatest_by_time_then_sequence(store: Store) -> None:
    assert store.latest_checkpoint(NAMESPACE, "agent") is None
    after_power_loss = checkpoint(3, time_ns=TIME_NS + 900, body=b"newest")._replace(
        created_us=checkpoint(801).created_us
    )
    store.write_records([checkpoint(700), after_power_loss, checkpoint(2, time_ns=TIME_NS + 900), checkpoint(800)])
    assert store.latest_checkpoint(NAMESPACE, "agent") == after_power_loss
    store.write_records([checkpoint(999, agent="another")])
    assert store.latest_checkpoint(NAMESPACE, "agent") == after_power_loss


def test_the_latest_checkpoint_when_the_clock_of_the_log_was_set_back(store: Store) -> None:
    """Times go back while sequences go on; the caller's own times tell that from a power loss."""
    ahead = [checkpoint(n, time_ns=TIME_NS + 10_000 + n) for n in range(1, 6)]
    behind = [checkpoint(n, time_ns=TIME_NS + n, body=b"behind %d" % n) for n in range(6, 9)]
    store.write_records([*behind, *ahead])
    assert store.latest_checkpoint(NAMESPACE, "agent") == behind[-1]
    store.write_records([checkpoint(9, agent="another")])
    dead = checkpoint(10, time_ns=TIME_NS + 10)
    store.write_dead_letter(letter(dead))
    assert store.latest_checkpoint(NAMESPACE, "agent") == dead
    caught_up = checkpoint(11, time_ns=TIME_NS + 20_000)
    store.write_records([caught_up])
    assert store.latest_checkpoint(NAMESPACE, "agent") == caught_up


def test_the_last_event_of_an_agent(store: Store) -> None:
    assert store.last_event(NAMESPACE, "agent") == Position(0, 0)
    store.write_records([event(2), event(1), checkpoint(9), event(5, agent="another")])
    assert store.last_event(NAMESPACE, "agent") == event(2).position
    store.write_dead_letter(letter(event(3)))
    store.write_dead_letter(letter(event(4), sink="trace_ingest"))
    assert store.last_event(NAMESPACE, "agent") == event(3).position


@pytest.mark.parametrize("body", [b"small", noise(BIG, 1)], ids=["small", "large"])
def test_a_dead_checkpoint_is_the_latest_too(store: Store, body: bytes) -> None:
    older, dead, newer = checkpoint(1), checkpoint(2, body=body), checkpoint(3)
    store.write_records([older])
    store.write_dead_letter(letter(event(9)))
    store.write_dead_letter(letter(checkpoint(10), sink="trace_ingest"))
    store.write_dead_letter(letter(dead))
    assert store.latest_checkpoint(NAMESPACE, "agent") == dead
    store.write_records([newer])
    assert store.latest_checkpoint(NAMESPACE, "agent") == newer


def test_pages_of_events(store: Store) -> None:
    # Sequences start again half way, as they do after a power loss; two events share a time.
    late = TIME_NS + 1000
    wrote = [event(n) for n in range(1, 31)] + [event(n, time_ns=late + n // 2) for n in range(1, 31)]
    store.write_records(random.Random(1).sample(wrote, len(wrote)))
    store.write_records([event(7, agent="another"), checkpoint(8)])
    assert events(store) == wrote
    for size in (1, 7, 59, 60, 61):
        paged: list[Record] = []
        after = START
        while (page := store.events(NAMESPACE, "agent", after, None, size)) and len(paged) < 100:
            paged += [record for record, _ in page]
            after = page[-1][0].position
        assert paged == wrote
    for low, high in ((5, 40), (0, 0), (30, 31), (58, 59)):
        found = store.events(NAMESPACE, "agent", wrote[low].position, wrote[high].position, 100)
        assert [record for record, _ in found] == wrote[low + 1 : high + 1]


def test_dead_events_stand_among_the_others(store: Store) -> None:
    wrote = [event(n) for n in range(1, 21)]
    dead = [record for record in wrote if record.position.seq % 3 == 0]
    store.write_records([record for record in wrote if record not in dead])
    for record in dead:
        store.write_dead_letter(letter(record))
        store.write_dead_letter(letter(record, sink="trace_ingest"))
    store.write_dead_letter(letter(checkpoint(50)))
    store.write_dead_letter(letter(None, n=51))
    expected = [(record, record in dead) for record in wrote]
    assert store.events(NAMESPACE, "agent", START, None, 100) == expected
    assert store.events(NAMESPACE, "agent", wrote[3].position, wrote[14].position, 5) == expected[4:9]


def test_what_is_stored_and_dead_is_stored(store: Store) -> None:
    both, moved = event(1), event(2)
    store.write_dead_letter(letter(both))
    store.write_dead_letter(letter(moved._replace(position=Position(TIME_NS + 9, 9))))
    store.write_records([both, moved])
    assert store.events(NAMESPACE, "agent", START, None, 10) == [(both, False), (moved, False)]


def test_a_dead_event_without_body_is_still_listed(store: Store) -> None:
    lost = event(1)._replace(body=None, manifest=manifest())
    store.write_dead_letter(letter(lost))
    assert store.events(NAMESPACE, "agent", START, None, 10) == [(lost, True)]


def test_a_page_ends_before_it_is_too_large(store: Store) -> None:
    wrote = [event(n, body=noise(size, n)) for n, size in enumerate((10, 500, 5, BIG, BIG, 20, 600), 1)]
    store.write_records([record for record in wrote if record.position.seq != 4])
    store.write_dead_letter(letter(wrote[3]))
    pages: list[list[Record]] = []
    after = START
    while (
        page := events(store, max_bytes=600)
        if not pages
        else store.events(NAMESPACE, "agent", after, None, 9, max_bytes=600)
    ):
        records = [one if isinstance(one, Record) else one[0] for one in page]
        pages.append(records)
        after = records[-1].position
    assert [len(page) for page in pages] == [3, 1, 1, 1, 1]
    assert [record for page in pages for record in page] == wrote


class Meddled:
    """A connection on which something happens before its ``n``-th query."""

    def __init__(self, session: read.Queries, n: int, meddle: Callable[[], object]) -> None:
        self.session = session
        self.by = session.by
        self.left = n
        self.meddle = meddle

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        self.left -= 1
        if self.left == 0:
            self.meddle()
        return self.session.rows(sql, args)


@pytest.mark.parametrize("body", [b"small", noise(BIG, 1)], ids=["small", "large"])
@pytest.mark.parametrize("n", range(1, 8))
def test_what_is_replayed_between_two_queries_is_not_missed(store: Store, n: int, body: bytes) -> None:
    assert isinstance(store, SqlStore)
    older, wrote, latest = event(1), event(2, body=body), checkpoint(3, body=body)
    store.write_records([older, checkpoint(1)])
    for record in (wrote, latest):
        store.write_dead_letter(letter(record))

    def found(what: Callable[[read.Queries], Any], record: Record) -> Any:
        with store.reading() as session:
            return what(Meddled(session, n, lambda: store.replay_dead_letter(letter(record), record, None)))

    agent = (NAMESPACE, "agent")
    page = found(lambda session: read.events(session, agent, START, None, 9, None), wrote)
    assert [record for record, _ in page] == [older, wrote]
    assert found(lambda session: read.latest_checkpoint(session, *agent), latest) == latest
    keys = [wrote.key, latest.key]
    for record in (wrote, latest):
        store.write_dead_letter(letter(record))
        assert found(lambda session: read.stored(session, NAMESPACE, keys), record) == set(keys)


def test_events_are_read_while_dead_letters_are_replayed(store: Store) -> None:
    wrote = [event(n, body=noise(BIG, n) if n % 4 == 0 else b"x") for n in range(1, 25)]
    store.write_records(wrote[::2])
    for record in wrote[1::2]:
        store.write_dead_letter(letter(record))
    seen: list[list[Record]] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.append(events(store))

    def replay() -> None:
        try:
            for record in wrote[1::2]:
                store.replay_dead_letter(letter(record), record, None)
        finally:
            done.set()

    assert at_once(look, replay) == [None, None]
    assert seen
    assert all(found == wrote for found in seen)
    assert store.counts(NAMESPACE).dead_letters == 0


def test_a_page_of_a_long_history_is_as_fast_as_the_first(store: Store) -> None:
    total = 100_000
    for start in range(1, total, 5000):
        store.write_records([event(n) for n in range(start, start + 5000)])
    times: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(7):
        for name, n in (("first", 0), ("last", total - 600)):
            began = time.perf_counter()
            page = store.events(NAMESPACE, "agent", Position(TIME_NS + n, n), None, 256)
            times[name].append(time.perf_counter() - began)
            assert [record.position.seq for record, _ in page] == list(range(n + 1, n + 257))
    # A page that were not found by the index would read and sort a hundred thousand rows, 200 ms at the least.
    assert min(times["last"]) < 5 * min(times["first"]) + 0.02
    began = time.perf_counter()
    assert store.latest_checkpoint(NAMESPACE, "agent") is None
    assert time.perf_counter() - began < 1


def test_agents_are_listed_in_pages(store: Store) -> None:
    names = [f"agent-{n:02}" for n in range(25)]
    store.write_records([event(n, agent=name) for n, name in enumerate(names[:20], 1)])
    store.write_records([checkpoint(50 + n, agent=name, step=n) for n, name in enumerate(names[10:22], 1)])
    for name in names[22:]:
        store.write_dead_letter(letter(checkpoint(90, agent=name, step=9)))
    store.write_dead_letter(letter(event(91, agent="only traces"), sink="trace_ingest"))
    found, after = [], ""
    while page := store.agents(NAMESPACE, after=after, limit=4):
        assert len(page) <= 4
        found += page
        after = page[-1].agent_id
    assert [agent.agent_id for agent in found] == names
    assert [agent.events for agent in found] == [1] * 20 + [0] * 5
    assert [agent.checkpoints for agent in found] == [0] * 10 + [1] * 12 + [0] * 3
    assert [agent.step_index for agent in found] == [0] * 10 + list(range(1, 13)) + [9] * 3
    assert found[0].last_us == (TIME_NS + 1) // 1000
    assert found[10].last_us == (TIME_NS + 51) // 1000


def test_counts(store: Store) -> None:
    store.write_records([event(1), event(2), checkpoint(3)])
    store.write_traces([trace(1)])
    store.write_dead_letter(letter(None))
    assert store.counts(NAMESPACE) == Counts(2, 1, 1, 1)


def test_readers_see_what_was_just_committed(store: Store, store_url: str) -> None:
    other = open_store(store_url)
    try:
        for n in range(1, 20):
            other.write_records([checkpoint(n, step=n)])
            latest = store.latest_checkpoint(NAMESPACE, "agent")
            assert latest is not None
            assert latest.step_index == n
    finally:
        other.close()


# ---- threads


def test_more_threads_than_connections(store: Store) -> None:
    def work(i: int) -> None:
        for n in range(5):
            store.write_records([event(n + 1, agent=f"a{i}"), checkpoint(n + 1, agent=f"a{i}", step=n)])
            assert len(events(store, f"a{i}")) == n + 1
            latest = store.latest_checkpoint(NAMESPACE, f"a{i}")
            assert latest is not None
            assert latest.step_index == n

    threads = 3 * DATABASE_CONNECTIONS
    assert at_once(*(lambda i=i: work(i) for i in range(threads))) == [None] * threads
    assert store.counts(NAMESPACE)[:2] == (5 * threads, 5 * threads)
