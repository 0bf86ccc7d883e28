"""Where an exploration of fencing has its log: on one nats-server, or on three with a replica each."""

from __future__ import annotations

import random
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
        return f"{super()._configuration().replace('routes:', 'no_advertise: true, routes:')}\n{MAX_PAYLOAD}\n"


class UnlistedCluster(Cluster):
    """A cluster of such nodes."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        routes = [node._route for node in self.servers if isinstance(node, Node)]
        self.servers = [_Unlisted(directory / f"n{number}", route, routes) for number, route in enumerate(routes)]


class ThreeServers:
    """Each process is a client of one of them. Disturbed by one that is killed and starts again, or a leader that steps down."""

    replicas = 3
    patience = 40.0

    def __init__(self, cluster: Cluster) -> None:
        self._servers = cluster.servers
        self.url = cluster.servers[0].url

    def port(self, number: int) -> int:
        return self._servers[number % len(self._servers)].port

    def disturb(self, dice: random.Random, stream: str) -> bool:
        with OutsideClient(self.url, stream) as outside:
            wait_until(
                outside.in_step, WHOLE_SECONDS, "every replica is up to date"
            )  # to lose two at once is another promise
            if dice.random() < 0.5:
                outside.step_down()
                return False
        server, other = dice.sample(self._servers, 2)
        server.kill()
        if dice.random() < 0.5:
            with OutsideClient(other.url, stream) as outside:
                outside.last_seq()  # the others have a leader, and go on without it
        server.start()
        return True
