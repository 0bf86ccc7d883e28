"""The latest checkpoint that a process keeps: it is never older than the log, and asks the database only when it must."""

from __future__ import annotations

import random
import secrets
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import ChannelVersions
from langgraph.checkpoint.memory import InMemorySaver

from skialith import graph_recent, graphs
from skialith.config import GRAPH_TRUST_SECONDS
from skialith.errors import StoreUnavailable
from skialith.langchain import SkialithCheckpointer
from skialith.records import DeadLetter
from skialith.stores.graph_read import GraphTables
from tests.fixtures.graphs import OpenSaver, at, checkpoint, id_of, metadata, put, settle
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer, wait_until

SECONDS = 5.0


def counted(saver: SkialithCheckpointer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The threads that are looked at anew from now on."""
    recent = saver._door.open()._recent
    looks: list[str] = []
    look = recent._look

    def counting(thread_id: str) -> Any:
        looks.append(thread_id)
        return look(thread_id)

    monkeypatch.setattr(recent, "_look", counting)
    return looks


def test_what_another_process_does_is_seen_at_once(open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = open_saver(), open_saver(writer="off", timeout=9.0)
    looks = counted(one, monkeypatch)
    first = put(one, at("t"), {"a": 1})
    for _ in range(3):
        assert one.get_tuple(at("t")) is not None
    assert len(looks) == 1
    other.put_writes(first, [("b", 3)], "task")
    found = one.get_tuple(at("t"))
    assert found is not None and found.pending_writes == [("task", "b", 3)]
    assert len(looks) == 1
    second = put(other, first, {"a": 1, "b": 2}, versions={"a": 1, "b": 1}, new={"b": 1})
    found = one.get_tuple(at("t"))
    assert found is not None and found.config == second and found.checkpoint["channel_values"] == {"a": 1, "b": 2}
    other.put_writes(second, [("b", 3)], "task")
    other.prune(["t"])
    found = one.get_tuple(at("t"))
    assert found is not None and found.pending_writes == [("task", "b", 3)]
    other.delete_thread("t")
    assert one.get_tuple(at("t")) is None


def test_two_processes_and_a_plain_saver_agree_for_some_seconds(open_saver: OpenSaver) -> None:
    """Longer than operations are kept in the log, so that kept looks run out between the others."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    savers = [open_saver(), open_saver(writer="off", timeout=9.0)]
    plain = InMemorySaver()
    threads = [f"t{n}" for n in range(4)]
    ends = time.monotonic() + SECONDS
    rounds = 0
    while time.monotonic() < ends:
        rounds += 1
        saver, thread = dice.choice(savers), dice.choice(threads)
        latest = plain.get_tuple(at(thread))
        kind = dice.choices(["put", "writes", "delete"], [6, 4, 1])[0]
        if kind == "put":
            values = {} if latest is None else dict(latest.checkpoint["channel_values"])
            versions = {} if latest is None else dict(latest.checkpoint["channel_versions"])
            new: ChannelVersions = {dice.choice("abc"): secrets.token_hex(4) for _ in range(2)}
            values.update(dict.fromkeys(new, rounds))
            made = checkpoint(values, {**versions, **new})
            config = at(thread) if latest is None else latest.config
            for each in (saver, plain):
                each.put(config, made, metadata(rounds), new)
        elif kind == "writes" and latest is not None:
            task = f"task{dice.randrange(2)}"
            for each in (saver, plain):
                each.put_writes(latest.config, [("a", rounds)], task)
        elif kind == "delete":
            for each in (saver, plain):
                each.delete_thread(thread)
        if dice.random() < 0.1:
            time.sleep(dice.random() * GRAPH_TRUST_SECONDS / 8)
        wanted, found = plain.get_tuple(at(thread)), dice.choice(savers).get_tuple(at(thread))
        assert (found is None) == (wanted is None)
        if wanted is not None and found is not None:
            assert found.config == wanted.config and found.checkpoint == wanted.checkpoint
            assert found.pending_writes == wanted.pending_writes
    assert rounds > 50


def test_a_kept_look_needs_no_database_until_it_runs_out(
    open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_saver()
    put(saver, at("t"), {"a": 1})
    settle(saver)
    assert saver.get_tuple(at("t")) is not None

    def away(namespace: str) -> Any:
        raise StoreUnavailable("away")

    monkeypatch.setattr(saver._door.open().store, "graphs", away)
    assert saver.get_tuple(at("t")) is not None
    monkeypatch.setattr(graph_recent, "GRAPH_TRUST_SECONDS", 0.0)
    with pytest.raises(StoreUnavailable):
        saver.get_tuple(at("t"))


def test_while_the_database_is_away_the_log_alone_tells_the_latest_checkpoint(
    tmp_path: Path, open_saver: OpenSaver
) -> None:
    """A value that was stored and trimmed long ago is written once more, and then it stands in the log again."""
    big = "x" * 1000
    with MariaDB(tmp_path / "mariadb") as server:
        url = server.url("away")
        saver = open_saver(database_url=url)
        engine = saver._door.open()
        first = put(saver, at("t"), {"big": big, "small": 1})
        settle(saver)
        server.kill()
        second = put(saver, first, {"big": big, "small": 2}, versions={"big": 1, "small": 2}, new={"small": 2})
        wait_until(lambda: engine.wal.stands_alone_from > 0, 30, "it is noticed that the writer stands still")
        appended = engine.wal.stream.tally.last_seq
        third = put(saver, second, {"big": big, "small": 3}, versions={"big": 1, "small": 3}, new={"small": 3})
        put(saver, third, {"big": big, "small": 4}, versions={"big": 1, "small": 4}, new={"small": 4})
        operations = engine.wal.operations_after("t", appended, time.monotonic() + 5)
        assert operations is not None
        written = [graphs.operation(record) for record in operations]
        assert [len(each.blobs) for each in written if isinstance(each, graphs.Put)] == [2, 1]
        other = open_saver(database_url=url, writer="off", timeout=9.0)
        for config, small in ((at("t"), 4), (third, 3), (second, 2)):
            found = other.get_tuple(config)
            assert found is not None and found.checkpoint["channel_values"] == {"big": big, "small": small}
        with pytest.raises(StoreUnavailable, match="thread 't'"):
            other.get_tuple(first)
        server.start()
        wait_until(lambda: engine.wal.stands_alone_from == 0, 30, "the writer goes on")
        assert saver.flush(20) == 0


def test_a_database_that_goes_in_the_midst_of_a_look_is_away_for_it(
    tmp_path: Path, open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its broken connection is nobody's any more."""
    with MariaDB(tmp_path / "mariadb") as server:
        saver = open_saver(database_url=server.url("goes"), writer="off")
        engine = saver._door.open()
        engine.store.migrate()
        engine.store.bind_wal(engine.config.namespace, engine.wal.stream.wal_id)
        config = put(saver, at("t"), {"a": 1})
        cells = GraphTables.cells

        def killed(self: GraphTables, *arguments: Any) -> Any:
            for (number,) in server.run("SELECT id FROM information_schema.processlist WHERE db = 'goes'"):
                server.run(f"KILL {number}")
            return cells(self, *arguments)

        monkeypatch.setattr(GraphTables, "cells", killed)
        found = saver.get_tuple(at("t"))
        assert found is not None and found.config == config
        monkeypatch.setattr(GraphTables, "cells", cells)
        assert [each.config for each in saver.list(at("t"))] == [config]


def test_another_connection_is_another_log(
    nats_server: NatsServer, open_saver: OpenSaver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = open_saver(nats_url=nats_server.url)
    looks = counted(saver, monkeypatch)
    put(saver, at("t"), {"a": 1})
    assert saver.get_tuple(at("t")) is not None
    nats_server.kill()
    nats_server.start()
    assert saver.get_tuple(at("t")) is not None
    assert len(looks) == 2


def test_what_a_server_lost_is_written_again(nats_server: NatsServer, open_saver: OpenSaver, tmp_path: Path) -> None:
    """A power loss takes what was acknowledged last; who goes on has the values that did not change since."""
    saver = open_saver(nats_url=nats_server.url, writer="off")
    first = put(saver, at("t"), {"a": 1})
    nats_server.stop()
    shutil.copytree(nats_server.store, tmp_path / "copy")
    nats_server.start()
    wal = saver._door.open().wal
    lost = put(saver, first, {"a": 1, "b": "kept"}, versions={"a": 1, "b": 1}, new={"b": 1})
    before = wal.server_id
    nats_server.kill()
    nats_server.wipe()
    shutil.copytree(tmp_path / "copy", nats_server.store)
    nats_server.start()
    wait_until(lambda: wal.connection.is_open and wal.server_id != before, 20, "it is connected again")
    goes_on = put(saver, lost, {"a": 2, "b": "kept"}, versions={"a": 2, "b": 1}, new={"a": 2})
    found = saver.get_tuple(goes_on)
    assert found is not None and found.checkpoint["channel_values"] == {"a": 2, "b": "kept"}


def test_what_is_discarded_does_not_stay_in_sight(
    open_saver: OpenSaver, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discarded dead letter is no operation, so the log does not tell of it."""
    saver = open_saver()
    first = put(saver, at("t"), {"a": 1})
    saver.put_writes(first, [("b", 1)], "task")
    found = saver.get_tuple(at("t"))
    assert found is not None and found.pending_writes == [("task", "b", 1)]
    settle(saver)
    store = saver._door.open().store
    with store.graphs(settings["namespace"]) as threads:
        thread = graphs.thread_key(settings["namespace"], "t")
        cell = graphs.cell_key(graphs.ns_key(thread, ""), id_of(first))
        (lost,) = threads.contents([cell], [])[1]
    lost = lost._replace(
        agent_id="t", event_type="put_writes", position=lost.position._replace(seq=lost.position.seq + 1)
    )
    lost = lost._replace(key=secrets.token_bytes(16))
    letter = DeadLetter(lost.key, "writer", lost.namespace, "subject", lost.position, 1406, "too long", 1, b"raw", lost)
    store.write_dead_letter(letter)
    looks = counted(saver, monkeypatch)
    for _ in range(2):
        assert saver.get_tuple(at("t")) is not None
    assert len(looks) == 2  # what a dead letter is part of is not kept
    assert store.discard_dead_letter("writer", lost.key)
    for _ in range(2):
        assert saver.get_tuple(at("t")) is not None
    assert len(looks) == 3
    monkeypatch.setattr(graph_recent, "GRAPH_LOOK_SECONDS", 0.0)
    assert saver.get_tuple(at("t")) is not None
    assert len(looks) == 4


def test_operations_stay_in_the_log_for_a_while_after_they_were_stored(open_saver: OpenSaver) -> None:
    saver = open_saver()
    engine = saver._door.open()
    put(saver, at("t"), {"a": 1})
    begun = time.monotonic()
    saver.flush(20)

    def left() -> int:
        last = engine.wal.last_operation("t", time.monotonic() + 5)
        assert last is not None
        return last[0]

    wait_until(lambda: left() == 0, 20, "the operation is trimmed")
    assert time.monotonic() - begun >= engine.wal.stream.keep_graphs_seconds


def test_processes_that_live_for_a_moment_leave_no_growing_log(open_saver: OpenSaver) -> None:
    """None of them sees its own operations grow old enough to go; the next one does."""
    kept = open_saver(writer="off", timeout=9.0)._door.open().wal
    oldest = []
    ends = time.monotonic() + 3 * kept.stream.keep_graphs_seconds
    while time.monotonic() < ends:
        saver = open_saver()
        put(saver, at("t"), {"a": 1})
        saver.close()
        operations = kept.operations("t", time.monotonic() + 5).live
        oldest.append(operations[0].position.seq)
        assert time.time_ns() - operations[0].position.time_ns < 2e9 * kept.stream.keep_graphs_seconds
    assert oldest[-1] > oldest[0]


def test_a_question_to_a_server_that_hangs_ends_at_its_deadline(nats_server: NatsServer, open_saver: OpenSaver) -> None:
    saver = open_saver(nats_url=nats_server.url, writer="off")
    wire = saver._door.open().wal.connection.wire
    nats_server.pause()
    try:
        begun = time.monotonic()
        assert wire.ask("$JS.API.INFO", b"", begun + 0.2) is None
        assert 0.2 <= time.monotonic() - begun < 2
    finally:
        nats_server.resume()
    reply = wire.ask("$JS.API.INFO", b"", time.monotonic() + 5)
    assert reply is not None and b"account_info_response" in reply.data


def test_questions_of_many_threads_get_their_own_answers(open_saver: OpenSaver) -> None:
    saver = open_saver(writer="off")
    engine = saver._door.open()
    for n in range(8):
        for _ in range(n + 1):
            put(saver, at(f"t{n}"), {"a": 1})
    wanted = {}
    for n in range(8):
        records = engine.wal.operations(graphs.thread_name(f"t{n}"), time.monotonic() + 5).live
        wanted[f"t{n}"] = records[-1].position.seq
    wrong: list[object] = []

    def ask(name: str) -> None:
        for _ in range(200):
            last = engine.wal.last_operation(name, time.monotonic() + 5)
            if last is None or last[0] != wanted[name]:
                wrong.append((name, last))

    threads = [threading.Thread(target=ask, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
