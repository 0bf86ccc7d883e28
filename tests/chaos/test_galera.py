"""A multi-primary Galera cluster: nodes that are killed, cut off and late, and writers of several nodes in each other's way."""

from __future__ import annotations

import contextlib
import random
import secrets
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skialith.errors import ConfigurationError, StoreUnavailable
from skialith.graphs import Delete, Operation
from skialith.langchain import SkialithCheckpointer
from skialith.stores import graphs as stores_graphs
from skialith.stores import mysql
from skialith.stores.mysql import MySqlStore
from tests.fixtures.galera import Galera, Node
from tests.fixtures.graph_model import Model, at_position, put, tables, writes
from tests.fixtures.nats import wait_until
from tests.fixtures.stores import NAMESPACE, outside

from .checker import Checker
from .conftest import Report
from .evidence import APPENDS
from .graph_world import Driver, mirror
from .outside import read_tables
from .test_graphs import check
from .world import Child, World, rounds

pytestmark = pytest.mark.chaos
OFF = {"writer": "off"}
SEEN_SECONDS = 30.0


@pytest.fixture(scope="module")
def galera() -> Iterator[Galera]:
    with Galera() as cluster:
        yield cluster


@pytest.fixture
def database(galera: Galera) -> str:
    """A new database at every node of a whole cluster."""
    galera.heal()
    name = f"test_{secrets.token_hex(6)}"
    galera.nodes[0].run(f"CREATE DATABASE {name}")
    galera.level()
    return name


class GaleraWorld(World):
    """A world whose children each have a node of their own for a database; the verdict reads the first one, and compares."""

    def __init__(self, place: Path, nats_url: str, galera: Galera, database: str, seed: int) -> None:
        self.galera = galera
        self.urls = [node.address(database) for node in galera.nodes]
        super().__init__(place, nats_url, self.urls[0], seed)

    def at(self, node: Node, **settings: Any) -> dict[str, Any]:
        """Settings of a child that uses this node."""
        return {"database_url": self.urls[self.galera.nodes.index(node)], "timeout": 15.0, **settings}

    def check_same(self) -> None:
        """Every node has the same rows."""
        first, *others = [read_tables(url, self.namespace) for url in self.urls]
        for other in others:
            for name in ("events", "checkpoints", "traces", "letters"):
                assert sorted(getattr(first, name), key=repr) == sorted(getattr(other, name), key=repr), name


@pytest.fixture
def world(tmp_path: Path, nats_url: str, galera: Galera, database: str, seed: int) -> Iterator[GaleraWorld]:
    with GaleraWorld(tmp_path, nats_url, galera, database, seed) as each:
        yield each
    print(galera.logs())


@pytest.fixture
def stores(galera: Galera, database: str) -> Iterator[list[MySqlStore]]:
    """A store for each node, on one database without tables."""
    made = [MySqlStore(node.address(database)) for node in galera.nodes]
    yield made
    for each in made:
        each.close()


# ---- nodes that go


def test_nodes_are_killed_and_cut_off(world: GaleraWorld, report: Report) -> None:
    """A node is killed (or stands still), and the writers beside it go on; then no node has a majority; then all come back.

    Nobody who appends notices. Whoever reads at a node that is away, or refuses (1047), is told so, and sees nothing old.
    """
    galera, faults = world.galera, 0
    # The agent "three" has a writer of its own, at the third node.
    writers = [world.spawn("write", f"writer-{node.name}", settings=world.at(node)) for node in galera.nodes[:2]]
    for writer in writers:
        writer.wait_ready()
    agents = [
        world.spawn(
            agents=["one", "two"], threads=2, most=20, large=0.02, pace=0.4, settings=world.at(galera.nodes[0], **OFF)
        ),
        world.spawn(agents=["three"], batches=0.5, most=20, pace=0.4, settings=world.at(galera.nodes[2])),
    ]
    browsers = [
        world.spawn("browse", "browser", agents=["one", "three"], pace=0.5, settings=world.at(node, **OFF))
        for node in galera.nodes[1:]
    ]
    for child in (*agents, *browsers):
        child.wait_ready()
    for number in range(rounds(1)):
        if number and world.dice.random() < 0.3:
            faults += _lose_all(world, agents)
        else:
            faults += _lose_two(world, agents, killed=number == 0 or world.dice.random() < 0.5)
    for child in (*agents, *browsers, *writers):
        assert child.stop() == 0, child.tail()
    verdict = world.verdict(steady=True)
    world.check_same()
    report("22 Galera: nodes killed and cut off", faults, verdict)
    assert not verdict.problems, str(verdict)
    evidence = world.evidence()
    assert not evidence.errors(*APPENDS)
    assert evidence.errors("peek", "history") <= {"StoreUnavailable", "StoreConnectionLost"}
    assert any("error 1047" in call.text for call in evidence.of("history"))
    looks = [call.result for call in evidence.of("peek") if not call.error and call.ended]
    assert any(look["source"] == "wal" and not look["database_ok"] for look in looks)
    assert any("cannot store records" in writer.log.read_text("utf-8", "replace") for writer in writers)


