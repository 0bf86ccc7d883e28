"""The processes of an exploration of fencing, each on a connection of its own through a proxy that keeps what it sent."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from skialith.config import load
from skialith.errors import SkialithError
from skialith.wal.client import Wal
from skialith.wal.lane import Owner
from tests.fixtures.outside_nats import OutsideClient, Sent, Stored, TappedProxy
from tests.fixtures.wal import new_namespace, soon

from .fencing_model import History, Holder, Violation
from .fencing_sites import Site

AGENTS = ("one", "two")
PROCESSES = 3
FAULTY_SECONDS = 0.1
"""How long a call may take while its process is cut off, and then gives up."""


@dataclass(slots=True, eq=False)
class Process:
    """One process: a log of its own, on a connection of its own."""

    number: int
    proxy: TappedProxy
    wal: Wal
    faulty: bool = False
    holders: dict[str, Holder] = field(default_factory=dict)
    """Of each agent that it claimed for itself."""
    own: set[str] = field(default_factory=set)
    """The agents that it may write for, fenced or not."""


def at_once(calls: Sequence[Callable[[], None]], meanwhile: Callable[[], None]) -> None:
    """Make calls in a thread each, and ``meanwhile`` in this one. Raises the first error."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        meanwhile()
    finally:
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class Processes:
    """A namespace of one exploration: its processes, and what happened to it.

    ``lock``: for ``history`` and ``outside`` while several threads are at work. ``faults``: how often each kind happened.
    ``longest``: the longest wait of a caller that nothing but a disturbed site stood in the way of, s.
    """

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.seed = seed
        self.history = History()
        self.namespace = new_namespace()
        self.prefix = f"skialith.{self.namespace}."
        self.stream = f"SKIALITH_{self.namespace}"
        self.outside = OutsideClient(site.url, self.stream)
        self.lock = threading.RLock()
        self.processes: list[Process] = []
        self.owners: dict[Holder, Owner] = {}
        self.sent: list[Sent] = []
        self.faults: Counter[str] = Counter()
        self.longest = 0.0
        self.restarted = time.monotonic()
        self._closing: list[threading.Thread] = []
        self._made = 0
        for _ in range(PROCESSES):
            self._open()

    def _connect(self, port: int, **settings: object) -> Wal:
        url = f"nats://127.0.0.1:{port}"
        given = {"namespace": self.namespace, "wal_bytes": 64 << 20, "replicas": self.site.replicas, **settings}
        wal = Wal(load({}, nats_url=url, **given), lambda: url)
        wal.open(self.site.patience)
        return wal

    def _open(self) -> None:
        self._made += 1
        proxy = TappedProxy("127.0.0.1", self.site.port(self._made), self._made, self.prefix)
        proxy.start()
        self.processes.append(Process(self._made, proxy, self._connect(proxy.port)))

    def _pick(self, dice: random.Random) -> Process:
        return dice.choice(self.processes)

    def _frames(self) -> list[Sent]:
        return self.sent + [sent for process in self.processes for sent in process.proxy.sent]

    def _bury(self, process: Process) -> None:
        """Of one that was cut off for good: keep what it sent, and end what is left of it."""
        self.sent += process.proxy.sent
        self._end(process)

    def _end(self, process: Process) -> None:
        def close() -> None:
            process.wal.close()
            process.proxy.stop()

        thread = threading.Thread(target=close, name=f"closing-{process.number}")
        thread.start()
        self._closing.append(thread)

    def close(self) -> None:
        """End all processes."""
        self.outside.close()
        for process in self.processes:
            process.proxy.stall(False)
            process.proxy.release()
            self._end(process)
        for thread in self._closing:
            thread.join()

    def _deadline(self, process: Process) -> float:
        return soon(FAULTY_SECONDS if process.faulty else self.site.patience)

    def _waited(self, process: Process, since: float) -> None:
        if not process.faulty:
            self.longest = max(self.longest, time.monotonic() - since)

    def _check_reached(self, process: Process, error: SkialithError) -> None:
        """Whoever had time enough reaches the log."""
        if not process.faulty and process in self.processes:
            raise Violation(f"process {process.number} has no fault, but: {error!r}")

    def _disturb(self, dice: random.Random) -> None:
        """A server is killed and comes back, or the like."""
        with OutsideClient(self.site.url, self.stream) as outside:
            first = outside.last_seq()
            if self.site.disturb(dice, self.stream):
                self.history.restarts.append((first, outside.last_seq()))
        self.restarted = time.monotonic()

    def _lease(self, agent: str) -> Stored | None:
        with self.lock:
            return self.outside.last(f"{self.prefix}lease.{agent}")

    def _last_seq(self) -> int:
        with self.lock:
            return self.outside.last_seq()
