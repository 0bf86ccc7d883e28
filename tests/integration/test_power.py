"""``durability="power"``: no record goes to a server that was not seen to sync, whoever restarts whatever meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from skialith.errors import ConfigurationError, SkialithError
from skialith.wal import power
from skialith.wal.client import Wal
from skialith.wal.stream import Stream
from tests.fixtures.cluster import Cluster, Node
from tests.fixtures.command import skialith
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.wal import OpenWal, append, checkpoint, event, soon

ALWAYS = "sync_interval: always"
SYSTEM = 'accounts { $SYS: { users: [ { user: sys, password: "p/w" } ] } }'


@pytest.fixture
def eager(tmp_path: Path) -> Iterator[NatsServer]:
    """A server that syncs; a test may change its ``jetstream_config`` and start it anew."""
    with NatsServer(tmp_path / "eager", monitor=True, jetstream_config=ALWAYS, config=SYSTEM) as server:
        yield server


def system_url(server: NatsServer) -> str:
    return f"nats://sys:p%2Fw@127.0.0.1:{server.port}"


def ways(server: NatsServer) -> list[dict[str, str]]:
    return [{"nats_monitor_url": server.monitor_url}, {"nats_system_url": system_url(server)}]


@pytest.fixture(params=["monitor", "system"])
def way(request: pytest.FixtureRequest, eager: NatsServer) -> dict[str, str]:
    """How syncing is seen."""
    monitored, by_system = ways(eager)
    return monitored if request.param == "monitor" else by_system


def restart(server: NatsServer, jetstream: str) -> None:
    server.kill()
    server.jetstream_config = jetstream
    server.start()


def refused(wal: Wal, name: str, seconds: float = 20.0) -> SkialithError:
    with pytest.raises(ConfigurationError) as caught:
        append(wal, event(wal, "a", name), seconds=seconds)
    return caught.value


def test_it_begins_where_syncing_is_seen(eager: NatsServer, open_wal: OpenWal, way: dict[str, str]) -> None:
    wal = open_wal(eager.url, durability="power", **way)
    wal.claim("a", soon())
    assert append(wal, event(wal, "a", "e"), checkpoint(wal, "a", 1))[0].seq > 0


def test_a_system_account_that_is_none_is_refused(eager: NatsServer, open_wal: OpenWal) -> None:
    for url in (eager.url, f"nats://sys:wrong@127.0.0.1:{eager.port}"):
        with pytest.raises(ConfigurationError, match="system account"):
            open_wal(eager.url, durability="power", nats_system_url=url)


def test_a_server_that_comes_back_without_syncing_gets_no_record(
    eager: NatsServer, open_wal: OpenWal, way: dict[str, str]
) -> None:
    """Whatever was sent, one, many, a large one, one that waited meanwhile: an error that is true, and nothing in the log."""
    wal = open_wal(eager.url, durability="power", **way)
    wal.claim("owned", soon())
    append(wal, event(wal, "a", "before"), event(wal, "a", "before2"))
    eager.kill()
    errors: list[SkialithError] = []

    def wait_through() -> None:
        try:
            append(wal, event(wal, "b", "waited through"), seconds=25)
        except SkialithError as error:
            errors.append(error)

    waiting = threading.Thread(target=wait_through)
    waiting.start()
    eager.jetstream_config = ""
    eager.start()
    waiting.join(40)
    error = refused(wal, "single")
    assert "acknowledges before it syncs" in str(error) and "sync_interval: always" in str(error)
    assert error.outcome == "not_written"
    assert [type(each) for each in errors] == [ConfigurationError]
    for records in (
        [event(wal, "a", f"many{n}") for n in range(40)],
        [event(wal, "a", "large", b"\xc6\x00\x30\x00\x00" + bytes(3 * 1024 * 1024))],
        [checkpoint(wal, "owned", 2)],
    ):
        with pytest.raises(ConfigurationError):
            append(wal, *records, seconds=20)
    with pytest.raises(ConfigurationError):
        wal.log.append_one(event(wal, "a", "direct"), soon(20))
    assert sum(lag.records for lag in wal.status(5.0).consumers if lag.name == "writer") == 2
    restart(eager, ALWAYS)
    append(wal, event(wal, "a", "after"), seconds=25)
    append(wal, checkpoint(wal, "owned", 3), seconds=25)
    assert sum(lag.records for lag in wal.status(5.0).consumers if lag.name == "writer") == 4


def test_records_wait_until_the_check_has_passed(
    eager: NatsServer, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check takes its time after a restart: nothing is sent before, also not by a caller's own thread, and then all is."""
    wal = open_wal(eager.url, durability="power", nats_monitor_url=eager.monitor_url)
    go_on = threading.Event()
    ask = power._ask_monitor

    def slow(url: str) -> power.Server | str:
        assert go_on.wait(30)
        return ask(url)

    monkeypatch.setattr(power, "_ask_monitor", slow)
    eager.restart()
    wait_until(lambda: wal.connection.wire.is_open, 20, "it is connected again")
    done: list[int] = []
    callers = [
        threading.Thread(target=lambda: done.append(wal.log.append_one(event(wal, "a", "one"), soon(25)).seq)),
        threading.Thread(target=lambda: done.append(append(wal, event(wal, "b", "two"), seconds=25)[0].seq)),
    ]
    for caller in callers:
        caller.start()
    wait_until(lambda: bool(wal.connection.wire.queued == 2), 20, "both wait")
    info = wal.call(wal.stream.info, 5.0)
    assert info["state"]["messages"] == 0 and not done
    go_on.set()
    for caller in callers:
        caller.join(30)
    assert len(done) == 2


