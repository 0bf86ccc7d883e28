"""The proxy that knows the commands of MySQL's clients, before a real server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote, urlsplit

import MySQLdb
import pytest

from ..fixtures.mysql_proxy import MySqlProxy
from ..fixtures.nats import wait_until
from ..fixtures.stores import outside


@pytest.fixture
def through(mariadb_url: str) -> Iterator[tuple[MySqlProxy, Any]]:
    """A proxy, and a connection through it with a table ``t``."""
    parts = urlsplit(mariadb_url)
    with outside(mariadb_url) as run:
        run("CREATE TABLE t (n INT, data MEDIUMTEXT)")
    with MySqlProxy("127.0.0.1", parts.port or 0) as proxy:
        connection = MySQLdb.connect(
            host="127.0.0.1",
            port=proxy.port,
            user=parts.username,
            password=unquote(parts.password or ""),
            database=parts.path[1:],
            read_timeout=20,
        )
        yield proxy, connection
        with suppress(MySQLdb.Error):
            connection.close()


def rows(url: str) -> int:
    with outside(url) as run:
        return int(run("SELECT COUNT(*) FROM t")[0][0])


def test_a_commit_is_kept_back_and_comes_late(through: tuple[MySqlProxy, Any], mariadb_url: str) -> None:
    proxy, connection = through
    proxy.hold_commits()
    connection.query("INSERT INTO t VALUES (1, REPEAT('x', 200000))")
    late = threading.Thread(target=connection.commit)
    late.start()
    wait_until(lambda: proxy.caught == 1, 20, "the COMMIT is caught")
    assert rows(mariadb_url) == 0
    proxy.hold_commits(False)
    proxy.release()
    late.join(20)
    assert not late.is_alive() and rows(mariadb_url) == 1


def test_an_answer_is_lost_though_the_commit_is_done(through: tuple[MySqlProxy, Any], mariadb_url: str) -> None:
    proxy, connection = through
    proxy.lose_answers()
    connection.query("INSERT INTO t VALUES (1, 'x')")
    waiting = threading.Thread(target=lambda: _lost(connection))
    waiting.start()
    wait_until(lambda: rows(mariadb_url) == 1, 20, "it is committed")
    assert waiting.is_alive() and proxy.caught == 1
    proxy.cut()
    waiting.join(20)
    assert not waiting.is_alive()


def _lost(connection: Any) -> None:
    with pytest.raises(MySQLdb.OperationalError):
        connection.commit()


def test_a_packet_that_is_too_large_is_refused_as_a_server_does_it(through: tuple[MySqlProxy, Any]) -> None:
    proxy, connection = through
    proxy.limit(100_000)
    connection.query(f"INSERT INTO t VALUES (1, '{'x' * 90_000}')")
    with pytest.raises(MySQLdb.OperationalError) as caught:
        connection.query(f"INSERT INTO t VALUES (1, '{'x' * 200_000}')")
    assert caught.value.args[0] == 1153 and proxy.refused == 1
