"""Question: what does a caller see when one of three nodes is lost, beside one server that is killed and started again?

Calls go on one by one, 5 ms apart (batches: 100 ms), from before the fault until the cluster is whole again; the longest is the
gap. What replicas cost at rest, and records per second, are in ``test_replicas.py``. Three nodes on this machine, whose disk and
cores they share.
"""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import nats as nats_py
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from skialith import SkialithAgent
from tests.fixtures.cluster import Cluster
from tests.fixtures.nats import NatsServer, wait_until

from .child import Child
from .measure import FEW_ROUNDS, Samples
from .report import NO_SYNC, Report, duration
from .sides import PAYLOAD
from .test_replicas import R3_SURVIVES

QUESTION = f"Three replicas, a fault under load, timeout 20 s ({FEW_ROUNDS} rounds of all faults)"
NAMESPACE = "faults"
STREAM = f"SKIALITH_{NAMESPACE}"
PAUSE_SECONDS = {1: 0.005, 100: 0.1}
"""Between calls of so many events, so that the log is not full before the end."""
WHOLE_SECONDS = 60.0
MORE_CALLS = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("faults")) as each:
        yield each


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("single")) as each:
        yield each


# ---- in the child


@dataclass
class Load:
    """One agent's calls, one after the other in a thread, timed."""

    agent: SkialithAgent
    batch: int
    calls: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self.taken: list[float] = []
        self.thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        while not _stopping.wait(PAUSE_SECONDS[self.batch]):
            events = [(f"{self.calls}-{n}", PAYLOAD) for n in range(self.batch)]
            began = time.perf_counter()
            try:
                self.agent.save_events(events) if self.batch > 1 else self.agent.save_event(*events[0])
            except Exception:  # noqa: BLE001 - counted
                self.failed += 1
            self.taken.append(time.perf_counter() - began)
            self.calls += 1


_stack = ExitStack()
_loads: dict[str, Load] = {}
_stopping = threading.Event()


def begin(urls: dict[str, str]) -> None:
    for name, url in urls.items():
        replicas = 3 if name == "R3" else 1
        for way, fenced, batch in (
            ("save_event", True, 1),
            ("never resumed", False, 1),
            ("save_events of 100", True, 100),
        ):
            agent = _stack.enter_context(
                SkialithAgent(
                    way, nats_url=url, namespace=NAMESPACE, replicas=replicas, writer="off", wal_bytes=2**29, timeout=20
                )
            )
            if fenced:
                agent.resume()
            _loads[f"{way}, {name}"] = Load(agent, batch)
    for load in _loads.values():
        load.thread.start()


def counts() -> list[int]:
    return [load.calls for load in _loads.values()]


def take() -> tuple[dict[str, list[float]], int]:
    """The times of the calls that ended since the last time, and how many failed since the beginning."""
    taken = {way: load.taken for way, load in _loads.items()}
    for load in _loads.values():
        load.taken = []
    return taken, sum(load.failed for load in _loads.values())


def end() -> None:
    _stopping.set()
    for load in _loads.values():
        load.thread.join()
    _stack.close()


# ---- in the bench


class Faults:
    """What happens, by name; each returns when everybody is at work again and every replica current."""

    def __init__(self, cluster: Cluster, single: NatsServer, child: Child) -> None:
        self._cluster, self._single, self._child = cluster, single, child
        self.kinds: dict[str, tuple[str, Callable[[], None]]] = {
            "nothing": ("R1 R3", lambda: time.sleep(1.0)),
            "server killed and started again": ("R1", self._restart),
            "follower killed, wiped": ("R3", lambda: self._kill(self._node(leads=False), wipe=True)),
            "leaders stepped down": ("R3", self._step_down),
            "leader killed": ("R3", lambda: self._kill(self._node(leads=True), wipe=False)),
            "leader stopped, continued": ("R3", self._stop),
            "leader killed, wiped": ("R3", lambda: self._kill(self._node(leads=True), wipe=True)),
        }

    def happen(self, kind: str) -> None:
        self.kinds[kind][1]()
        self._wait_at_work()
        wait_until(lambda: self._cluster.whole(STREAM), WHOLE_SECONDS, "the cluster is whole")

    def _restart(self) -> None:
        self._single.restart()

    def _node(self, *, leads: bool) -> NatsServer:
        leader = self._cluster.leaders(STREAM)[""][0][0]
        return leader if leads else next(server for server in self._cluster.servers if server is not leader)

    def _wait_at_work(self) -> None:
        before = self._child.run(counts)

        def more() -> bool:
            now = self._child.run(counts)
            return all(b - a >= MORE_CALLS for a, b in zip(before, now, strict=True))

        wait_until(more, WHOLE_SECONDS, "all are at work")

    def _kill(self, server: NatsServer, *, wipe: bool) -> None:
        server.kill()
        self._wait_at_work()
        if wipe:
            server.wipe()
        server.start()

    def _stop(self) -> None:
        server = self._node(leads=True)
        server.pause()
        try:
            self._wait_at_work()
        finally:
            server.resume()

    def _step_down(self) -> None:
        async def ask() -> None:
            client = await nats_py.connect(self._cluster.servers[0].url)
            for what in (f"STREAM.LEADER.STEPDOWN.{STREAM}", f"CONSUMER.LEADER.STEPDOWN.{STREAM}.writer"):
                with suppress(nats_py.errors.TimeoutError):
                    await client.request(f"$JS.API.{what}", b"", timeout=5)
            await client.close()

        asyncio.run(ask())


def test_replicated(benchmark: BenchmarkFixture, single: NatsServer, cluster: Cluster, report: Report) -> None:
    taken: dict[str, Samples] = {}
    failed = 0
    with Child() as child:
        child.run(begin, {"R1": single.url, "R3": ",".join(server.url for server in cluster.servers)})
        faults = Faults(cluster, single, child)

        def take_round() -> None:
            nonlocal failed
            for kind, (logs, _) in faults.kinds.items():
                wait_until(lambda: cluster.whole(STREAM), WHOLE_SECONDS, "the cluster is whole")
                child.run(take)
                faults.happen(kind)
                found, failed = child.run(take)
                for way, seconds in found.items():
                    if way[-2:] in logs:
                        taken.setdefault(f"{kind}: {way}", Samples()).add(seconds)

        benchmark.pedantic(take_round, rounds=FEW_ROUNDS, iterations=1)
        child.run(end)
    for way, samples in taken.items():
        longest = [max(each) for each in samples.rounds]
        shown = f"longest {duration(statistics.median(longest))}, {duration(max(longest))}"
        report.latency(QUESTION, way, samples, NO_SYNC if way.endswith("R1") else R3_SURVIVES, shown)
    report.figure(QUESTION, "calls that failed", f"{failed}")
    assert not failed
