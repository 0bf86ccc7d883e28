"""A world whose log three nodes keep, and what happens to them: killed, stopped, stepped down, wiped."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats

from tests.fixtures.cluster import Cluster
from tests.fixtures.nats import NatsServer, wait_until

from . import outside
from .script import Options
from .world import Child, World

SYSTEM = "accounts { $SYS { users: [ { user: system, password: system } ] } }"
"""Configuration of the nodes by which the test may ask their leader to step down."""
TIMEOUT = 20.0
"""What docs/PRODUCTION.md tells everybody to set."""
WHOLE_SECONDS = 60.0


class ReplicatedWorld(World):
    """Children know all nodes, and each is connected to whichever it finds first."""

    def __init__(self, place: Path, cluster: Cluster, seed: int) -> None:
        urls = ",".join(server.url for server in cluster.servers)
        super().__init__(place, urls, f"sqlite:///{place / 'skialith.db'}", seed)
        self.cluster = cluster
        self.stream = f"SKIALITH_{self.namespace}"

    def options(self, name: str = "child", **given: Any) -> Options:
        settings = {"replicas": 3, "timeout": TIMEOUT, **given.pop("settings", {})}
        return super().options(name, settings=settings, **given)

    def log(self) -> outside.LogState:
        return outside.read_log(self.leader().url, self.namespace)

    def hurry(self) -> None:
        outside.hurry(self.leader().url, self.namespace)

    def leader(self) -> NatsServer:
        """The stream's; no node may be paused."""
        found: list[NatsServer] = []

        def one() -> bool:
            found[:] = [server for server, _ in self.cluster.leaders(self.stream).get("", ())]
            return len(found) == 1

        wait_until(one, WHOLE_SECONDS, "the stream has one leader")
        return found[0]

    def follower(self) -> NatsServer:
        leader = self.leader()
        return self.dice.choice([server for server in self.cluster.servers if server is not leader])

    def wait_whole(self) -> None:
        wait_until(lambda: self.cluster.whole(self.stream), WHOLE_SECONDS, "the cluster is whole")


class Faults:
    """Each returns when it is over and the cluster whole again: two nodes that are lost at once are another promise.

    ``busy``: who must be at work again before what was taken away comes back.
    """

    def __init__(self, world: ReplicatedWorld, busy: list[Child]) -> None:
        self._world, self._busy = world, busy
        self.kinds: dict[str, Callable[[], None]] = {
            "leader killed": lambda: self._killed(world.leader(), wiped=False),
            "leader stopped and continued": self._stopped,
            "leaders stepped down": self._stepped_down,
            "follower killed and wiped": lambda: self._killed(world.follower(), wiped=True),
            "leader killed and wiped": lambda: self._killed(world.leader(), wiped=True),
        }

    def happen(self, kind: str) -> None:
        began = time.monotonic()
        self.kinds[kind]()
        self._world.wait_whole()
        print(f"{kind}: whole again after {time.monotonic() - began:.1f} s")

    def _killed(self, server: NatsServer, *, wiped: bool) -> None:
        server.kill()
        self._wait_at_work()  # an empty node that comes before there is a leader has a vote and nothing to tell
        if wiped:
            server.wipe()
        server.start()

    def _stopped(self) -> None:
        """It thinks that it leads until it is told otherwise, and answers what it is asked meanwhile."""
        server = self._world.leader()
        agents = sorted({agent for child in self._busy for agent in child.agents})
        glancer = self._world.spawn(
            "glance", "glancer", agents=agents, settings={"nats_url": server.url, "writer": "off"}
        )
        glancer.wait_ready()
        server.pause()
        try:
            self._wait_at_work()
            glancer.signal(signal.SIGUSR1)
            time.sleep(0.3)  # its requests wait in the sockets of the one that stands still
        finally:
            server.resume()
        assert glancer.wait() == 0, glancer.tail()

    def _stepped_down(self) -> None:
        world, groups = self._world, self._world.cluster.leaders(self._world.stream)
        names = [f"CONSUMER.LEADER.STEPDOWN.{world.stream}.{consumer}" for consumer in groups if consumer]
        names.append(f"STREAM.LEADER.STEPDOWN.{world.stream}")
        world.dice.shuffle(names)
        asyncio.run(_ask(world.cluster.servers[0].url, names))
        system = world.cluster.servers[1].url.replace("nats://", "nats://system:system@")
        asyncio.run(_ask(system, ["META.LEADER.STEPDOWN"]))
        self._wait_at_work()

    def _wait_at_work(self) -> None:
        for child in self._busy:
            child.wait_writes(5)


async def _ask(url: str, names: list[str]) -> None:
    """Without waiting for more than a while: who steps down does not always say so."""
    client = await nats.connect(url, connect_timeout=5, allow_reconnect=False)
    try:
        for name in names:
            await client.request(f"$JS.API.{name}", b"", timeout=5)
    except nats.errors.TimeoutError:
        pass
    finally:
        await client.close()
