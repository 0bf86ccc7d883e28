"""What is particular to SQLite: the file and its modes, locks, durability, and what its errors mean."""

from __future__ import annotations

import itertools
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from skialith.errors import StoreDataError, StoreError, StoreUnavailable
from skialith.records import Position
from skialith.stores import pool as pool_module
from skialith.stores import sqlite as sqlite_module
from skialith.stores.base import LetterPlace, Scope
from skialith.stores.sqlite import SqliteStore

from ..fixtures.stores import NAMESPACE, event, letter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "store.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(f"sqlite:///{path}".replace(" ", "%20"))
    yield store
    store.close()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pragma(store: SqliteStore, name: str) -> object:
    with store.reading() as session:
        return session.rows(f"PRAGMA {name}")[0][0]


def test_file_and_folder_are_the_users_own(store: SqliteStore, path: Path) -> None:
    assert not path.parent.exists()
    old = os.umask(0)
    try:
        store.migrate()
        store.write_records([event(1)])
    finally:
        os.umask(old)
    assert mode(path.parent) == 0o700
    assert [mode(file) for file in sorted(path.parent.iterdir())] == [0o600] * 3


def test_an_existing_file_keeps_its_mode(store: SqliteStore, path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    path.touch()
    path.chmod(0o640)
    store.migrate()
    assert mode(path) == 0o640


def test_how_it_is_opened(store: SqliteStore) -> None:
    assert pragma(store, "journal_mode") == "wal"
    assert pragma(store, "synchronous") == 1
    assert pragma(store, "busy_timeout") == 5000
    power = SqliteStore(f"sqlite:///{store.path}", power=True)
    assert pragma(power, "synchronous") == 2
    power.close()


def test_a_second_connection_does_not_drop_the_locks_of_the_first(store: SqliteStore, path: Path) -> None:
    # Another process that finds no lock takes itself for the last user and deletes the WAL with our commits.
    store.migrate()
    other = SqliteStore(f"sqlite:///{path}")
    with store.reading(), store.reading():
        other.ping()
    other.close()
    inode = f":{path.stat().st_ino} "
    locks = [
        line for line in Path("/proc/locks").read_text().splitlines() if inode in line and f" {os.getpid()} " in line
    ]
    assert any("READ" in line for line in locks)


def test_a_lock_held_by_another_process_is_transient(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.migrate()
    store.close()
    monkeypatch.setattr(sqlite_module, "SQLITE_BUSY_SECONDS", 0.05)
    hurried = SqliteStore(f"sqlite:///{path}")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="database is locked; another process"):
        hurried.write_records([event(1)])
    assert hurried.counts(NAMESPACE).events == 0
    holder.execute("COMMIT")
    hurried.write_records([event(1)])
    assert hurried.counts(NAMESPACE).events == 1
    holder.close()
    hurried.close()


def test_a_writer_waits_for_another(store: SqliteStore, path: Path) -> None:
    store.migrate()
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.2, lambda: holder.execute("COMMIT"))
    timer.start()
    store.write_records([event(1)])
    timer.join()
    holder.close()
    assert store.counts(NAMESPACE).events == 1


def test_a_file_that_was_deleted_is_not_written_to(store: SqliteStore, path: Path) -> None:
    store.migrate()
    for file in path.parent.iterdir():
        file.unlink()
    with pytest.raises(StoreUnavailable, match="no such table: agent_events; run `skialith migrate`"):
        store.write_records([event(1)])
    store.migrate()
    store.write_records([event(1)])
    assert store.counts(NAMESPACE).events == 1


def test_a_damaged_file_is_transient(store: SqliteStore, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 500)
    with pytest.raises(StoreUnavailable, match=r"file is not a database; .*path in database_url"):
        store.ping()


def test_a_path_that_cannot_be_is_transient(store: SqliteStore, path: Path) -> None:
    path.parent.touch()
    with pytest.raises(StoreUnavailable, match=r"cannot open sqlite:///.*check the path"):
        store.ping()


