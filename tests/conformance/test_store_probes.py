"""Probes: what a store finds out about itself before a record is blamed; every store passes these tests."""

from __future__ import annotations

import pytest

from skialith.config import PAYLOAD_PART_BYTES
from skialith.errors import StoreDataError, StoreMisconfigured, StoreUnavailable
from skialith.graphs import Delete, Drop
from skialith.records import Record
from skialith.stores import Store

from ..fixtures.graph_model import at_position, put, value, writes
from ..fixtures.stores import TABLES, Run, checkpoint, event, noise, step, trace

BIG = PAYLOAD_PART_BYTES + 17


@pytest.mark.parametrize(
    "table",
    ["agent_steps", "payload_parts", "dead_letters", "graph_threads", "graph_checkpoints", "graph_blobs"],
)
def test_a_probe_of_everything_misses_any_table(store: Store, sql: Run, table: str) -> None:
    sql(f"DROP TABLE {table}")
    with pytest.raises(StoreUnavailable, match="skialith migrate"):
        store.probe()


def narrow(sql: Run, name: str, table: str, longest: int) -> None:
    """A table that takes no payload over a length any more, as if somebody had altered it."""
    column = "payload" if table == "agent_traces" else "data" if table == "payload_parts" else "body"
    if name == "mysql":
        sql(f"ALTER TABLE {table} MODIFY {column} VARBINARY({longest})")
    else:
        sql(
            f"CREATE TRIGGER narrow_{table} BEFORE INSERT ON {table} WHEN length(NEW.{column}) > {longest} "
            "BEGIN SELECT RAISE(ABORT, 'too long'); END"
        )


@pytest.mark.parametrize(
    ("table", "record"),
    [
        ("agent_events", event(1, body=noise(3000, 1))),
        ("agent_checkpoints", checkpoint(1, body=noise(3000, 1))),
        ("payload_parts", event(1, body=noise(BIG, 1))),
        ("graph_checkpoints", at_position(1, put("t", "", "1", head=value(noise(3000, 1))))),
        ("graph_blobs", at_position(1, put("t", "", "1", blobs={bytes(16): value(noise(3000, 1))}))),
        ("graph_writes", at_position(1, writes("t", "", "1", text="~" * 3000))),
    ],
)
def test_a_narrower_table_is_not_the_records_fault(store: Store, sql: Run, table: str, record: Record) -> None:
    narrow(sql, store.name, table, 2000)
    with pytest.raises(StoreDataError):
        store.write_records([record])
    store.probe("writer")
    with pytest.raises(StoreUnavailable, match="no record is to blame"):
        store.probe("writer", record)
    store.probe("writer", event(1))


def test_a_narrower_table_of_traces_is_not_the_traces_fault(store: Store, sql: Run) -> None:
    narrow(sql, store.name, "agent_traces", 2000)
    long = trace(1, payload='{"text": "' + "~" * 3000 + '"}')
    with pytest.raises(StoreDataError):
        store.write_traces([long])
    with pytest.raises(StoreUnavailable, match="no record is to blame"):
        store.probe("trace_ingest", long)
    store.probe("trace_ingest", trace(1))


@pytest.mark.parametrize(
    "record",
    [
        step(1, agent="\U0001f99c" * 255, step_id="\u00e9" * 255),
        checkpoint(1, body=b""),
        event(1, event_type="\u6f22" * 255, body=noise(BIG, 1)),
        at_position(1, Delete("t")),
        at_position(1, Drop("t", [("", "1")], [("", bytes(16))])),
        at_position(1, put("t", "", "1"))._replace(body=b"no operation"),
    ],
)
def test_a_healthy_database_takes_a_probe_of_any_shape(store: Store, sql: Run, record: Record) -> None:
    store.probe("writer", record)
    for table in TABLES:
        if table != "skialith_migrations":
            assert sql(f"SELECT COUNT(*) FROM {table}") == [(0,)], table


def test_a_unique_index_of_somebody_else_is_refused(store: Store, sql: Run) -> None:
    """Both databases would pass over a record that it refuses, and the writer would acknowledge it: lost without a word."""
    sql("CREATE TABLE of_somebody_else (name VARCHAR(20))")
    sql("CREATE UNIQUE INDEX by_name ON of_somebody_else (name)")
    store.migrate()
    sql("CREATE UNIQUE INDEX by_step ON agent_events (namespace, step_index)")
    for look in (store.migrate, store.probe):
        with pytest.raises(StoreMisconfigured, match="unique index 'by_step'"):
            look()
    sql("DROP INDEX by_step" + (" ON agent_events" if store.name == "mysql" else ""))
    store.migrate()
    store.probe()
    sql("DROP TABLE of_somebody_else")
