"""What is particular to MySQL: sessions, TLS, lost connections, servers that refuse, and what its errors mean."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random, SystemRandom

import MySQLdb
import pytest

from skialith import _rows
from skialith.errors import StoreConnectionLost, StoreDataError, StoreError, StoreMisconfigured, StoreUnavailable
from skialith.graphs import ns_key, run_key, thread_key
from skialith.records import Position
from skialith.stores import migrate, read
from skialith.stores.base import Scope
from skialith.stores.graph_read import GraphTables
from skialith.stores.mysql import MySqlStore
from skialith.stores.mysql_errors import CONNECTION_ERRORS, DATA_ERRORS, translate

from ..fixtures.graph_model import at_position, put
from ..fixtures.mariadb import USER, MariaDB
from ..fixtures.nats import wait_until
from ..fixtures.stores import NAMESPACE, TABLES, checkpoint, event, letter, noise, step, trace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A server that tests may stop, kill and reconfigure, with TLS; they leave it running as it was."""
    folder = tmp_path_factory.mktemp("own")
    _certificates(folder)
    with MariaDB(
        folder,
        *(f"--ssl-{name}={folder / file}" for name, file in (("ca", "ca.pem"), ("cert", "c.pem"), ("key", "k.pem"))),
    ) as server:
        yield server


def _certificates(folder: Path) -> None:
    """An authority, and a server's certificate for another host than the one it runs on."""
    (folder / "san").write_text("subjectAltName=DNS:db.example\n")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=authority",
        "req -newkey rsa:2048 -nodes -keyout k.pem -out c.csr -subj /CN=db.example",
        "x509 -req -in c.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out c.pem -days 2 -extfile san",
        "req -x509 -newkey rsa:2048 -nodes -keyout other.key -out other.pem -days 2 -subj /CN=other",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def store(mariadb_url: str) -> Iterator[MySqlStore]:
    store = MySqlStore(mariadb_url)
    store.migrate()
    yield store
    store.close()


def session_variables(store: MySqlStore, *names: str) -> dict[str, str]:
    marks = ", ".join("?" * len(names))
    with store.reading() as session:
        return {
            str(name): str(value)
            for name, value in session.rows(f"SHOW SESSION VARIABLES WHERE Variable_name IN ({marks})", names)
        }


# ---- the session


def test_a_session_is_strict_in_utc_and_reads_what_is_committed(store: MySqlStore) -> None:
    found = session_variables(
        store, "sql_mode", "time_zone", "tx_isolation", "autocommit", "character_set_client", "innodb_lock_wait_timeout"
    )
    assert "STRICT_ALL_TABLES" in found.pop("sql_mode")
    assert found == {
        "time_zone": "+00:00",
        "tx_isolation": "READ-COMMITTED",
        "autocommit": "ON",
        "character_set_client": "utf8mb4",
        "innodb_lock_wait_timeout": "10",
    }


def test_a_server_with_loose_defaults_changes_nothing(own_server: MariaDB) -> None:
    own_server.run(
        "SET GLOBAL sql_mode = 'NO_BACKSLASH_ESCAPES', GLOBAL time_zone = '+05:00', GLOBAL tx_isolation = 'SERIALIZABLE'"
    )
    try:
        store = MySqlStore(own_server.url("loose"))
        store.migrate()
        record = event(1, agent="a'\\", body=b"'; \\' \\\\ \0")
        store.write_records([record])
        store.write_traces([trace(1)])
        assert store.events(NAMESPACE, "a'\\", Position(0, 0), None, 9) == [(record, False)]
        assert (
            str(own_server.run("SELECT created_at FROM agent_traces", database="loose")[0][0])
            == "2026-01-01 00:00:00.123457"
        )
        with pytest.raises(StoreDataError):
            store.write_records([event(2, event_id="x" * 1021)])
        store.close()
    finally:
        own_server.run("SET GLOBAL sql_mode = DEFAULT, GLOBAL time_zone = DEFAULT, GLOBAL tx_isolation = DEFAULT")


def test_nothing_is_only_a_warning(store: MySqlStore) -> None:
    with store.writing() as session:
        store._insert_records(session, [event(1, body=bytes(range(256)))])
        assert session.rows("SHOW WARNINGS") == []
        store._insert_traces(session, [trace(1, agent="🦜" * 255)])
        assert session.rows("SHOW WARNINGS") == []


