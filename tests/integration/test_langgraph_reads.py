"""Reading checkpoints while records move from the log to the database, and while one of the two cannot tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from skialith import _fastpath, langchain
from skialith.errors import BodyMissing, ChannelValueMissing, StoreUnavailable
from skialith.graph_past import Filled, Past
from skialith.graphs import Drop, Put, PutWrites, blob_id, record
from skialith.langchain import SkialithCheckpointer
from skialith.records import DeadLetter, Position, Record, decode_record
from skialith.wal.stream import WRITER
from skialith.writer.sinks import EventSink
from tests.fixtures.graphs import OpenSaver, at, checkpoint, id_of, metadata, put, settle
from tests.fixtures.nats import wait_until
from tests.fixtures.stores import noise, outside


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


def test_what_is_pruned_under_a_look_is_gone_and_no_error(
    open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, other = open_saver(), open_saver(timeout=19)
    fill = Past.fill

    def prepared(thread: str) -> list[str]:
        first = put(saver, at(thread), {"a": 1}, versions={"a": 1})
        second = put(saver, first, {"a": 2}, versions={"a": 2})
        settle(saver)
        left = [thread]

        def pruned(self: Past, puts: Any, *more: Any) -> Any:
            if left:
                other.prune([left.pop()])
                settle(other)
            return fill(self, puts, *more)

        monkeypatch.setattr(Past, "fill", pruned)
        return [id_of(first), id_of(second)]

    first, second = prepared("listed")
    assert [id_of(each.config) for each in saver.list(at("listed"))] == [second]
    first, _ = prepared("one")
    assert saver.get_tuple(at("one", "", first)) is None


# ---- large records that leave the log meanwhile


def head_of(saver: SkialithCheckpointer, thread: str) -> Record:
    """The head of the first record on a thread, as a writer pulls it."""
    wal = saver._door.open().wal
    query = {"seq": 1, "next_by_subj": wal.stream.subjects.graph(thread), "batch": 1}
    (message,) = wal.call(lambda: wal.reader.direct(wal.stream.name, query, time.monotonic() + 5), 5)
    seq = int((message.headers or {})["Nats-Sequence"])
    return decode_record(wal.stream.namespace, message.data, Position(1, seq))


def test_a_large_record_that_another_writer_stored_and_trimmed_is_done_with(open_saver: OpenSaver) -> None:
    saver = open_saver(writer="off")
    first = put(saver, at("put"), {"a": noise(3_000_000, 1)})
    saver.put_writes(at("writes", "", id_of(first)), [("a", noise(3_000_000, 2))], "task")
    lost = [head_of(saver, thread) for thread in ("put", "writes")]
    never = lost[0]._replace(record_id="0" * 64, key=bytes(16))
    assert all(record.manifest is not None and record.body is None for record in lost)
    other = open_saver()
    wait_until(lambda: other._door.open().wal.status(5).consumers[0].records == 0, 20, "all is stored")
    settle(other)
    engine = other._door.open()
    sink, source = EventSink(engine.store), engine.wal.source(WRITER)
    assert [sink.load(record, source) for record in lost] == [None, None]
    with pytest.raises(BodyMissing):
        sink.load(never, source)
    # Deleted is done with too.
    saver.delete_thread("put")
    wait_until(lambda: engine.wal.status(5).consumers[0].records == 0, 20, "the deletion is stored")
    assert sink.load(lost[0], source) is None


def test_a_body_that_is_trimmed_under_the_look_is_read_from_the_database(
    open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, other = open_saver(writer="off"), open_saver()
    config = put(saver, at("t"), {"a": noise(3_000_000, 1)})
    reader = saver._door.open().wal.reader
    with_body = reader.with_body

    async def later(record: Record, deadline: float) -> Record:
        wal = other._door.open().wal
        wait_until(lambda: wal.status(5).consumers[0].records == 0, 20, "all is stored")
        wal.stream.keep_graphs_seconds = 0.0
        wal.trim()
        return await with_body(record, deadline)

    monkeypatch.setattr(reader, "with_body", later)
    for asked in (at("t"), config):
        found = saver.get_tuple(asked)
        assert found is not None and found.checkpoint["channel_values"] == {"a": noise(3_000_000, 1)}


# ---- a database that is away, or refuses


def test_while_the_database_is_away_the_log_tells_what_it_can(open_saver: OpenSaver, tmp_path: Path) -> None:
    database = tmp_path / "away.db"
    database.mkdir()  # a directory where the file should be: the database cannot be opened
    saver = open_saver(database_url=f"sqlite:///{database}")
    first = put(saver, at("t"), {"a": 1, "big": noise(1_500_000, 1)})
    saver.put_writes(first, [("a", 2)], "task")
    second = put(saver, first, {"a": 2, "big": noise(1_500_000, 1)}, versions={"a": 2, "big": 1}, new={"a": 2})
    for asked, a in ((at("t"), 2), (first, 1), (second, 2)):
        found = saver.get_tuple(asked)
        assert found is not None
        assert found.checkpoint["channel_values"] == {"a": a, "big": noise(1_500_000, 1)}
    found = saver.get_tuple(first)
    assert found is not None and found.pending_writes == [("task", "a", 2)]
    for question in (
        lambda: list(saver.list(at("t"))),
        lambda: saver.get_tuple(at("unknown")),
        lambda: saver.get_tuple(at("t", "", "unknown")),
        lambda: saver.prune(["t"]),
        lambda: saver.copy_thread("t", "u"),
        lambda: saver.delete_for_runs(["run"]),
    ):
        with pytest.raises(StoreUnavailable, match="call again when the database is back") as caught:
            question()
        assert caught.value.retryable
    saver.delete_thread("gone")
    database.rmdir()
    saver.flush(25)
    assert [id_of(each.config) for each in saver.list(at("t"))] == [id_of(second), id_of(first)]
    assert saver.get_tuple(at("unknown")) is None


def refuse(url: str, checkpoint_id: str, *, letters_too: bool) -> None:
    """From now on the database refuses this checkpoint for its data, and dead letters too if asked."""
    with outside(url) as run:
        for table in ("graph_checkpoints", "dead_letters")[: 2 if letters_too else 1]:
            if url.startswith("sqlite"):
                when = (
                    f"WHEN CAST(NEW.checkpoint_id AS TEXT) = '{checkpoint_id}' " if table == "graph_checkpoints" else ""
                )
                run(
                    f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} {when}BEGIN SELECT RAISE(ABORT, 'refused'); END"
                )
            else:
                when = f"NEW.checkpoint_id = '{checkpoint_id}'" if table == "graph_checkpoints" else "TRUE"
                run(
                    f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} FOR EACH ROW IF {when} THEN "
                    "SIGNAL SQLSTATE '22001' SET MYSQL_ERRNO = 1406, MESSAGE_TEXT = 'refused'; END IF"
                )


@pytest.mark.parametrize("letters", ["table", "stream"])
@pytest.mark.parametrize("database", ["sqlite", "mysql"])
def test_a_checkpoint_the_database_refuses_is_still_read(
    request: pytest.FixtureRequest, open_saver: OpenSaver, settings: dict[str, Any], database: str, letters: str
) -> None:
    url = request.getfixturevalue("mariadb_url") if database == "mysql" else settings["database_url"]
    saver = open_saver(database_url=url)
    first = put(saver, at("t"), {"a": 1, "b": 1})
    saver.flush()
    refused = "zz-refused"
    refuse(url, refused, letters_too=letters == "stream")
    second = put(
        saver, first, {"a": 2, "b": 1}, versions={"a": 2, "b": 1}, new={"a": 2}, checkpoint_id=refused, run_id="run"
    )
    saver.put_writes(second, [("a", 3)], "task")
    assert saver.flush(20) == 1
    with outside(url) as run:
        assert run("SELECT COUNT(*) FROM dead_letters") == [(1 if letters == "table" else 0,)]
    reader = open_saver(database_url=url, writer="off")  # has seen nothing of it yet
    for asked in (at("t"), second):
        found = reader.get_tuple(asked)
        assert found is not None and found.config == second
        assert found.checkpoint["channel_values"] == {"a": 2, "b": 1}
        assert found.pending_writes == [("task", "a", 3)]
    assert [id_of(each.config) for each in reader.list(at("t"))] == [refused, id_of(first)]
    # What was deleted stays so, although the letter is still there.
    reader.delete_for_runs(["run"])
    assert [id_of(each.config) for each in reader.list(at("t"))] == [id_of(first)]
    saver.delete_thread("t")
    saver.flush(20)
    assert list(reader.list(at("t"))) == [] and reader.get_tuple(second) is None


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
    raw = _fastpath.encode_record(
        made.kind,
        made.agent_id,
        made.record_id,
        made.key,
        made.step_index,
        made.event_type,
        made.created_us,
        made.codec,
        made.body,
        None,
    )
    subject = engine.wal.stream.subjects.graph("t")
    engine.wal.source("writer").bury(
        DeadLetter(made.key, "writer", made.namespace, subject, made.position, 1406, "too long", 1, raw, made)
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


def test_large_checkpoints_are_listed_a_few_at_a_time(
    saver: SkialithCheckpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a long history of large states needs no more memory than some of them."""
    config = at("t")
    for n in range(30):
        config = put(saver, config, {"a": noise(200_000, n)}, versions={"a": n})
    filled: list[int] = []
    fill = Past.fill

    def counted(self: Past, puts: Sequence[Put], *only: Any) -> list[Filled]:
        filled.append(len(puts))
        return fill(self, puts, *only)

    monkeypatch.setattr(Past, "fill", counted)
    assert len([*saver.list(at("t"))]) == 30
    assert filled == [10, 20, 0]
    filled.clear()
    monkeypatch.setattr(langchain, "GRAPH_PAGE_BYTES", 1_000_000)
    assert [len(each.checkpoint["channel_values"]["a"]) for each in saver.list(at("t"))] == [200_000] * 30
    assert filled == [10, 4, 4, 4, 4, 4, 0]


