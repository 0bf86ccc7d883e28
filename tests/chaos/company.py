"""What may ail a database that writers work on: each fault is real, has a name, and ends without a restart of anybody."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import MySQLdb
import pytest

from skialith import config
from skialith.doctor import examine
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import wait_until

from . import outside
from .world import Child, World

TABLESPACE_BYTES = 64 * 1024 * 1024
NOTICE_SECONDS = 60.0
"""How long a writer may take to notice and to say so on a busy machine."""
RECOVER_SECONDS = 90.0
"""How long the last record may take when the fault is over: a record that waits aside does so for up to a minute."""
HASTY = {
    "stores.mysql.DATABASE_CONNECT_SECONDS": 2,
    "stores.mysql.DATABASE_IDLE_SECONDS": 3,
    "stores.mysql.DATABASE_LOCK_SECONDS": 1,
    "stores.mysql.DATABASE_STATEMENT_SECONDS": 3,
    "stores.sqlite.SQLITE_BUSY_SECONDS": 0.3,
    "writer.drain.WRITER_GIVE_BACK_SECONDS": 2.0,
    "writer.outage.WRITER_WARN_SECONDS": 0.5,
}
"""Limits of a writer that lives through in seconds what takes minutes with the usual ones."""
OFF = {"writer": "off"}


def server(folder: Path) -> MariaDB:
    """A server with a tablespace that may not grow over ``TABLESPACE_BYTES``; see ``Database.in_one_file``."""
    size = TABLESPACE_BYTES // 1024 // 1024
    return MariaDB(
        folder, f"--innodb-data-file-path=ibdata1:12M:autoextend:max:{size}M", "--innodb-autoextend-increment=1"
    )


class Database:
    """A database of its own with a user who has no more rights than Skialith asks for."""

    def __init__(self, server: MariaDB) -> None:
        self.server = server
        self.name = f"company_{secrets.token_hex(4)}"
        self.admin_url = server.url(self.name)
        self.user = f"u{secrets.token_hex(4)}"
        self.identity = f"'{self.user}'@'%'"
        self.password = secrets.token_hex(8)
        server.run(f"CREATE USER {self.identity} IDENTIFIED BY '{self.password}'")
        rights = "SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, INDEX"
        server.run(f"GRANT {rights} ON `{self.name}`.* TO {self.identity}")

    def url(self, port: int = 0) -> str:
        """For the writers; ``port``: of a proxy."""
        return f"mysql://{self.user}:{self.password}@127.0.0.1:{port or self.server.port}/{self.name}"

    @contextmanager
    def in_one_file(self) -> Iterator[None]:
        """Tables that are made in this block share the server's tablespace, which can be full."""
        self.run("SET GLOBAL innodb_file_per_table = OFF")
        try:
            yield
        finally:
            self.run("SET GLOBAL innodb_file_per_table = ON")

    def run(self, sql: str) -> list[tuple[Any, ...]]:
        return self.server.run(sql, database=self.name)

    def hang_up(self) -> None:
        """End the user's connections, as a rotation of passwords does."""
        for (number,) in self.run(f"SELECT id FROM information_schema.processlist WHERE user = '{self.user}'"):
            try:
                self.run(f"KILL {number}")
            except MySQLdb.OperationalError:
                continue  # gone by itself

    def close(self) -> None:
        self.server.run(f"DROP DATABASE `{self.name}`")
        self.server.run(f"DROP USER {self.identity}")


# ---- faults


@contextmanager
def read_only(database: Database) -> Iterator[None]:
    database.run("SET GLOBAL read_only = 1")
    try:
        yield
    finally:
        database.run("SET GLOBAL read_only = 0")


@contextmanager
def disk_full(database: Database) -> Iterator[None]:
    """With rows that lie in pages of the index: InnoDB gives the last pages to BLOBs and then has none left to undo anything."""
    with database.in_one_file():
        database.run("CREATE TABLE ballast (data VARBINARY(8000) NOT NULL)")
    try:
        for rows in (1000, 20, 1):
            with pytest.raises(MySQLdb.OperationalError, match="is full"):
                while True:
                    database.run(f"INSERT INTO ballast SELECT REPEAT('x', 7000) FROM seq_1_to_{rows}")
        yield
    finally:
        database.run("DROP TABLE ballast")