def test_a_monitor_that_is_away_for_a_while_ends_nothing(eager: NatsServer, open_wal: OpenWal) -> None:
    wal = open_wal(eager.url, durability="power", nats_monitor_url=eager.monitor_url)
    away = power.Power(wal._config, wal.connection, wal.stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(power, "_ask_monitor", lambda url: f"{url} does not answer")
        wal.call(away._judge, 10.0)
        append(wal, event(wal, "a", "e"))


def test_doctor_shows_it(eager: NatsServer, open_wal: OpenWal, tmp_path: Path) -> None:
    open_wal(eager.url)
    options = ["--nats-url", eager.url, "--database-url", f"sqlite:///{tmp_path}/s.db", "--durability", "power"]
    environment = {"SKIALITH_NATS_MONITOR_URL": eager.monitor_url}
    found = {
        each["check"]: each for each in skialith(*options, "doctor", "--json", cwd=tmp_path, **environment).document
    }
    assert found["power"]["level"] == "ok" and eager.name in found["power"]["detail"]
    restart(eager, "")
    said = skialith(*options, "doctor", "--json", cwd=tmp_path, **environment)
    found = {each["check"]: each for each in said.document}
    assert said.code == 1 and found["power"]["level"] == "fail" and "sync_interval: always" in found["power"]["detail"]
    assert found["stream"]["level"] == "ok"


class SyncingNode(Node):
    """A node that syncs, or does not, and has a system account."""

    def _configuration(self) -> str:
        text = super()._configuration() + SYSTEM
        return text.replace("jetstream {", f"jetstream {{\n  {self.jetstream_config}\n", 1)


class SyncingCluster(Cluster):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        for server in self.servers:
            server.__class__ = SyncingNode
            server.jetstream_config = ALWAYS


def test_with_replicas_every_peer_is_seen(tmp_path: Path, open_wal: OpenWal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "POWER_CHECK_SECONDS", 0.2)
    with SyncingCluster(tmp_path / "cluster") as cluster:
        url = ",".join(server.url for server in cluster.servers)
        monitors = [server.monitor_url for server in cluster.servers]
        settings = {"replicas": 3, "durability": "power", "wal_bytes": 64 * 1024 * 1024, "seconds": 25.0}
        with pytest.raises(ConfigurationError, match=f"{cluster.servers[2].name} was not seen"):
            open_wal(url, nats_monitor_url=",".join(monitors[:2]), **settings)
        one = open_wal(url, nats_monitor_url=",".join(monitors), **settings)
        other = open_wal(url, nats_system_url=",".join(map(system_url, cluster.servers)), **settings)
        for wal in (one, other):
            append(wal, event(wal, "a", f"{id(wal)}"), seconds=20)
        lazy = _nobody_is_on(cluster, one, other)
        lazy.kill()
        for wal in (one, other):  # a majority is enough, and is known to sync
            append(wal, event(wal, "a", f"{id(wal)} of two"), seconds=20)
        lazy.jetstream_config = ""
        lazy.start()
        for wal in (one, other):  # a connection that is made anew does not take records for a moment either
            wait_until(lambda wal=wal: wal.connection.refusal is not None, 20, "a peer that does not sync is noticed")  # type: ignore[misc]
        for wal in (one, other):
            assert lazy.name in str(refused(wal, "never"))
        restart(lazy, ALWAYS)
        for wal in (one, other):
            wait_until(lambda wal=wal: _takes(wal), 20, "it opens again by itself")  # type: ignore[misc]
            append(wal, event(wal, "a", f"{id(wal)} again"), seconds=20)


def _takes(wal: Wal) -> bool:
    return wal.connection.wire.takes_records


def _nobody_is_on(cluster: Cluster, *wals: Wal) -> NatsServer:
    """A node that no client is connected to and that does not lead the stream, so that its end is not noticed."""
    used = {str(wal.connection.info["server_name"]) for wal in wals}

    def leader(stream: Stream) -> str:
        assert stream.group is not None and stream.group.leader is not None
        return stream.group.leader

    used.add(leader(wals[0].stream))
    free = [server for server in cluster.servers if server.name not in used]
    if free:
        return free[0]
    return next(server for server in cluster.servers if server.name != leader(wals[0].stream))