def test_a_delta_channel_whose_value_was_deleted_is_not_rebuilt_from_less(saver: SkialithCheckpointer) -> None:
    first = put(saver, at("t"), {"log": ["seed"]})
    saver.put_writes(first, [("log", "more")], "task")
    second = put(saver, first, {}, versions={"log": 2})
    assert saver.get_delta_channel_history(config=second, channels=["log"]) == {
        "log": {"seed": ["seed"], "writes": [("task", "log", "more")]}
    }
    saver._append(saver._door.open(), Drop("t", [], [("", blob_id("log", 1))]))
    with pytest.raises(ChannelValueMissing, match="'log'"):
        saver.get_delta_channel_history(config=second, channels=["log"])


def test_the_ancestors_of_a_checkpoint_may_have_any_ids(saver: SkialithCheckpointer) -> None:
    """They are times by the clocks of several machines."""
    config, plain = at("t"), InMemorySaver()
    for n, checkpoint_id in enumerate(["3", "1", "5", "4", "2", "0", "6"]):
        there: dict[str, Any] = {"log": ["seed"]} if n == 1 else {}
        made = checkpoint(there, {"log": n}, checkpoint_id)
        for each in (saver, plain):
            each.put(config, made, metadata(), {"log": n})
        config = at("t", "", checkpoint_id)
        for each in (saver, plain):
            each.put_writes(config, [("log", n)], "task")
        found = saver.get_delta_channel_history(config=config, channels=["log"])
        assert found == plain.get_delta_channel_history(config=config, channels=["log"])
    put(saver, at("own", "", "1"), {}, checkpoint_id="1")
    assert saver.get_delta_channel_history(config=at("own"), channels=["log"]) == {"log": {"writes": []}}