def _lose_two(world: GaleraWorld, agents: list[Child], *, killed: bool) -> int:
    """One is killed, or stands still until the others go on without it; then the others are cut off from each other."""
    gone, apart, left = world.dice.sample(world.galera.nodes, 3)
    print(f"{gone.name} {'is killed' if killed else 'stands still'}, {apart.name} is cut off")
    gone.kill() if killed else gone.pause()
    wait_until(lambda: left.status("cluster_size") == "2", SEEN_SECONDS, "two are left")
    stored = _events(left, world)
    wait_until(lambda: _events(left, world) > stored, SEEN_SECONDS, "the writers of the others go on")
    apart.isolate(True)
    wait_until(lambda: {apart.status("ready"), left.status("ready")} == {"OFF"}, SEEN_SECONDS, "no majority")
    late = world.spawn(agents=[f"late-{len(agents)}"], pace=0.4, settings=world.at(left))
    for agent in agents:
        agent.wait_writes(20)
    apart.isolate(False)
    if not killed:
        gone.resume()
    world.galera.wait_whole()
    assert not killed or "IST received" in gone.log.read_text("utf-8", "replace")
    late.wait_ready()
    late.wait_writes(10)
    agents.append(late)
    return 2


def _lose_all(world: GaleraWorld, agents: list[Child]) -> int:
    """All are killed at once, and the one that stands furthest begins again."""
    print("all are killed")
    for node in world.galera.nodes:
        node.kill()
    for agent in agents:
        agent.wait_writes(20)
    world.galera.begin_again()
    return 3


def _events(node: Node, world: GaleraWorld) -> int:
    name = world.urls[0].rpartition("/")[2]
    return int(node.run(f"SELECT COUNT(*) FROM {name}.agent_events WHERE namespace = %s", (world.namespace,))[0][0])


# ---- commits in each other's way


def test_nodes_commit_the_same_records(world: GaleraWorld, report: Report) -> None:
    """Writers that stand before their COMMIT while another node's writer stores the same: 1213, and the rows stay single.

    One node applies the other's rows meanwhile and ends its writer's transaction by force; one cannot, and refuses it then.
    """
    galera, faults = world.galera, 0
    here, forced, certified = galera.nodes
    for _ in range(rounds(1)):
        agents = world.spawn(agents=["one", "two"], steps=4, own_ids=True, settings=world.at(here, **OFF))
        assert agents.wait() == 0, agents.tail()
        world.hurry()
        late = [
            world.spawn("write", f"late-{node.name}", freeze={"before commit": 1}, settings=world.at(node))
            for node in (forced, certified)
        ]
        for writer in late:
            writer.wait_frozen()
        aborts, refusals = forced.count("local_bf_aborts"), certified.count("local_cert_failures")
        with galera.held_back(certified):
            world.settle()
            wait_until(lambda: forced.count("local_bf_aborts") > aborts, SEEN_SECONDS, "it is ended")  # noqa: B023
            late[0].signal(signal.SIGCONT)
            with certified.replicating():
                late[1].signal(signal.SIGCONT)
        for writer in late:
            writer.wait_for(lambda _: "error 1213" in writer.log.read_text("utf-8", "replace"), "is told")  # noqa: B023
        assert certified.count("local_cert_failures") > refusals
        for writer in late:
            assert writer.stop() == 0, writer.tail()
        faults += 2
    verdict = world.verdict(steady=True)
    world.check_same()
    report("22 Galera: commits in conflict", faults, verdict)
    assert not verdict.problems, str(verdict)


