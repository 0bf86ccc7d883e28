"""Where an exploration of fencing has its log: on one nats-server, or on three with a replica each."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Protocol

from tests.fixtures.cluster import Cluster, Node
from tests.fixtures.nats import NatsServer, wait_until
from tests.fixtures.outside_nats import OutsideClient

MAX_PAYLOAD = "max_payload: 16KB"
"""So little that a record of a few KB is a large one."""
WHOLE_SECONDS = 60.0


class Site(Protocol):
    """``patience``: how long a call may take that nothing but ``disturb`` stands in the way of, s."""

    replicas: int
    patience: float

    @property
    def url(self) -> str:
        """Where whoever looks from outside connects."""

    def port(self, number: int) -> int:
        """Of the server that the process with this number is a client of."""

    def disturb(self, dice: random.Random, stream: str) -> bool:
        """Kill a server and start it again, or the like. Whether it was killed, and so may have forgotten ids."""


class OneServer:
    """A server of its own."""

    replicas = 1
    patience = 20.0

    def __init__(self, server: NatsServer) -> None:
        self._server = server
        self.url = server.url

    def port(self, number: int) -> int:
        return self._server.port

    def disturb(self, dice: random.Random, stream: str) -> bool:
        self._server.restart()
        return True


class _Unlisted(Node):
    """A node that tells nobody of the others: a client that connected to one of those would leave its proxy behind."""

    def _configuration(self) -> str:
        return super()._configuration().replace("routes:", "no_advertise: true, routes:")


class UnlistedCluster(Cluster):
    """A cluster of such nodes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        routes = [node._route for node in self.servers if isinstance(node, Node)]
        self.servers = [
            _Unlisted(directory / f"n{number}", route, routes, MAX_PAYLOAD) for number, route in enumerate(routes)
        ]


class ThreeServers:
    """Each process is a client of one of them. One is killed or stands still for a while, or the leader steps down."""

    replicas = 3
    patience = 40.0

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._servers = cluster, cluster.servers
        self.url = cluster.servers[0].url

    def port(self, number: int) -> int:
        return self._servers[number % len(self._servers)].port

    def disturb(self, dice: random.Random, stream: str) -> bool:
        # To lose two replicas at once is another promise.
        wait_until(lambda: self._cluster.whole(stream), WHOLE_SECONDS, "the cluster is whole")
        leader = self._cluster.leaders(stream)[""][0][0]
        way = dice.choice([self._step_down, self._kill, self._stop])
        way(dice, stream, leader if dice.random() < 0.5 else dice.choice(self._servers))
        return way == self._kill

    def _step_down(self, dice: random.Random, stream: str, server: NatsServer) -> None:
        with OutsideClient(server.url, stream) as outside:
            outside.step_down()

    def _kill(self, dice: random.Random, stream: str, server: NatsServer) -> None:
        server.kill()
        if dice.random() < 0.5:
            self._wait_for_others(stream, server)
        server.start()

    def _stop(self, dice: random.Random, stream: str, server: NatsServer) -> None:
        """It goes on as if nothing had been, and if it led it answers as the leader until it hears of the next one."""
        server.pause()
        try:
            self._wait_for_others(stream, server)
            time.sleep(dice.uniform(0.0, 0.5))  # requests gather in its sockets
        finally:
            server.resume()
        wait_until(lambda: len(self._cluster.leaders(stream).get("", ())) == 1, WHOLE_SECONDS, "there is one leader")

    def _wait_for_others(self, stream: str, server: NatsServer) -> None:
        """Until they have a leader, and go on without it."""
        other = next(each for each in self._servers if each is not server)
        with OutsideClient(other.url, stream) as outside:
            outside.last_seq()
