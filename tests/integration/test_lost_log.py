"""A log that comes back older or is made anew while agents and writers live on: the loss is named, and nothing else is lost."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from skialith import AgentFenced, ConfigurationError, RecordsLost, SkialithAgent
from skialith.config import load
from skialith.doctor import examine
from skialith.errors import SkialithError
from skialith.findings import Finding
from skialith.wal import client, continuity
from tests.fixtures.cluster import Cluster
from tests.fixtures.command import Said, skialith
from tests.fixtures.nats import NatsServer, wait_until

Open = Callable[..., SkialithAgent]


class Place:
    """One server and one database, and agents that are closed at the end."""

    def __init__(self, server: NatsServer, place: Path, stack: ExitStack) -> None:
        self.server, self.place, self._stack = server, place, stack
        self.settings = {
            "nats_url": server.url,
            "database_url": f"sqlite:///{place / 'skialith.db'}",
            "timeout": 20.0,
            "wal_bytes": 256 * 1024 * 1024,
        }

    def open(self, agent_id: str = "agent", **settings: Any) -> SkialithAgent:
        return self._stack.enter_context(SkialithAgent(agent_id, **{**self.settings, "writer": "off", **settings}))

    def writer(self) -> SkialithAgent:
        """A runtime of its own, with a writer."""
        return self.open("~writer", writer="on", lease_seconds=3000.0)

    def store_all(self) -> None:
        with SkialithAgent("~once", **self.settings, lease_seconds=3003.0) as agent:
            wal = agent._engine("test").wal
            wait_until(lambda: not any(lag.records for lag in wal.status(5.0).consumers), 30, "all is stored")

    def trim(self) -> None:
        """Until the log holds nothing but a lease."""
        with SkialithAgent("~trim", **self.settings, lease_seconds=3006.0) as agent:
            wal = agent._engine("test").wal
            wait_until(lambda: wal.trim() and wal.status(5.0).messages <= 1, 30, "nothing but a lease is left")

    def run(self, *command: str) -> Said:
        where = ["--nats-url", self.server.url, "--database-url", str(self.settings["database_url"])]
        return skialith(*where, *command, cwd=self.place)

    def finding(self, check: str) -> Finding:
        """What the doctor says about it."""
        (found,) = [each for each in examine(load({}, **{**self.settings, "writer": "off"})) if each.check == check]
        return found

    def copy(self) -> Path:
        self.server.stop()
        copy = self.server.copy_store(self.place / "copy")
        self.server.start()
        return copy

    def put_back(self, copy: Path) -> None:
        self.server.kill()
        self.server.put_back(copy)
        self.server.start()


@pytest.fixture
def place(nats_server: NatsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(client, "WRITER_IN_HAND_SECONDS", 0.2)  # these writers have nothing in their hands
    with ExitStack() as stack:
        yield Place(nats_server, tmp_path, stack)


def sequences(error: RecordsLost) -> list[int]:
    runs = error.sequences
    assert all(count == last - first + 1 for first, last, count in runs)
    return [seq for first, last, _ in runs for seq in range(first, last + 1)]


def ids(agent: SkialithAgent) -> list[str]:
    return [event.event_id for event in agent.history()]


def api(agent: SkialithAgent, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    wal = agent._engine("test").wal
    return wal.call(lambda: wal.stream.api.call(name, body), 10.0)


def test_what_an_older_copy_lacks_is_named_and_nothing_else_is_lost(place: Place) -> None:
    agent, other = place.open(), place.open("other", lease_seconds=3001.0)
    agent.resume()
    agent.checkpoint(1, {"n": 1})
    agent.save_event("before", 1)
    copy = place.copy()
    kept = [agent.save_event(f"kept{n}", n).seq for n in range(3)]
    agent.checkpoint(2, {"n": 2})
    place.store_all()
    lost = [agent.save_event(f"lost{n}", n).seq for n in range(4)]
    theirs = [other.save_event(f"theirs{n}", n).seq for n in range(2)]
    lost.append(agent.checkpoint(3, {"n": 3}).seq)
    place.put_back(copy)
    new = [other.save_event(f"new{n}", n).seq for n in range(5)]
    assert set(new) & {*kept, *lost}, "sequences were handed out again"
    agent.save_event("mine", 0)
    named = place.finding("losses")
    assert named.level == "warn" and "all between have their rows" in named.detail, named
    place.store_all()
    with pytest.raises(RecordsLost) as caught:
        agent.flush()
    assert sequences(caught.value) == lost
    with pytest.raises(RecordsLost) as caught:
        other.flush()
    assert sequences(caught.value) == theirs
    assert agent.flush() == other.flush() == 0  # told once
    assert ids(agent) == ["before", "kept0", "kept1", "kept2", "mine"]
    assert ids(other) == [f"new{n}" for n in range(5)]
    assert agent.peek().step_index == 2
    agent.save_event("lost0", "again")
    place.store_all()
    agent.flush()
    assert ids(agent)[-2:] == ["mine", "lost0"]


def test_doctor_names_what_is_missing_between_rows_whenever_it_is_asked(place: Place) -> None:
    """Also when the log has long grown past where it was."""
    agent = place.open()
    agent.save_event("before", 1)
    place.store_all()
    assert place.finding("losses").level == "ok"
    copy = place.copy()
    lost = [agent.save_event(f"lost{n}", n).seq for n in range(3)]
    # Somebody purges them unstored; what comes behind is stored, and shows how far the log once was.
    api(agent, f"STREAM.PURGE.{agent._engine('test').wal.stream.name}", {"filter": "skialith.default.log.>"})
    stored = agent.save_event("stored", 1).seq
    place.store_all()
    place.put_back(copy)
    for n in range(8):
        agent.save_event(f"new{n}", n)
    for _ in range(2):
        named = place.finding("losses")
        assert named.level == "warn" and "3 sequences between have no row" in named.detail, named
        assert f"{lost[0]} to {lost[-1]}" in named.detail and f"from sequence {stored} or later" in named.detail
        place.store_all()


def test_the_same_server_started_again_loses_and_names_nothing(place: Place) -> None:
    agent, writer = place.open(), place.writer()
    agent.resume()
    for turn in range(3):
        agent.save_events([(f"{turn}.{n}", n) for n in range(20)])
        place.server.restart()
    agent.save_event("last", 1)
    assert agent.flush() == writer.flush() == 0
    assert len(ids(agent)) == 61
    assert place.finding("losses").level == "ok"


def test_a_log_made_anew_is_not_harmed_by_whoever_knew_the_old_one(place: Place) -> None:
    old, owner = place.open(), place.open("owned", lease_seconds=3001.0)
    writer = place.writer()
    owner.resume()
    owner.checkpoint(1, {})
    stored = old.save_event("stored", 1)
    writer.flush()
    wait_until(lambda: old._engine("test").wal.status(5.0).consumers[0].records == 0, 20, "stored")
    api(writer, "CONSUMER.PAUSE.SKIALITH_default.writer", {"pause_until": "2099-01-01T00:00:00Z"})
    lost = [old.save_event(f"lost{n}", n).seq for n in range(3)]
    place.server.kill()
    place.server.wipe()
    waiting: list[Any] = []

    def save() -> None:
        try:
            waiting.append(old.save_event("waits", 1))
        except SkialithError as error:
            waiting.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    place.server.start()
    assert place.finding("stream").level == "fail"  # it only looks, and makes nothing
    anew = place.open("new", lease_seconds=3002.0)  # makes the log
    with pytest.raises(ConfigurationError, match="--adopt-wal"):
        anew.resume()  # which past it has is not known
    first = [anew.save_event(f"new{n}", n).seq for n in range(3)]
    thread.join(40)
    assert waiting and waiting[0].seq > max(lost), waiting
    assert min(first) > max(lost) > stored.seq
    with pytest.raises(AgentFenced, match="expired"):
        owner.checkpoint(2, {})
    owner.resume()
    owner.checkpoint(3, {})
    refused = place.finding("binding")
    assert refused.level == "fail" and "--adopt-wal" in refused.fix
    time.sleep(1.5)  # writers and housekeeping of before have their say
    assert (
        anew._engine("test").wal.status(5.0).consumers[0].records == 5
    )  # nothing is stored in the database of another log
    adopted = place.run("migrate", "--adopt-wal")
    assert adopted.code == 0, adopted.err
    with pytest.raises(RecordsLost) as caught:
        old.flush()
    assert sequences(caught.value) == lost
    assert anew.flush() == 0
    assert ids(anew) == ["new0", "new1", "new2"]
    assert ids(old) == ["stored", "waits"]
    assert owner.peek().step_index == 3
    anew.checkpoint(1, {})


def test_a_stream_deleted_under_everybody(place: Place) -> None:
    """No connection ends. Writers find the new one, and do not feed the old one's database from it."""
    agent, writer = place.open(), place.writer()
    agent.resume()
    agent.save_event("stored", 1)
    writer.flush()
    agent.flush()
    api(writer, "CONSUMER.PAUSE.SKIALITH_default.writer", {"pause_until": "2099-01-01T00:00:00Z"})
    lost = agent.save_event("lost", 1).seq
    api(agent, "STREAM.DELETE.SKIALITH_default")
    anew = place.open("new", lease_seconds=3002.0)
    first = anew.save_event("new", 1)
    assert first.seq > 0
    with pytest.raises(AgentFenced):
        agent.save_event("fenced", 1)
    agent.resume()
    agent.save_event("after", 1)
    anew._engine("test").store.bind_wal("default", anew._engine("test").wal.stream.wal_id, adopt=True)
    assert anew.flush() == 0
    with pytest.raises(RecordsLost) as caught:
        agent.flush()
    assert sequences(caught.value) == [lost]
    assert agent.flush() == 0
    assert ids(agent) == ["stored", "after"] and ids(anew) == ["new"]


