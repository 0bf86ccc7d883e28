"""What waits for a PubAck: one lane per agent, bounded over the whole process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..config import MAX_QUEUED_BYTES, MAX_QUEUED_RECORDS
from ..records import Ack
from .lease import Lease


@dataclass(slots=True, eq=False)
class Entry:
    """One record on its way: its head frame's parts, its chunks if it is large, and what is known of its fate."""

    subject: str
    key: bytes
    data: bytes
    chunk_subject: str
    chunks: list[bytes]
    size: int
    ticket: Ticket
    unknown: bool = False
    done: bool = False


@dataclass(slots=True, eq=False)
class Ticket:
    """One call: its entries, its deadline, and the future that its thread waits on."""

    agent_id: str
    deadline: float
    future: Future[list[Ack]] = field(default_factory=Future)
    acks: list[Ack] = field(default_factory=list)
    count: int = 0
    size: int = 0


@dataclass(slots=True, eq=False)
class Lane:
    """What one agent has waiting. ``lock`` is held while anything of this agent is in flight, leases included."""

    agent_id: str
    queue: deque[Entry] = field(default_factory=deque)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    running: bool = False
    holders: int = 0
    lease: Lease | None = None


class Admission:
    """Bounds what a process has waiting for PubAcks; full means the caller waits."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._records = 0
        self._bytes = 0

    def enter(self, records: int, size: int, deadline: float) -> bool:
        with self._condition:
            return self._condition.wait_for(
                lambda: (
                    self._records == 0
                    or (self._records + records <= MAX_QUEUED_RECORDS and self._bytes + size <= MAX_QUEUED_BYTES)
                ),
                timeout=max(0.0, deadline - time.monotonic()),
            ) and self._add(records, size)

    def _add(self, records: int, size: int) -> bool:
        self._records += records
        self._bytes += size
        return True

    def drained(self, deadline: float) -> bool:
        """Wait until nothing waits for a PubAck; False at the deadline."""
        with self._condition:
            return self._condition.wait_for(lambda: self._records == 0, timeout=max(0.0, deadline - time.monotonic()))

    def leave(self, records: int, size: int) -> None:
        with self._condition:
            self._records -= records
            self._bytes -= size
            self._condition.notify_all()
