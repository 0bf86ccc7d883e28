"""skialith bench: figures with their durability for every kind of server, and nothing left behind on any of them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from skialith import SkialithAgent
from tests.fixtures.command import running, skialith, stop
from tests.fixtures.mariadb import MariaDB
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import new_namespace


def figures(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sides by their first word, with percentiles that can be."""
    for side in document["sides"]:
        assert 1 < side["p50_us"] <= side["p95_us"] <= side["p99_us"] < 10_000_000
    return {side["name"]: side for side in document["sides"]}


def streams(nats: NatsServer) -> list[str]:
    """Names of the streams that the server has on disk."""
    return sorted(path.name for path in nats.store.glob("jetstream/*/streams/*"))


def test_the_embedded_default_beside_sqlite(tmp_path: Path) -> None:
    said = skialith("bench", "--calls", "100", "--json", cwd=tmp_path)
    assert said.code == 0, said
    sides = figures(said.document)
    assert {name: side["survives"] for name, side in sides.items()} == {
        "save_event (NATS PubAck)": "process",
        "INSERT, sqlite3, autocommit, SQLite's defaults": "power",
        "INSERT, sqlite3, autocommit, WAL mode": "process",
    }
    assert said.document["calls"] == 100
    assert said.document["nats"].endswith("(embedded)")
    assert list(tmp_path.iterdir()) == []


def test_an_embedded_log_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    directory = tmp_path / ".skialith"
    with SkialithAgent("agent", directory=str(directory), timeout=20.0) as agent:
        agent.save_event("e", {"n": 1})
        said = skialith("bench", "--calls", "100", "--json", cwd=tmp_path)
        assert said.code == 0, said
        assert [event.event_id for event in agent.history()] == ["e"]
    assert [path.name for path in tmp_path.iterdir()] == [".skialith"]


def test_power_is_what_is_measured_when_it_is_wanted(tmp_path: Path) -> None:
    said = skialith("bench", "--calls", "100", "--durability", "power", cwd=tmp_path)
    assert said.code == 0, said
    (line,) = [line for line in said.out.splitlines() if line.startswith("save_event")]
    assert "power loss" in line
    assert "durability=power" in line
    assert "syncs it to disk before it answers" in said.out


def test_servers_of_ones_own(
    nats_server: NatsServer, mariadb_server: MariaDB, mariadb_url: str, tmp_path: Path
) -> None:
    where = ("--nats-url", nats_server.url, "--database-url", mariadb_url)
    (temporary := tmp_path / "temporary").mkdir()
    said = skialith("bench", "--calls", "100", "--json", *where, cwd=temporary, TMPDIR=str(temporary))
    assert said.code == 0, said
    insert = figures(said.document)["INSERT, mysqlclient, autocommit"]
    assert insert["survives"] == "power"
    assert insert["because"] == "innodb_flush_log_at_trx_commit=1, no binlog"
    assert mariadb_server.password not in said.out
    database = mariadb_url.rpartition("/")[2]
    assert mariadb_server.run("SHOW TABLES", database=database) == []
    assert streams(nats_server) == []
    assert list(temporary.iterdir()) == []


def test_the_table_for_people(mariadb_server: MariaDB, mariadb_url: str, nats_url: str, tmp_path: Path) -> None:
    where = ("--nats-url", nats_url, "--database-url", mariadb_url, "--namespace", new_namespace())
    mariadb_server.run("SET GLOBAL innodb_flush_log_at_trx_commit = 2")
    try:
        said = skialith("bench", "--calls", "100", *where, cwd=tmp_path)
    finally:
        mariadb_server.run("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    assert said.code == 0, said
    assert "p50" in said.out and "p95" in said.out and "p99" in said.out
    (insert,) = [line for line in said.out.splitlines() if line.startswith("INSERT, mysqlclient, autocommit  ")]
    assert "power loss" not in insert
    assert "innodb_flush_log_at_trx_commit=2" in insert
    assert "times save_event at p50" in said.out


def test_ctrl_c_leaves_nothing_behind(
    nats_server: NatsServer, mariadb_server: MariaDB, mariadb_url: str, tmp_path: Path
) -> None:
    database = mariadb_url.rpartition("/")[2]
    where = ("--nats-url", nats_server.url, "--database-url", mariadb_url)
    with running("bench", "--calls", "20000", *where, cwd=tmp_path) as process:

        def inserting() -> bool:
            tables = mariadb_server.run("SHOW TABLES", database=database)
            return bool(tables) and mariadb_server.run(f"SELECT COUNT(*) FROM {tables[0][0]}", database=database) > [
                (50,)
            ]

        wait_until(inserting, 30, "calls under way")
        assert streams(nats_server) != []
        said = stop(process, signal.SIGINT)
    assert said.code == 130
    assert mariadb_server.run("SHOW TABLES", database=database) == []
    assert streams(nats_server) == []


def test_a_database_that_is_away_is_named(nats_server: NatsServer, tmp_path: Path) -> None:
    where = ("--nats-url", nats_server.url, "--database-url", "mysql://nobody:secret@127.0.0.1:1/none")
    said = skialith("bench", "--calls", "100", *where, cwd=tmp_path)
    assert said.code == 1
    assert "127.0.0.1" in said.err
    assert "secret" not in said.err
    assert streams(nats_server) == []