def test_whatever_bytes_come_back(store: MySqlStore) -> None:
    """The statement's text is our own: every byte, and what looks like half a character before a quote, must survive it."""
    seed = SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    random = Random(seed)
    tricky = [
        b"'",
        b'"',
        b"\\",
        b"\0",
        b"\n",
        b"\r",
        b"\x1a",
        b"%s",
        b"\xc3",
        b"\xe2\x82",
        b"\xf0\x9f\xa6",
        b"\xbf\x27",
        b"\xa1\x5c",
    ]
    bodies = [bytes(range(256)), *tricky, *(random.randbytes(300) for _ in range(200))]
    bodies += [b"".join(random.choices(tricky, k=40)) for _ in range(200)]
    names = ["'; --", "\\", "\\'", '\0\x1a\n\r"', "é🦜\u2028", "a " * 100]
    wrote = [event(n, agent=random.choice(names), event_id=f"{n}\\'", body=body) for n, body in enumerate(bodies, 1)]
    texts = [json.dumps({"a": "".join(random.choices("'\"\\\0\n\x1aé🦜%", k=20))}) for _ in wrote]
    store.write_records(wrote)
    store.write_traces(
        [trace(n, key=record.key, payload=text) for n, (record, text) in enumerate(zip(wrote, texts, strict=True), 1)]
    )
    with store.reading() as session:
        found = session.rows("SELECT record_key, agent_id, event_id, body FROM agent_events")
        assert {row[0]: row[1:] for row in found} == {
            record.key: (record.agent_id.encode(), record.record_id.encode(), record.body) for record in wrote
        }
        found = session.rows("SELECT record_key, payload FROM agent_traces")
        assert dict(found) == {record.key: text for record, text in zip(wrote, texts, strict=True)}


def test_text_is_escaped_as_the_driver_does_it(store: MySqlStore) -> None:
    texts = [chr(n) for n in range(1, 0x300)] + ["é🦜'\\ \0\x1a"]
    with store._pool.connection() as connection:
        statement, _ = _rows.insert(b"", b"", [tuple(texts)], 0, 1, 1 << 20, (), 0)
        assert statement == b"(" + b", ".join(connection.string_literal(text.encode()) for text in texts) + b")"


def test_traces_carry_their_ids_as_text(store: MySqlStore) -> None:
    store.write_traces([trace(1, agent="🦜" * 255, event_id="é")])
    with store.reading() as session:
        assert session.rows("SELECT agent_text, event_text, agent_id FROM agent_traces") == [
            ("🦜" * 255, "é", ("🦜" * 255).encode())
        ]


def test_every_column_has_a_comment(store: MySqlStore) -> None:
    with store.reading() as session:
        silent = session.rows(
            "SELECT table_name, column_name FROM information_schema.columns "
            "WHERE table_schema = DATABASE() AND column_comment = ''"
        )
        tables = session.rows(
            "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_comment != ''"
        )
    assert silent == []
    assert tables == [(len(TABLES),)]


def test_each_table_has_one_unique_key(store: MySqlStore) -> None:
    with store.reading() as session:
        keys = session.rows(
            "SELECT table_name, COUNT(DISTINCT index_name) FROM information_schema.statistics "
            "WHERE table_schema = DATABASE() AND non_unique = 0 GROUP BY table_name"
        )
    assert [count for _, count in keys] == [1] * len(TABLES)


def test_pages_and_last_checkpoint_use_the_index(store: MySqlStore) -> None:
    for n in range(200):
        store.write_dead_letter(letter(event(n + 1)))
    store.write_records([event(n) for n in range(1, 4001)] + [checkpoint(n) for n in range(1, 2001)])
    store.write_records([step(n) for n in range(4001, 6001)])
    queries: list[tuple[str, tuple[object, ...]]] = []
    with store.reading() as session:
        read = type(session).rows
        session.run("ANALYZE TABLE agent_events, agent_checkpoints, agent_steps, dead_letters")

    def remember(self: object, sql: str, args: tuple[object, ...] = ()) -> object:
        queries.append((sql, args))
        return read(self, sql, args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(session), "rows", remember)
        store.events(NAMESPACE, "agent", Position(2**61, 5), Position(2**62, 9), 10)
        store.latest_checkpoint(NAMESPACE, "agent")
        store.steps(NAMESPACE, "agent", Position(2**60, 5), 10)
    with store.reading() as session:
        for sql, args in queries:
            if "ORDER BY" in sql:
                plans = [plan for plan in session.rows(f"EXPLAIN {sql}", args) if not plan[2].startswith("<derived")]
                plan = plans[0]
                kind, key, extra = plan[3], plan[5], plan[-1]
                assert kind in ("range", "ref"), (sql, plan)
                assert key == "by_agent" or (key == "by_position" and "FROM dead_letters" in sql), (sql, plan)
                assert "filesort" not in (extra or ""), (sql, plan)