@pytest.mark.parametrize("broken", [False, True])
def test_a_put_behind_another_nodes_deletion(
    galera: Galera, stores: list[MySqlStore], monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """A thread's row that is locked at one node keeps out no other node's transaction on the thread, but a change of it does.

    The canary only locks: the put, which stands before the deletion in the log, would outlive it.
    """
    if broken:
        monkeypatch.setattr(mysql._Session, "hold", lambda *_: None)
    here, there = stores[:2]
    here.migrate()
    kept, dead, deletion = put(checkpoint_id="0"), put(checkpoint_id="1"), Delete("t")
    changes: list[Operation] = [kept, dead, writes(checkpoint_id="1"), deletion]
    records = [at_position(n, change) for n, change in enumerate(changes, 1)]
    here.write_records(records[:1])
    galera.level()

    def store_late() -> None:
        with there._errors(), there.writing() as session:
            stores_graphs.apply(session, records[1:3])
            entered.set()
            assert go_on.wait(SEEN_SECONDS)

    entered, go_on, failed = threading.Event(), threading.Event(), []

    def late() -> None:
        try:
            store_late()
        except StoreUnavailable as error:
            failed.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    assert entered.wait(SEEN_SECONDS)
    with galera.held_back(galera.nodes[1]):
        here.write_records(records[3:])
        with galera.nodes[1].replicating():
            go_on.set()
    thread.join(SEEN_SECONDS)
    assert [str(error).count("error 1213") for error in failed] == ([] if broken else [1])
    there.write_records(records[1:3])  # as the writer does, until it succeeds
    galera.level()
    model = Model()
    for record, change in zip(records, changes, strict=True):
        model.apply(record.key, change)
    for node_store in galera.nodes:
        with outside(node_store.address(there._arguments["database"])) as run:
            assert bool(tables(run, NAMESPACE).difference(model.keyed(NAMESPACE))) is broken


def test_graphs_by_writers_of_all_nodes(world: GaleraWorld) -> None:
    """Threads of graphs that several users drive at once, stored by a writer at each node and read at each."""
    with contextlib.ExitStack() as stack:
        users = []
        for node in world.galera.nodes:
            settings = world.options(settings=world.at(node, **OFF)).settings
            users.append(stack.enter_context(SkialithCheckpointer(**settings)))
        mirror(world.nats_url, world.namespace)
        writers = [world.spawn("write", "writer", settings=world.at(node)) for node in world.galera.nodes]
        dice = world.dice
        drivers = [
            Driver(saver, random.Random(dice.randrange(1 << 32)), f"d{n}", 50 * rounds(1))
            for n, saver in enumerate(users)
        ]
        for driver in drivers:
            driver.join()
        for writer in writers:
            writer.wait_ready()
            assert writer.stop() == 0, writer.tail()
        world.settle()
        world.check_exits()
        world.galera.level()
    problems = check(world, drivers)
    assert not problems, "\n".join(problems[:20])


# ---- nodes that are late


def test_readers_of_a_node_that_lags(world: GaleraWorld, tmp_path: Path, report: Report) -> None:
    """What another node's writer has stored, and the log does not have any more, is seen at a node that has not applied it.

    Beside the reader the canary, which does not wait for that; what it wrote down is judged for itself.
    """
    here, there = world.galera.nodes[:2]
    child = world.spawn(agents=["one"], steps=3, settings=world.at(here))
    assert child.wait() == 0, child.tail()
    world.settle()
    world.galera.level()
    aside = tmp_path / "canary"
    aside.mkdir()
    with world.galera.held_back(there):
        child = world.spawn(agents=["one"], steps=3, settings=world.at(here))
        assert child.wait() == 0, child.tail()
        world.settle()
        reading: dict[str, Any] = {"agents": ["one"], "settings": world.at(there, **OFF)}
        canary = world.spawn("read", "canary", folder=str(aside), break_="read what a node has", **reading)
        assert canary.wait() == 0, canary.tail()
        reader = world.spawn("read", "reader-there", **reading)
        wait_until(lambda: not reader.running or _waits(there), SEEN_SECONDS, "the reader waits, or has read")
    assert reader.wait() == 0, reader.tail()
    verdict = world.verdict(steady=True)
    report("22 Galera: readers of a node that lags", 1, verdict)
    assert not verdict.problems, str(verdict)
    canary.file.rename(world.folder / canary.file.name)
    caught = Checker(world.evidence(), read_tables(world.database_url, world.namespace), world.log()).verdict()
    report("canary: readers do not wait for their node", 1, caught)
    assert all("canary" in text for text in caught.problems), caught
    assert any(text.startswith("RESUME went back") for text in caught.problems), caught
    assert any(text.startswith("HISTORY") and "lacks" in text for text in caught.problems), caught


def _waits(node: Node) -> bool:
    """Whether a query of a store waits there for what the node has not applied."""
    waiting = "SELECT 1 FROM information_schema.processlist WHERE command = 'Query' AND info LIKE 'SELECT 1 FROM information%%'"
    return bool(node.run(f"{waiting} AND id <> CONNECTION_ID()"))


def test_a_node_that_lags_for_long(galera: Galera, stores: list[MySqlStore]) -> None:
    """Readers wait as long as the cluster's setting says, and are told that the database does not answer."""
    stores[0].migrate()
    stores[1].ping()
    node = galera.nodes[1]
    node.run("SET GLOBAL wsrep_provider_options = 'repl.causal_read_timeout=PT1S'")
    try:
        with galera.held_back(node):
            stores[0].bind_wal(NAMESPACE, "log")
            with pytest.raises(StoreUnavailable, match=r"1205.*lags"):
                stores[1].bound_wal(NAMESPACE)
    finally:
        node.run("SET GLOBAL wsrep_provider_options = 'repl.causal_read_timeout=PT10S'")
    assert stores[1].bound_wal(NAMESPACE) == "log"


def test_a_session_asks_for_no_less_than_the_operator(galera: Galera, database: str) -> None:
    """What a node waits for already stays, and answers from before are never taken."""
    node = galera.nodes[1]
    node.run("SET GLOBAL wsrep_sync_wait = 6, GLOBAL wsrep_dirty_reads = ON")
    store = MySqlStore(node.address(database))
    try:
        with store.reading() as session:
            assert session.rows("SELECT @@wsrep_sync_wait, @@wsrep_dirty_reads") == [(7, 0)]
    finally:
        store.close()
        node.run("SET GLOBAL wsrep_sync_wait = 0, GLOBAL wsrep_dirty_reads = OFF")


# ---- first use at several nodes at once


def test_migrations_and_bindings_at_all_nodes_at_once(galera: Galera, stores: list[MySqlStore]) -> None:
    """A lock is of one node alone: the statements of a migration meet, and one of two logs gets the namespace."""
    for number in range(rounds(3)):
        name = f"{stores[0]._arguments['database']}_{number}"
        galera.nodes[0].run(f"CREATE DATABASE {name}")
        galera.level()
        racing = [MySqlStore(node.address(name)) for node in galera.nodes for _ in range(2)]
        outcomes = _at_once([store.migrate for store in racing])
        assert {type(each) for each in outcomes} == {list}, outcomes
        binds = [lambda store=store, n=n: _bind(store, f"log-{n % 2}") for n, store in enumerate(racing)]
        refused = [str(each) for each in _at_once(binds) if isinstance(each, ConfigurationError)]
        bound = {store.bound_wal(NAMESPACE) for store in racing}
        assert len(bound) == 1 and len(refused) == 3, (bound, refused)
        for node in galera.nodes:
            index = "SELECT COUNT(DISTINCT index_name) FROM information_schema.statistics WHERE table_schema = %s"
            assert node.run(f"{index} AND index_name IN ('by_position', 'by_type')", (name,)) == [(2,)]
            assert node.run(f"SELECT COUNT(*) FROM {name}.skialith_migrations") == [(4,)]
        for store in racing:
            store.close()
        galera.nodes[0].run(f"DROP DATABASE {name}")


def _bind(store: MySqlStore, wal_id: str) -> None:
    """As a writer does: until the database takes it or refuses it."""
    while True:
        try:
            return store.bind_wal(NAMESPACE, wal_id)
        except StoreUnavailable as error:
            assert "1213" in str(error), error


def _at_once(calls: list[Any]) -> list[Any]:
    """What each of the calls returned or raised."""
    outcomes: list[Any] = []
    barrier = threading.Barrier(len(calls))

    def run(call: Any) -> None:
        barrier.wait()
        try:
            outcomes.append(call())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            outcomes.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
