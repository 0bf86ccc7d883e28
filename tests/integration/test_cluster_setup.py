"""Many processes that set up one namespace with three replicas at once: at rest, and while the cluster has no leader."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.cluster import Cluster
from tests.fixtures.nats import wait_until
from tests.fixtures.wal import OpenWal, append, event, new_namespace

PROCESSES = 6
TIMEOUT = 20
"""What docs/PRODUCTION.md tells everybody to set."""
_OPEN = """
import sys, time
from skialith import WalUnavailable
from skialith.config import load
from skialith.wal.client import Wal
url, namespace, timeout = sys.argv[1:]
config = load({}, nats_url=url, namespace=namespace, replicas=3, wal_bytes=64_000_000)
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
while True:
    try:
        wal = Wal(config, lambda: url)
        wal.open(float(timeout))
        break
    except WalUnavailable:  # no leader in time, on a machine that has other things to do: to be tried again, by its own word
        if time.monotonic() - began > 2 * float(timeout):
            raise
print(f"{time.monotonic() - began:.3f} {wal.stream.wal_id}", flush=True)
wal.close()
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "cluster") as each:
        yield each


class Race:
    """Processes that are ready to open a namespace that is not there yet."""

    def __init__(self, cluster: Cluster) -> None:
        self.namespace = new_namespace()
        self.urls = ",".join(server.url for server in cluster.servers)
        self._children = [
            subprocess.Popen(
                [sys.executable, "-c", _OPEN, self.urls, self.namespace, str(TIMEOUT)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(PROCESSES)
        ]
        for child in self._children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"

    def run(self) -> None:
        """All open it, and it is one."""
        for child in self._children:
            assert child.stdin is not None
            child.stdin.write("now\n")
            child.stdin.flush()
        results = [child.communicate(timeout=60) for child in self._children]
        assert [child.returncode for child in self._children] == [0] * PROCESSES, results
        taken = [float(out.split()[0]) for out, _ in results]
        print(f"opened after {min(taken):.1f} to {max(taken):.1f} s")
        assert len({out.split()[1] for out, _ in results}) == 1, results


def assert_as_wanted(race: Race, open_wal: OpenWal) -> None:
    """Streams and consumers are replicated as asked, and records are taken."""
    wal = open_wal(race.urls, namespace=race.namespace, seconds=float(TIMEOUT))
    assert append(wal, event(wal, "a", "e"), seconds=float(TIMEOUT))[0].seq > 0

    def api(name: str) -> dict[str, Any]:
        return wal.call(lambda: wal.stream.api.call(name), float(TIMEOUT))

    for name in (wal.stream.name, wal.stream.dead_name):
        config = api(f"STREAM.INFO.{name}")["config"]
        assert (config["num_replicas"], config["discard"], config["storage"]) == (3, "new", "file")
    assert sorted(api(f"CONSUMER.NAMES.{wal.stream.name}")["consumers"]) == ["trace_ingest", "writer"]
    for consumer in ("writer", "trace_ingest"):
        info = api(f"CONSUMER.INFO.{wal.stream.name}.{consumer}")
        assert (info["config"]["ack_policy"], len(info["cluster"]["replicas"])) == ("explicit", 2)


def test_at_rest(cluster: Cluster, open_wal: OpenWal) -> None:
    race = Race(cluster)
    race.run()
    assert_as_wanted(race, open_wal)


def test_while_a_leader_is_chosen(cluster: Cluster, open_wal: OpenWal) -> None:
    """The one that led takes connections meanwhile, and says nothing."""
    race = Race(cluster)
    leader = cluster.meta_leader()
    assert leader is not None
    leader.pause()
    race.run()
    leader.resume()
    wait_until(lambda: cluster.whole(f"SKIALITH_{race.namespace}"), 60, "the cluster is whole")
    assert_as_wanted(race, open_wal)
