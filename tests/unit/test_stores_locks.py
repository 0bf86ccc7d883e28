"""Locks in MySQL that somebody else holds, and those of a client that vanished: every wait ends, nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from skialith.errors import StoreConnectionLost, StoreUnavailable
from skialith.stores import mysql
from skialith.stores.mysql import MySqlStore

from ..fixtures.mariadb import MariaDB
from ..fixtures.nats import wait_until
from ..fixtures.proxy_plugin import MakeProxy
from ..fixtures.stores import NAMESPACE, event

DATABASE = "locks"


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A server that may be locked as a whole."""
    with MariaDB(tmp_path_factory.mktemp("locked")) as server:
        yield server


@pytest.fixture
def store(own_server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> Iterator[MySqlStore]:
    """Of a session that waits for a second, whatever it waits for, and for five at most."""
    monkeypatch.setattr(mysql, "DATABASE_LOCK_SECONDS", 1)
    monkeypatch.setattr(mysql, "DATABASE_IDLE_SECONDS", 1)
    monkeypatch.setattr(mysql, "DATABASE_STATEMENT_SECONDS", 5)
    own_server.run(f"DROP DATABASE IF EXISTS {DATABASE}")
    store = MySqlStore(own_server.url(DATABASE))
    store.migrate()
    yield store
    store.close()


@pytest.mark.parametrize("lock", ["LOCK TABLES agent_events WRITE", "FLUSH TABLES WITH READ LOCK"])
def test_a_lock_on_a_table_is_waited_for_and_leaves_nobody_waiting(
    own_server: MariaDB, store: MySqlStore, lock: str
) -> None:
    """An ALTER or a backup may last for hours: what each try leaves waiting in the server would use up its connections."""
    busy = f"SELECT info FROM information_schema.processlist WHERE db = '{DATABASE}' AND command <> 'Sleep'"
    with closing(own_server.connect(DATABASE)) as holder:
        holder.query(lock)
        with pytest.raises(StoreUnavailable, match="error 1205"):
            store.write_records([event(1)])
        assert own_server.run(busy) == []
    store.write_records([event(1)])
    assert store.counts(NAMESPACE).events == 1


def test_a_commit_waits_for_a_backup_and_is_undone(own_server: MariaDB, store: MySqlStore) -> None:
    with (
        closing(own_server.connect(DATABASE)) as holder,
        pytest.raises(StoreUnavailable, match="error 1205"),
        store.writing() as session,
    ):
        store._insert_records(session, [event(1)])
        holder.query("FLUSH TABLES WITH READ LOCK")
    assert store.counts(NAMESPACE).events == 0


def test_a_client_that_vanished_in_its_transaction_does_not_keep_its_rows(
    own_server: MariaDB, store: MySqlStore, proxy: MakeProxy
) -> None:
    """Its route takes everything and passes on nothing, not even the end: as when the power of its host is gone."""
    route = proxy(own_server.port)
    vanished = MySqlStore(
        store.url.replace("***", own_server.password).replace(f":{own_server.port}/", f":{route.port}/")
    )
    record = event(1)
    with pytest.raises(StoreConnectionLost), vanished.writing() as session:
        vanished._insert_records(session, [record])
        route.stall()
    held = "SELECT COUNT(*) FROM information_schema.innodb_trx"

    def stored() -> bool:
        try:
            store.write_records([record])
        except StoreUnavailable:
            return False
        return True

    wait_until(stored, 20, "the rows are free again")
    wait_until(lambda: own_server.run(held) == [(0,)], 20, "no transaction is left")
    assert store.counts(NAMESPACE).events == 1
    vanished.close()