@contextmanager
def table_gone(database: Database) -> Iterator[None]:
    database.run("RENAME TABLE agent_events TO backup_of_events")
    try:
        yield
    finally:
        database.run("RENAME TABLE backup_of_events TO agent_events")


@contextmanager
def column_narrower(database: Database) -> Iterator[None]:
    """No event that is stored by now is as long; those that come are."""
    database.run(
        "ALTER TABLE agent_checkpoints CHANGE body body_kept MEDIUMBLOB NULL, ADD body VARBINARY(20) NULL AFTER codec"
    )
    try:
        yield
    finally:
        database.run("UPDATE agent_checkpoints SET body_kept = body WHERE body IS NOT NULL")
        database.run("ALTER TABLE agent_checkpoints DROP body, CHANGE body_kept body MEDIUMBLOB NULL AFTER codec")


@contextmanager
def password_rotated(database: Database) -> Iterator[None]:
    database.run(f"ALTER USER {database.identity} IDENTIFIED BY 'another'")
    database.hang_up()
    try:
        yield
    finally:
        database.run(f"ALTER USER {database.identity} IDENTIFIED BY '{database.password}'")


@contextmanager
def account_locked(database: Database) -> Iterator[None]:
    database.run(f"ALTER USER {database.identity} ACCOUNT LOCK")
    database.hang_up()
    try:
        yield
    finally:
        database.run(f"ALTER USER {database.identity} ACCOUNT UNLOCK")


@contextmanager
def packets_small(database: Database) -> Iterator[None]:
    database.run("SET GLOBAL max_allowed_packet = 65536")
    database.hang_up()
    try:
        yield
    finally:
        database.run("SET GLOBAL max_allowed_packet = DEFAULT")


@contextmanager
def backup_runs(database: Database) -> Iterator[None]:
    holder = database.server.connect(database.name)
    try:
        holder.query("FLUSH TABLES WITH READ LOCK")
        yield
    finally:
        holder.close()


@dataclass(frozen=True)
class Fault:
    """``said``: what the writers say, and the doctor: cause and advice."""

    name: str
    happen: Callable[[Database], object]
    said: str


FAULTS = (
    Fault("read-only", read_only, r"error 1290\); the server is read-only: use the primary"),
    Fault(
        "disk full",
        disk_full,
        r"is full \(error 1114\); the server's disk or tablespace is full: free space",
    ),
    Fault(
        "table gone",
        table_gone,
        r"agent_events' doesn't exist \(error 1146\); run `skialith migrate` if .* else restore",
    ),
    Fault(
        "column narrower",
        column_narrower,
        r"no record is to blame.*\(error 1406.*not as Skialith made them",
    ),
    Fault("password rotated", password_rotated, r"error 1045\); check user and password in database_url"),
    Fault("account locked", account_locked, r"error 4151\); the account is locked: ALTER USER"),
    Fault("packets small", packets_small, r"takes packets of 65536 bytes only.*set max_allowed_packet to 16M"),
    Fault("backup", backup_runs, r"error 1205\); another transaction holds a row or the table for long \(a backup"),
)


# ---- what an operator sees


class Log:
    """What a child says from now on."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._from = child.log.stat().st_size

    def text(self) -> str:
        return self._child.log.read_bytes()[self._from :].decode("utf-8", "replace")

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.text()) is not None

    def wait_for(self, pattern: str, seconds: float = NOTICE_SECONDS) -> None:
        wait_until(lambda: self.says(pattern), seconds, f"{self._child.name} says {pattern!r}")


def examined(world: World, url: str) -> list[str]:
    """What the doctor finds wrong."""
    settings = config.load(
        {}, nats_url=world.nats_url, database_url=url, namespace=world.namespace, timeout=5.0, writer="off"
    )
    return [f"{each.detail} {each.fix}" for each in examine(settings) if each.level != "ok"]


def wait_drained(world: World, seconds: float = RECOVER_SECONDS) -> float:
    """Until all that the log holds now is stored and acknowledged by both sinks; how long it took, s."""
    began = outside.watch(world.nats_url, world.namespace, lambda at, progress: True)
    target = began[1].last
    limit = began[0] + seconds
    at, progress = outside.watch(
        world.nats_url, world.namespace, lambda at, progress: progress.settled >= target or at > limit
    )
    assert progress.settled >= target, f"not stored within {seconds} s: {progress}, the fault was over at {target}"
    return at - began[0]
