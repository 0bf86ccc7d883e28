"""The store in MySQL 8, MariaDB 10.6+ or TiDB 7.5+, through mysqlclient."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from .. import _rows
from ..config import (
    DATABASE_CONNECT_SECONDS,
    DATABASE_IDLE_SECONDS,
    DATABASE_LEAST_PACKET_BYTES,
    DATABASE_LOCK_SECONDS,
    DATABASE_MIGRATION_LOCK_SECONDS,
    DATABASE_MIGRATION_SECONDS,
    DATABASE_STATEMENT_BYTES,
    DATABASE_STATEMENT_ROWS,
    DATABASE_STATEMENT_SECONDS,
    DATABASE_TRUST_SECONDS,
    MAX_ID_CHARACTERS,
)
from ..errors import ConfigurationError, StoreDataError, StoreMisconfigured, StoreUnavailable, making_rows
from ..urls import redact
from .mysql_errors import translate
from .pool import Pool
from .rows import Row
from .sql import SqlStore

_OPTIONS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_mode", "unix_socket")
_SSL_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_SQL_MODE = "STRICT_ALL_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ZERO_DATE,NO_ZERO_IN_DATE,NO_ENGINE_SUBSTITUTION"
_TEXT_COLUMNS = {"agent_traces": {"agent_text": "agent_id", "event_text": "event_id"}}
"""Columns that repeat an id as text, because clients show VARBINARY as hex."""


class MySqlStore(SqlStore):
    """``mysql://user:password@host:port/database``, each part percent-encoded.

    Options behind ``?``: ``unix_socket`` (path), ``ssl_ca``, ``ssl_cert``, ``ssl_key`` (paths), ``ssl_mode`` (one of DISABLED,
    PREFERRED, REQUIRED, VERIFY_CA, VERIFY_IDENTITY; VERIFY_CA is the default with ``ssl_ca``, REQUIRED with another ssl
    option). ``localhost`` means TCP; for the socket name it. Raises ``ConfigurationError`` for anything else, and when
    mysqlclient is not installed. Connects at the first use.
    """

    name = "mysql"
    table_exists = "SELECT 1 FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = ?"
    unique_indexes = (
        "SELECT DISTINCT table_name, index_name FROM information_schema.statistics "
        "WHERE table_schema = DATABASE() AND non_unique = 0 AND index_name <> 'PRIMARY'"
    )

    def __init__(self, url: str) -> None:
        self.url = redact(url)
        self._driver = _driver()
        self._arguments = _arguments(url, self.url)
        self._pool: Pool[Any] = Pool(
            self._connect, lambda connection: connection.close(), alive=self._alive, leave=_detach
        )

    @contextmanager
    def reading(self) -> Iterator[_Session]:
        """Autocommit: a snapshot kept between two queries has returned an old checkpoint as the current one."""
        with self._errors(), self._pool.connection(trusted=DATABASE_TRUST_SECONDS) as connection:
            yield _Session(connection)

    @contextmanager
    def writing(self) -> Iterator[_Session]:
        """One transaction."""
        with self._errors(), self._pool.connection() as connection:
            connection.query("START TRANSACTION")
            try:
                yield _Session(connection)
                connection.commit()
            except BaseException:
                with suppress(self._driver.MySQLError):
                    connection.rollback()
                raise

    @contextmanager
    def migrating(self) -> Iterator[_Session]:
        """A connection of its own that holds the server-wide lock of this database's schema and may work for long.

        The lock ends with the connection, whatever ends it.
        """
        with self._errors():
            connection = self._connect(DATABASE_MIGRATION_SECONDS, DATABASE_MIGRATION_LOCK_SECONDS)
            try:
                session = _Session(connection)
                name = "skialith:" + blake2b(self._arguments["database"].encode(), digest_size=16).hexdigest()
                if session.rows("SELECT GET_LOCK(?, ?)", (name, DATABASE_MIGRATION_LOCK_SECONDS))[0][0] != 1:
                    raise StoreUnavailable(
                        f"another process has been migrating {self.url} for over {DATABASE_MIGRATION_LOCK_SECONDS} s; wait "
                        "for it, or look for it with SHOW PROCESSLIST"
                    )
                yield session
            finally:
                with suppress(self._driver.MySQLError):
                    connection.close()

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._driver.MySQLError as error:
            raise translate(error, self.url) from error
        except (UnicodeEncodeError, OverflowError) as error:
            raise StoreDataError(f"{self.url} cannot take a value: {error}") from error

    def _connect(self, statement_seconds: int | None = None, table_lock_seconds: int | None = None) -> Any:
        statement_seconds = statement_seconds or DATABASE_STATEMENT_SECONDS
        try:
            connection = self._driver.connect(
                **self._arguments,
                connect_timeout=DATABASE_CONNECT_SECONDS,
                read_timeout=statement_seconds,
                write_timeout=statement_seconds,
                charset="utf8mb4",
                sql_mode=_SQL_MODE,
                binary_prefix=True,
                multi_statements=False,
                local_infile=0,
                autocommit=True,
            )
        except self._driver.MySQLError as error:
            raise translate(error, self.url, connecting=True) from error
        try:
            self._prepare(connection, table_lock_seconds or DATABASE_LOCK_SECONDS)
        except BaseException as error:
            connection.close()
            if isinstance(error, self._driver.MySQLError):
                raise translate(error, self.url, connecting=True) from error
            raise
        return connection

    def _prepare(self, connection: Any, table_lock_seconds: int) -> None:
        """Set up the session, and refuse a server that cannot serve."""
        # READ COMMITTED: no gap locks, on which two writers of different keys deadlock; and a query behind an insert that
        # waited for another transaction must see what that one committed.
        connection.query("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        # A client that vanished without a word (host lost power, route broken) leaves its transaction, and thereby its
        # rows, locked for eight hours; MariaDB can end such a transaction, others only any connection that is silent.
        silent = "idle_transaction_timeout" if "MariaDB" in connection.get_server_info() else "wait_timeout"
        connection.query(
            f"SET SESSION time_zone = '+00:00', innodb_lock_wait_timeout = {DATABASE_LOCK_SECONDS}, "
            f"lock_wait_timeout = {table_lock_seconds}, {silent} = {DATABASE_IDLE_SECONDS}"
        )
        session = _Session(connection)
        # MariaDB's client library connects in plain text where TLS is required but the server has none.
        encrypt = self._arguments.get("ssl_mode", "PREFERRED") not in ("DISABLED", "PREFERRED")
        if encrypt and not session.rows("SHOW SESSION STATUS LIKE 'Ssl_cipher'")[0][1]:
            raise StoreMisconfigured(
                f"{self.url}: the server has no TLS, which ssl_mode or the ssl files require: set it up on the server, "
                "or use ssl_mode=DISABLED"
            )
        (packet,) = session.rows("SELECT @@max_allowed_packet")[0]
        if packet < DATABASE_LEAST_PACKET_BYTES:
            raise StoreMisconfigured(
                f"{self.url} takes packets of {packet} bytes only, Skialith needs {DATABASE_LEAST_PACKET_BYTES}: "
                "set max_allowed_packet to 16M or more on the server"
            )
        connection.longest_statement = min(DATABASE_STATEMENT_BYTES, packet // 2)
        connection.clustered = _join(session)

    def _alive(self, connection: Any) -> bool:
        try:
            connection.ping()
        except self._driver.MySQLError:
            return False
        return True


def _join(session: _Session) -> bool:
    """Whether the server is a node of a Galera cluster; then what any of its nodes has committed is to be seen here.

    A node applies what the others commit a moment later. Without waiting for that a reader would miss what another node's
    writer has stored and the log does not have any more: an old checkpoint would be the current one.
    """
    found = session.rows("SHOW SESSION VARIABLES WHERE Variable_name IN ('wsrep_on', 'wsrep_sync_wait')")
    variables = {str(name).lower(): value for name, value in found}
    if variables.get("wsrep_on") != "ON":
        return False
    # 1: before SELECT, SHOW and START TRANSACTION. Dirty reads would be answered by a node that is cut off.
    waits = int(variables.get("wsrep_sync_wait", 0)) | 1
    session.run(f"SET SESSION wsrep_sync_wait = {waits}, wsrep_dirty_reads = OFF")
    return True


class _Session:
    """See ``sql.Session``."""

    for_update = " FOR UPDATE"
    by = " FORCE INDEX (by_{1})"
    # Left alone, MariaDB reads each page of a long history, or of a thread with many checkpoints, from the first row on.

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    @property
    def alone(self) -> bool:
        return not self._connection.clustered

    def rows(self, sql: str, args: Sequence[Any] = ()) -> list[Row]:
        with self._connection.cursor() as cursor:
            cursor.execute(_percent(sql), args)
            return list(cursor.fetchall())

    def run(self, sql: str, args: Sequence[Any] = ()) -> int:
        with self._connection.cursor() as cursor:
            return int(cursor.execute(_percent(sql), args))

    def insert(self, table: str, columns: Sequence[str], values: list[Row]) -> None:
        texts = _TEXT_COLUMNS.get(table, {})
        head, tail = _insert(table, (*columns, *texts))
        repeated = tuple(columns.index(source) for source in texts.values())
        longest = self._connection.longest_statement
        done = 0
        while done < len(values):
            with making_rows():
                statement, done = _rows.insert(
                    head, tail, values, done, DATABASE_STATEMENT_ROWS, longest, repeated, MAX_ID_CHARACTERS
                )
            self._connection.query(statement)

    def hold(self, table: str, key: str, number: str, keys: Sequence[Any]) -> None:
        """In a Galera cluster two transactions are in conflict when they change one row; a lock is known to its node alone."""
        if self.alone:
            return
        within = f"WHERE {key} IN ({', '.join('?' * len(keys))})"
        for change in (f"{number} + 1", f"{number} - 1"):
            self.run(f"UPDATE {table} SET {number} = {change} {within}", keys)


@cache
def _insert(table: str, columns: tuple[str, ...]) -> tuple[bytes, bytes]:
    """What stands before and behind the rows of an insert.

    Never INSERT IGNORE, which makes a row fit by cutting its values; a row that is there is "updated" to what it is.
    """
    key = columns[0]
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ".encode(),
        f" ON DUPLICATE KEY UPDATE {key} = {key}".encode(),
    )


@lru_cache(maxsize=256)
def _percent(sql: str) -> str:
    return sql.replace("?", "%s")


def _detach(connection: Any) -> None:
    """In a forked child: put an inherited connection's socket out of its reach.

    Nothing that happens to the connection here can then reach the server; and when the parent is killed the server sees
    the socket closed and ends the parent's transaction, which would otherwise hold its locks as long as this child lives.
    """
    with suppress(Exception):
        number = connection.fileno()
        if stat.S_ISSOCK(os.fstat(number).st_mode):
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, number, inheritable=False)
            os.close(null)


def _driver() -> Any:
    try:
        import MySQLdb
    except ImportError as error:
        raise ConfigurationError(
            f"a mysql:// database needs the driver mysqlclient: pip install 'skialith[mysql]' ({error})"
        ) from error
    return MySQLdb


def _arguments(url: str, shown: str) -> dict[str, Any]:
    """The driver's arguments from a URL."""
    form = "use mysql://user:password@host:3306/database"
    try:
        parts = urlsplit(url)
        port = parts.port or 3306
    except ValueError as error:
        raise ConfigurationError(f"database_url {shown!r} cannot be parsed ({error}): {form}") from None
    database = unquote(parts.path.removeprefix("/"))
    if not database or "/" in database:
        raise ConfigurationError(f"database_url {shown!r} names no database: {form}")
    if parts.fragment:
        raise ConfigurationError(f"database_url {shown!r} has an unencoded '#': write it as %23")
    options = _options(parts.query, shown)
    arguments: dict[str, Any] = {"database": database}
    if parts.username is not None:
        arguments["user"] = unquote(parts.username)
    if parts.password is not None:
        arguments["password"] = unquote(parts.password)
    if "unix_socket" in options:
        arguments["unix_socket"] = options["unix_socket"]
    else:
        # The C library takes "localhost" for "the socket at its built-in path", whatever the port.
        host = parts.hostname or "localhost"
        arguments["host"] = "127.0.0.1" if host == "localhost" else unquote(host)
        arguments["port"] = port
    arguments.update(_tls(options, shown))
    return arguments


def _options(query: str, shown: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            raise ConfigurationError(
                f"database_url {shown!r} has the unknown option {name!r}; known: {', '.join(_OPTIONS)}"
            )
        if not value:
            raise ConfigurationError(f"database_url {shown!r}: the option {name!r} is empty")
        options[name] = value
    return options


def _tls(options: dict[str, str], shown: str) -> dict[str, Any]:
    files = {name: options[f"ssl_{name}"] for name in ("ca", "cert", "key") if f"ssl_{name}" in options}
    for path in files.values():
        if not os.path.exists(path):
            raise ConfigurationError(f"database_url {shown!r}: there is no file {path!r}")
    mode = options.get("ssl_mode", "VERIFY_CA" if "ca" in files else "REQUIRED" if files else "").upper()
    if mode and mode not in _SSL_MODES:
        raise ConfigurationError(f"database_url {shown!r}: ssl_mode {mode!r} is none of {', '.join(_SSL_MODES)}")
    # The driver takes files for a wish to encrypt, whatever the mode says.
    return {**({"ssl": files} if files and mode != "DISABLED" else {}), **({"ssl_mode": mode} if mode else {})}