def test_a_full_disk_is_transient(store: SqliteStore) -> None:
    store.migrate()
    with store.reading() as session:
        session.run("PRAGMA max_page_count = 40")
    with pytest.raises(StoreUnavailable, match="database or disk is full; free space"):
        store.write_records([event(1, body=bytes(500_000))])
    store.probe()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (sqlite3.IntegrityError("CHECK constraint failed"), StoreDataError),
        (sqlite3.IntegrityError("NOT NULL constraint failed"), StoreDataError),
        (sqlite3.DataError("string or blob too big"), StoreDataError),
        (sqlite3.OperationalError("database is locked"), StoreUnavailable),
        (sqlite3.OperationalError("disk I/O error"), StoreUnavailable),
        (sqlite3.OperationalError("attempt to write a readonly database"), StoreUnavailable),
        (sqlite3.DatabaseError("database disk image is malformed"), StoreUnavailable),
        (sqlite3.ProgrammingError("Cannot operate on a closed database."), StoreUnavailable),
        (sqlite3.InterfaceError("bad parameter or other API misuse"), StoreUnavailable),
    ],
)
def test_what_an_error_means(store: SqliteStore, error: sqlite3.Error, kind: type[StoreError]) -> None:
    with pytest.raises(kind) as caught, store._errors():
        raise error
    assert type(caught.value) is kind
    assert caught.value.__cause__ is error


def test_pages_and_last_checkpoint_use_the_index(store: SqliteStore) -> None:
    store.migrate()
    seen: list[str] = []
    with store.reading() as session:
        session._connection.set_trace_callback(seen.append)
    store.events(NAMESPACE, "agent", Position(5, 5), Position(9, 9), 10)
    store.latest_checkpoint(NAMESPACE, "agent")
    store.dead_letters(NAMESPACE, after=LetterPlace(Position(5, 5), "writer", b"k" * 16))
    store.agents(NAMESPACE)
    store.agents(NAMESPACE, after="a", prefix="agent")
    store.event(NAMESPACE, "agent", b"k" * 16)
    for agent_id, event_type in itertools.product((None, "agent"), (None, "thought")):
        store.traces(NAMESPACE, agent_id=agent_id, event_type=event_type, after=Position(5, 5), until_ns=9)
    with store.graphs(NAMESPACE) as threads:
        scopes: list[Scope] = [("ns_key", b"n" * 16), ("thread_key", b"t" * 16), ("namespace", NAMESPACE)]
        for scope in scopes:
            threads.cells(scope, ("1", b"c" * 16), 10)
        threads.contents([b"c" * 16], [b"b" * 16])
    queries = [sql for sql in seen if sql.startswith("SELECT")]
    assert len(queries) >= 8
    with store.reading() as session:
        session._connection.set_trace_callback(None)
        for sql in queries:
            plan = [str(row[3]) for row in session.rows(f"EXPLAIN QUERY PLAN {sql}")]
            assert not [step for step in plan if "SCAN" in step or "TEMP B-TREE" in step], (sql, plan)


def test_a_fork_in_the_midst_of_a_transaction(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # The child has SQLite's memory of the parent's locks: it must not touch the file at all.
    monkeypatch.setattr(pool_module, "DATABASE_FORK_SECONDS", 0.05)
    store.migrate()
    inside, leave = threading.Event(), threading.Event()

    def transaction() -> None:
        with store.writing():
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=transaction)
    thread.start()
    inside.wait(30)
    store._pool.before_fork()
    try:
        child = _as_if_forked(store)
        with pytest.raises(StoreUnavailable, match="forked in the midst") as caught:
            child.ping()
        assert not caught.value.retryable
    finally:
        leave.set()
        thread.join()
        store._pool.after_fork_in_parent()
    store.write_records([event(1)])
    store.write_dead_letter(letter(event(2)))
    assert store.counts(NAMESPACE).events == 1


def _as_if_forked(store: SqliteStore) -> SqliteStore:
    """A store whose pool believes that it was made by the parent of this process."""
    child = SqliteStore(f"sqlite:///{store.path}".replace(" ", "%20"))
    child._pool._state.pid = os.getppid()
    child._pool._state.users = list(store._pool._state.users)
    return child