def test_a_log_that_is_shorter_than_what_was_acknowledged_is_noticed_on_a_connection_that_lives_on(
    place: Place,
) -> None:
    """As when a majority of replicas went back and this node did not: the connection is made anew and leases are read again."""
    agent = place.open(lease_seconds=30.0)
    agent.resume()
    agent.save_event("one", 1)
    wal = agent._engine("test").wal
    epoch, server_id = wal.connection.epoch, wal.connection.server_id
    wal.stream.tally.note(wal.stream.tally.last_seq + 1000, 1)  # so this is not in the log
    wait_until(lambda: wal.connection.epoch > epoch and wal.connection.is_open, 20, "it is connected anew")
    assert wal.connection.server_id != server_id
    lease = wal.log.lanes["agent"].lease
    assert lease is not None and lease.server_id == server_id
    agent.save_event("two", 1)
    assert lease.server_id == wal.connection.server_id
    place.store_all()
    with pytest.raises(RecordsLost):
        agent.flush()
    assert agent.flush() == 0 and ids(agent) == ["one", "two"]


def looks_late(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nobody looks what the log has until this is set."""
    look, looking = continuity.Continuity._look, threading.Event()

    async def late(self: continuity.Continuity) -> bool:
        return looking.is_set() and await look(self)

    monkeypatch.setattr(continuity.Continuity, "_look", late)
    return looking


def test_what_is_said_to_be_there_already_is_not_taken_for_new(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.open()
    saved = [agent.save_event(f"e{n}", n).seq for n in range(5)]
    looking = looks_late(monkeypatch)
    place.server.restart()
    again = agent.save_event("e1", 1)
    assert again.duplicate and again.seq == saved[1]
    looking.set()
    wal = agent._engine("test").wal
    wait_until(lambda: wal.continuity.sure, 10, "the log is looked at")
    assert wal.take_setbacks() == []


def test_what_came_after_may_be_trimmed_before_anybody_looks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = place.open()
    agent.resume()
    agent.save_event("before", 1)
    copy = place.copy()
    lost = [agent.save_event(f"lost{n}", n).seq for n in range(5)]
    looking = looks_late(monkeypatch)
    place.put_back(copy)
    new = [agent.save_event(f"new{n}", n).seq for n in range(5)]
    assert new == lost
    place.store_all()
    place.trim()
    looking.set()
    with pytest.raises(RecordsLost) as caught:
        agent.flush()
    assert sequences(caught.value) == lost
    assert agent.flush() == 0


def test_an_older_copy_of_all_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "WRITER_IN_HAND_SECONDS", 0.2)
    monkeypatch.setattr(continuity, "DOUBT_SECONDS", 1.0)
    with Cluster(tmp_path / "cluster") as cluster, ExitStack() as stack:
        place = Place(cluster.servers[0], tmp_path, stack)
        place.settings |= {
            "nats_url": ",".join(server.url for server in cluster.servers),
            "replicas": 3,
            "timeout": 25.0,
        }
        agent = place.open()
        agent.resume()
        agent.save_event("before", 1)
        for server in cluster.servers:
            server.stop()
        for number, server in enumerate(cluster.servers):
            server.copy_store(tmp_path / f"copy{number}")
        cluster.start()
        lost = [agent.save_event(f"lost{n}", n).seq for n in range(5)]
        for server in cluster.servers:
            server.kill()
        for number, server in enumerate(cluster.servers):
            server.put_back(tmp_path / f"copy{number}")
        cluster.start()
        new = [agent.save_event(f"new{n}", n).seq for n in range(5)]
        assert new == lost
        place.store_all()
        with pytest.raises(RecordsLost) as caught:
            agent.flush()
        assert sequences(caught.value) == lost
        assert ids(agent) == ["before", *(f"new{n}" for n in range(5))]


@pytest.mark.parametrize("older", ["msgs", "obs"])
def test_consumers_that_come_back_newer_or_older_than_the_records(place: Place, older: str) -> None:
    """The disk had synced one and not the other: what gets sequences that a consumer has acknowledged is stored all the same."""
    agent = place.open()
    agent.save_event("before", 1)
    place.store_all()
    copy = place.copy()
    kept = [agent.save_event(f"kept{n}", n).seq for n in range(6)]
    place.store_all()
    place.server.kill()
    (stream,) = place.server.store.rglob("SKIALITH_default")
    shutil.rmtree(stream / older)
    shutil.copytree(copy / stream.relative_to(place.server.store) / older, stream / older)
    place.server.start()
    new = [agent.save_event(f"new{n}", n).seq for n in range(3)]
    assert (set(new) <= set(kept)) is (older == "msgs")
    place.store_all()
    assert agent.flush() == 0
    new.append(agent.save_event("newest", 1).seq)
    place.store_all()
    assert ids(agent) == ["before", *(f"kept{n}" for n in range(6)), "new0", "new1", "new2", "newest"]
    assert api(agent, "STREAM.INFO.SKIALITH_default")["state"]["messages"] == 0


def test_a_consumer_deleted_under_its_writer(place: Place) -> None:
    agent, writer = place.open(), place.writer()
    agent.save_events([(f"a{n}", n) for n in range(10)])
    agent.flush()
    for consumer in ("writer", "trace_ingest"):
        api(agent, f"CONSUMER.DELETE.SKIALITH_default.{consumer}")
    agent.save_events([(f"b{n}", n) for n in range(10)])
    writer.flush()
    agent.flush()
    assert len(ids(agent)) == 20