# ---- ways in


def test_a_late_page_reads_no_more_of_the_index_than_an_early_one(store: MySqlStore) -> None:
    count, limit = 4000, 10
    records = [event(n) for n in range(1, count + 1)]
    for start in range(0, count, 500):
        store.write_records(records[start : start + 500])
    with store.reading() as session:
        session.run("ANALYZE TABLE agent_events")
    for record in (records[5], records[count // 2], records[-50]):
        with store.reading() as session:
            session.run("FLUSH STATUS")
            page = read.events(session, (NAMESPACE, "agent"), record.position, records[-1].position, limit, None)
            # Rows that the index condition passes over are counted apart.
            names = "('Handler_read_next', 'Handler_icp_attempts')"
            steps = sum(int(row[1]) for row in session.rows(f"SHOW SESSION STATUS WHERE Variable_name IN {names}"))
        assert len(page) == limit
        assert steps < 10 * limit, f"{steps} rows were passed for a page of {limit}"


def test_a_late_page_of_checkpoints_reads_no_more_of_the_index_than_an_early_one(store: MySqlStore) -> None:
    count, limit, thread = 3000, 10, thread_key(NAMESPACE, "t")
    for start in range(0, count, 500):
        changes = (put("t", "", f"{n:06d}", run_key=run_key(f"run {n // 10}")) for n in range(start, start + 500))
        store.write_records([at_position(start + n, change) for n, change in enumerate(changes, 1)])
    with store.reading() as session:
        session.run("ANALYZE TABLE graph_checkpoints")
    scopes: list[Scope] = [("ns_key", ns_key(thread, "")), ("thread_key", thread), ("namespace", NAMESPACE)]
    pages = [(scope, (f"{n:06d}", b""), ()) for scope in scopes for n in (count - 5, count // 2, 50)]
    for scope, before, runs in [*pages, (scopes[2], ("999999", b""), (run_key("run 3"),))]:
        with store.reading() as session:
            session.run("FLUSH STATUS")
            page = GraphTables(session, NAMESPACE).cells(scope, before, limit, runs)
            names = "('Handler_read_next', 'Handler_read_prev', 'Handler_icp_attempts')"
            steps = sum(int(row[1]) for row in session.rows(f"SHOW SESSION STATUS WHERE Variable_name IN {names}"))
        assert len(page) == limit
        assert steps < 10 * limit, f"{steps} rows were passed for a page of {limit} of {scope} before {before}"


def test_a_unix_socket(own_server: MariaDB) -> None:
    url = own_server.url("socket", f"unix_socket={own_server.socket}").replace("127.0.0.1", "no.such.host")
    store = MySqlStore(url)
    store.migrate()
    with store.reading() as session:
        assert session.rows("SELECT host FROM information_schema.processlist WHERE id = CONNECTION_ID()") == [
            ("localhost",)
        ]
    store.close()


@pytest.mark.parametrize(
    ("options", "encrypted"),
    [
        ("ssl_mode=DISABLED", False),
        ("ssl_mode=REQUIRED", True),
        ("ssl_ca={folder}/ca.pem&ssl_mode=REQUIRED", True),
        ("ssl_ca={folder}/other.pem&ssl_mode=DISABLED", False),
    ],
)
def test_tls(own_server: MariaDB, options: str, encrypted: bool) -> None:
    store = MySqlStore(own_server.url("tls", options.format(folder=own_server.directory)))
    with store.reading() as session:
        cipher = session.rows("SHOW SESSION STATUS LIKE 'Ssl_cipher'")[0][1]
    assert bool(cipher) == encrypted
    store.close()


@pytest.mark.parametrize("options", ["ssl_ca={folder}/other.pem", "ssl_ca={folder}/ca.pem&ssl_mode=VERIFY_IDENTITY"])
def test_a_certificate_that_does_not_prove_it_is_refused(own_server: MariaDB, options: str) -> None:
    store = MySqlStore(own_server.url("tls", options.format(folder=own_server.directory)))
    with pytest.raises(StoreUnavailable, match="check the server's certificate"):
        store.ping()


@pytest.mark.parametrize("options", ["ssl_mode=REQUIRED", "ssl_ca={folder}/ca.pem"])
def test_a_server_without_tls_is_refused_if_tls_is_required(
    own_server: MariaDB, mariadb_server: MariaDB, options: str
) -> None:
    store = MySqlStore(mariadb_server.url("plain", options.format(folder=own_server.directory)))
    with pytest.raises(StoreUnavailable, match=r"the server has no TLS|error 2026"):
        store.ping()


# ---- servers that refuse


def test_a_wrong_password_is_transient(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("x").replace(own_server.password, "wrong-secret"))
    with pytest.raises(StoreUnavailable, match=r"error 1045.*check user and password") as caught:
        store.ping()
    assert isinstance(caught.value, StoreMisconfigured)
    assert "wrong-secret" not in str(caught.value)


def test_an_unknown_database_is_transient(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("x").replace("/x", "/nowhere"))
    with pytest.raises(StoreUnavailable, match=r"error 1049.*CREATE DATABASE"):
        store.migrate()


def test_a_server_that_is_not_there_is_transient(own_server: MariaDB) -> None:
    store = MySqlStore("mysql://u@127.0.0.1:1/d")
    with pytest.raises(StoreUnavailable, match=r"cannot connect to .* is the server running") as caught:
        store.ping()
    assert isinstance(caught.value.__cause__, MySQLdb.OperationalError)


def test_small_packets_are_named(own_server: MariaDB) -> None:
    own_server.run("SET GLOBAL max_allowed_packet = 4194304")
    try:
        store = MySqlStore(own_server.url("x"))
        with pytest.raises(StoreUnavailable, match="set max_allowed_packet to 16M"):
            store.ping()
    finally:
        own_server.run("SET GLOBAL max_allowed_packet = 16777216")
    store.ping()
    store.close()


def test_a_read_only_server_is_transient(own_server: MariaDB) -> None:
    url = own_server.url("readonly").replace(USER, "limited")
    own_server.run(f"CREATE OR REPLACE USER limited@'%' IDENTIFIED BY '{own_server.password}'")
    own_server.run("GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, INDEX ON readonly.* TO limited@'%'")
    store = MySqlStore(url)
    store.migrate()
    own_server.run("SET GLOBAL read_only = 1")
    try:
        with pytest.raises(StoreUnavailable, match=r"error 1290.*read-only"):
            store.write_records([event(1)])
        with pytest.raises(StoreUnavailable, match=r"error 1290.*read-only"):
            store.probe()
        store.ping()
    finally:
        own_server.run("SET GLOBAL read_only = 0")
    store.write_records([event(1)])
    assert store.counts(NAMESPACE).events == 1
    own_server.run("REVOKE INSERT ON readonly.* FROM limited@'%'")
    fresh = MySqlStore(url)
    with pytest.raises(StoreUnavailable, match=r"error 1142.*GRANT"):
        fresh.write_records([event(2)])
    fresh.close()
    store.close()


def test_a_character_set_that_lacks_characters_is_not_the_records_fault(store: MySqlStore) -> None:
    record = event(1, event_type="\U0001f99c")
    with store.writing() as session:
        session.run("ALTER TABLE agent_events MODIFY event_type VARCHAR(255) CHARACTER SET utf8mb3 NOT NULL")
    with pytest.raises(StoreDataError, match="error 1366"):
        store.write_records([record])
    store.probe("writer")
    with pytest.raises(StoreUnavailable, match="no record is to blame"):
        store.probe("writer", record)


@pytest.mark.parametrize(
    "alteration",
    [
        "ALTER TABLE agent_events DROP COLUMN step_index",
        "ALTER TABLE agent_events ADD COLUMN extra INT NOT NULL",
        "ALTER TABLE agent_events MODIFY step_index TINYINT NOT NULL",
        "ALTER TABLE agent_events MODIFY created_us DATETIME NOT NULL",
        "ALTER TABLE agent_events MODIFY event_type ENUM('probe') NOT NULL",
        "ALTER TABLE agent_events MODIFY body MEDIUMBLOB NOT NULL",
        "ALTER TABLE agent_events ADD CONSTRAINT short CHECK (body_bytes < 100)",
        "ALTER TABLE agent_events ADD COLUMN size TINYINT AS (body_bytes) STORED",
        "ALTER TABLE agent_events PARTITION BY RANGE COLUMNS (record_key) (PARTITION p VALUES LESS THAN (0x01))",
        "CREATE TRIGGER t BEFORE INSERT ON agent_events FOR EACH ROW SIGNAL SQLSTATE '45000'",
        "CREATE TRIGGER t BEFORE INSERT ON agent_events FOR EACH ROW INSERT INTO nowhere VALUES (1)",
        "RENAME TABLE payload_parts TO elsewhere",
    ],
)
def test_no_record_is_blamed_for_what_somebody_did_to_the_tables(store: MySqlStore, alteration: str) -> None:
    record = event(1, key=b"\xff" * 16, step=1000, body=noise(2_000_000, 1))
    with store.writing() as session:
        session.run(alteration)
    try:
        store.write_records([record])
    except StoreDataError:
        with pytest.raises(StoreUnavailable):
            store.probe("writer")
            store.probe("writer", record)
    except StoreUnavailable as error:
        assert "error" in str(error)
    else:
        pytest.fail("it was stored")


# ---- lost connections


def test_a_killed_connection_is_replaced_before_it_is_missed(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("lost"))
    store.migrate()
    for (number,) in own_server.run("SELECT id FROM information_schema.processlist WHERE db = 'lost'"):
        own_server.run(f"KILL {number}")
    store.write_records([event(1)])
    assert store.counts(NAMESPACE).events == 1
    store.close()


def test_a_connection_killed_in_a_transaction_leaves_nothing(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("lost"))
    store.migrate()
    with pytest.raises(StoreConnectionLost) as caught, store.writing() as session:
        store._insert_records(session, [event(1, agent="never", body=noise(3_000_000, 1))])
        own_server.run(f"KILL {session.rows('SELECT CONNECTION_ID()')[0][0]}")
        store._insert_records(session, [event(2, agent="never")])
    assert caught.value.__cause__ is not None
    assert store.events(NAMESPACE, "never", Position(0, 0), None, 9) == []
    assert own_server.run("SELECT COUNT(*) FROM payload_parts", database="lost") == [(0,)]
    store.close()


def test_a_server_that_is_killed_and_comes_back(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("killed"))
    store.migrate()
    first, second, third = event(1), checkpoint(2), event(3)
    store.write_records([first, second])
    own_server.kill()
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            store.write_records([third])
    own_server.start()
    store.write_records([first, second, third])
    assert store.counts(NAMESPACE)[:2] == (2, 1)
    store.close()


def test_a_server_killed_under_a_statement(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("killed"))
    store.migrate()
    threading.Timer(0.2, own_server.kill).start()
    with pytest.raises(StoreConnectionLost, match="lost the connection"), store.reading() as session:
        session.rows("SELECT SLEEP(60)")
    wait_until(lambda: not own_server.running, 30, "the server is gone")
    own_server.start()
    store.ping()
    store.close()


def test_a_server_that_hangs_is_given_up(own_server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    url = own_server.url("hangs")
    store = MySqlStore(url)
    store._pool._connect = lambda: store._connect(statement_seconds=1)
    store.migrate()
    own_server.pause()
    try:
        with pytest.raises(StoreUnavailable):
            store.ping()
    finally:
        own_server.resume()
    store.ping()
    store.close()


def test_a_lock_that_is_held_for_long_is_transient(own_server: MariaDB) -> None:
    store = MySqlStore(own_server.url("locked"))
    store.migrate()
    with store._pool.connection() as connection:
        connection.query("SET SESSION innodb_lock_wait_timeout = 1")
    record = event(1)
    holder = own_server.connect("locked")
    holder.query("START TRANSACTION")
    with holder.cursor() as cursor:
        cursor.execute(
            "INSERT INTO agent_events (record_key, namespace, agent_id, event_id, step_index, event_type, created_us, "
            "store_time_ns, seq, codec, body_bytes) VALUES (%s, 'n', 'a', 'e', 0, '', 0, 0, 0, 0, 0)",
            (record.key,),
        )
    with pytest.raises(StoreUnavailable, match="error 1205"):
        store.write_records([event(2), record])
    holder.rollback()
    store.write_records([record])
    assert store.counts(NAMESPACE).events == 1
    holder.close()
    store.close()


def test_a_migration_waits_for_another_and_not_for_ever(own_server: MariaDB, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skialith.stores.mysql.DATABASE_MIGRATION_LOCK_SECONDS", 1)
    store, other = MySqlStore(own_server.url("migrated")), MySqlStore(own_server.url("migrated"))
    with other.migrating(), pytest.raises(StoreUnavailable, match="another process has been migrating"):
        store.migrate()
    assert store.migrate() == [migration.version for migration in migrate.load("mysql")]
    store.close()


def test_a_killed_parents_locks_end_with_it_though_a_child_lives(own_server: MariaDB) -> None:
    # A child has copies of the parent's sockets, by which a server takes a killed parent for alive.
    url = own_server.url("orphan")
    store = MySqlStore(url)
    store.migrate()
    script = """
import os, sys, threading
from skialith.stores import open_store
from tests.fixtures.stores import event
store = open_store(sys.argv[1])
store.ping()
inside = threading.Event()
def transaction():
    with store.writing() as session:
        store._insert_records(session, [event(1, key=bytes(16), agent="parent")])
        inside.set()
        threading.Event().wait()
threading.Thread(target=transaction, daemon=True).start()
inside.wait()
if os.fork() == 0:
    print("child", os.getpid(), flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Event().wait()
"""
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script, url],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("child")
    parent.kill()
    parent.wait()
    with store._pool.connection() as connection:
        connection.query("SET SESSION innodb_lock_wait_timeout = 5")
    store.write_records([event(1, key=bytes(16), agent="mine")])
    assert [agent.agent_id for agent in store.agents(NAMESPACE)] == ["mine"]
    assert parent.stdin is not None
    parent.stdin.close()
    parent.stdout.close()
    store.close()


@pytest.mark.parametrize("detached", [True, False])
def test_a_childs_end_leaves_the_parents_connections_alone(own_server: MariaDB, detached: bool) -> None:
    # Each of the two guards holds alone: the socket put out of reach, and the object that nothing ever closes.
    url = own_server.url("forked")
    script = f"""
import gc, os, sys
from skialith.stores import open_store, pool
store = open_store(sys.argv[1])
if {detached}:
    pool._keep_for_ever = lambda connection: None
else:
    store._pool._leave = lambda connection: None

def number():
    with store.reading() as session:
        return session.rows("SELECT CONNECTION_ID()")

before = number()
for end in ("collected", "exits"):
    pid = os.fork()
    if pid == 0:
        assert number() != before
        store = None
        gc.collect()
        if end == "collected":
            os._exit(0)
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    with store.reading() as session:
        session._connection.ping()
    assert number() == before, end
"""
    subprocess.run([sys.executable, "-c", script, url], cwd=ROOT, check=True, timeout=60)


# ---- what an error means

# Disk full, too many connections, no database, Galera, no column, duplicate, syntax, TiDB's unknown, no table, lock wait,
# deadlock, read-only, interrupted, no default, a trigger's SIGNAL, binlog format, out of sync, packet, timeout, TiDB's own.
TRANSIENT = (
    *(1021, 1040, 1046, 1047, 1054, 1062, 1064, 1105, 1114, 1146, 1205, 1213, 1290, 1317, 1364, 1644, 1665, 1792),
    *(2014, 2020, 3024, 8004, 8025, 8027, 9001, 9005, 9007),
)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(code, StoreDataError) for code in DATA_ERRORS]
    + [(code, StoreConnectionLost) for code in CONNECTION_ERRORS]
    + [(code, StoreMisconfigured) for code in (1044, 1045, 1049, 1142, 1227, 1698)]
    + [(code, StoreUnavailable) for code in TRANSIENT],
)
def test_what_a_code_means(code: int, kind: type[StoreError]) -> None:
    found = translate(MySQLdb.OperationalError(code, "said by the server"), "mysql://u:***@h/d")
    assert type(found) is kind
    assert f"error {code}" in str(found)
    assert "mysql://u:***@h/d" in str(found)
    assert isinstance(found, StoreUnavailable) == found.retryable
    if isinstance(found, StoreDataError):
        assert found.code == code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MySQLdb.InterfaceError(0, ""), StoreConnectionLost),
        (MySQLdb.OperationalError("no code"), StoreUnavailable),
        (MySQLdb.OperationalError(), StoreUnavailable),
        (MySQLdb.ProgrammingError("not all arguments converted"), StoreUnavailable),
    ],
)
def test_errors_without_a_code(error: MySQLdb.Error, kind: type[StoreError]) -> None:
    assert type(translate(error, "mysql://h/d")) is kind


@pytest.mark.parametrize("code", [2002, 2003, 2006, 2013, 2026, 1040, 1053, 1927])
def test_what_fails_before_there_is_a_connection_loses_none(code: int) -> None:
    assert type(translate(MySQLdb.OperationalError(code, "x"), "mysql://h/d", connecting=True)) is StoreUnavailable
