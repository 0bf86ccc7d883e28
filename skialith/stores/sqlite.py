"""The store in one SQLite file, the embedded default; several processes may share it."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..config import SQLITE_BUSY_SECONDS, SQLITE_WAL_BYTES
from ..errors import ConfigurationError, StoreDataError, StoreError, StoreUnavailable
from ..urls import redact
from .pool import Pool
from .rows import Row
from .sql import SqlStore

_ADVICE = {
    "database is locked": "another process writes to it for long, or holds it open for something else; it is tried again",
    "database or disk is full": "free space on the disk",
    "no such table": "run `skialith migrate`",
    "no such column": "run `skialith migrate`",
    "attempt to write a readonly database": "check the permissions of the file and its directory",
    "unable to open database file": "check the path in database_url and the permissions of its directory",
    "disk I/O error": "check the disk",
    "database disk image is malformed": "the file is damaged: restore it from a backup",
    "file is not a database": "the path in database_url leads to something else, or the file is damaged",
}


class SqliteStore(SqlStore):
    """``sqlite:///relative/path`` or ``sqlite:////absolute/path``, percent-encoded; no options.

    A relative path is taken from the working directory of now. The file (0600) and its directory (0700) are made at the
    first use. ``power``: every commit is synced to the disk, so that it survives a power loss and not only a crash.
    Raises ``ConfigurationError`` for another URL.
    """

    name = "sqlite"
    table_exists = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    unique_indexes = (
        "SELECT t.name, i.name FROM sqlite_master t, pragma_index_list(t.name) i "
        "WHERE t.type = 'table' AND i.\"unique\" = 1 AND i.origin <> 'pk'"
    )

    def __init__(self, url: str, *, power: bool = False) -> None:
        self.url = redact(url)
        self.path = _path(url)
        self._synchronous = "FULL" if power else "NORMAL"
        self._pool: Pool[_Connection] = Pool(self._connect, lambda connection: connection.close(), alive=self._alive)

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        """Autocommit: each query sees the newest commits, and no query keeps SQLite from cutting its own log."""
        with self._errors(), self._pool.connection() as connection:
            yield _Session(connection)

    @contextmanager
    def writing(self) -> Iterator[_Session]:
        """One transaction that takes the write lock at once: one that reads first could only fail when it comes to write."""
        with self._errors(), self._pool.connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield _Session(connection)
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    migrating = writing

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._translate(error) from error
        except (UnicodeEncodeError, OverflowError) as error:
            raise StoreDataError(f"{self.url} cannot take a value: {error}") from error
        except OSError as error:
            raise StoreUnavailable(f"cannot open {self.url}: {error}; check the path in database_url") from error

    def _translate(self, error: sqlite3.Error) -> StoreError:
        if isinstance(error, (sqlite3.IntegrityError, sqlite3.DataError)):
            code = getattr(error, "sqlite_errorcode", 0)
            return StoreDataError(f"{self.url} refuses a row for its data: {error}", code=code)
        advice = next((text for said, text in _ADVICE.items() if said in str(error)), "it is tried again")
        return StoreUnavailable(f"{self.url} failed: {error}; {advice}")

    def _connect(self) -> _Connection:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Only a file that is not there is opened, and no other thread goes on before it is closed: closing any descriptor of
        # a file drops all locks that this process holds on it (POSIX), and another process, taking itself for the last
        # user, then deletes the WAL under our commits.
        with _creating, suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            self.path,
            timeout=SQLITE_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
            factory=_Connection,
        )
        try:
            connection.inode = self.path.stat().st_ino
            _use_wal(connection, self.url)
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute(f"PRAGMA journal_size_limit = {SQLITE_WAL_BYTES}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _alive(self, connection: _Connection) -> bool:
        """Whether the file at the path is still the one that is open: what goes into a deleted file is lost in silence."""
        try:
            return self.path.stat().st_ino == connection.inode
        except OSError:
            return False


_creating = threading.Lock()


class _Connection(sqlite3.Connection):
    """A connection that knows which file it has open."""

    inode: int


class _Session:
    """See ``sql.Session``."""

    alone = True
    for_update = ""  # the transaction has locked all of the file
    by = " INDEXED BY {0}_by_{1}"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        return self._connection.execute(sql, args).fetchall()

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        return self._connection.execute(sql, args).rowcount

    def insert(self, table: str, columns: Sequence[str], values: list[Row]) -> None:
        self._connection.executemany(_insert(table, tuple(columns)), values)

    def hold(self, table: str, key: str, number: str, keys: Sequence[Any]) -> None:
        """The transaction has locked all of the file."""


@cache
def _insert(table: str, columns: tuple[str, ...]) -> str:
    """Not INSERT OR IGNORE, which passes over every row that is wrong; only one whose key is there already."""
    marks = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT DO NOTHING"


def _use_wal(connection: sqlite3.Connection, url: str) -> None:
    """Switch the file to WAL mode. SQLite does not wait for the lock that the first switch needs, so this does."""
    deadline = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
            continue
        if mode != "wal":
            raise StoreUnavailable(f"{url} is on a file system where SQLite has no WAL mode: use a local disk")
        return


def _path(url: str) -> Path:
    form = "use sqlite:///relative/path.db or sqlite:////absolute/path.db"
    parts = urlsplit(url)
    if parts.netloc:
        raise ConfigurationError(f"database_url {redact(url)!r} has one slash too few: {form}")
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"database_url {redact(url)!r}: SQLite has no options; write '?' in a path as %3F and '#' as %23"
        )
    path = unquote(parts.path.removeprefix("/"))
    if not path or path.endswith("/") or path == ":memory:" or "\0" in path:
        raise ConfigurationError(f"database_url {redact(url)!r} names no file: {form}")
    return Path(os.path.abspath(path))
