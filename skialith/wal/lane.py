"""What waits for a PubAck: one lane per agent or thread of a graph, one thing in flight per lane."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from ..errors import SkialithError
from ..records import Ack, Kind, Record
from ._promise import Promise
from ._waiting import Turn
from .lease import Lease

LOOK_AGAIN_SECONDS = 0.002
"""How long to wait before looking again at what is counted in C."""


class Thread(NamedTuple):
    """Names the lane of a graph's thread, which is no agent, whatever it is called."""

    name: str


class Owner(NamedTuple):
    """Names the lane of an agent's owner outside of this process, who shows the token of its lease at every write."""

    agent_id: str
    token: str


LaneName: TypeAlias = str | Thread | Owner
"""An agent's id, a thread, or an owner of an agent."""


def lane_name(record: Record) -> LaneName:
    """The lane that a record goes in."""
    return Thread(record.agent_id) if record.kind == Kind.GRAPH else record.agent_id


def who(name: LaneName) -> str:
    """A lane as errors name it."""
    if isinstance(name, Thread):
        return f"thread {name.name!r}"
    return f"agent {name.agent_id!r}" if isinstance(name, Owner) else f"agent {name!r}"


@dataclass(slots=True, eq=False)
class Entry:
    """One record on its way: its head frame's parts, its chunks if it is large, and what is known of its fate.

    ``key``: the message id, 16 bytes. ``deadline``: when its call gives up, ``time.monotonic()``. ``size``: bytes in the log,
    about.
    """

    subject: str
    key: bytes
    data: bytes
    chunk_subject: str
    chunks: list[bytes]
    size: int
    ticket: Ticket
    deadline: float
    unknown: bool = False
    done: bool = False


class Outcome(Protocol):
    """A ``Promise`` for a thread, or an ``Arrival`` for a coroutine, whose ``wait`` is awaited."""

    done: bool
    given_up: bool

    def set(self, result: object) -> bool: ...
    def fail(self, error: BaseException) -> bool: ...
    def give_up(self) -> bool: ...
    def wait(self, seconds: float) -> Any: ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One call: how many records it has, and what is acknowledged of them, in order.

    ``promise``: what its caller waits on; gives ``acks``. ``settle``: of a call that does not wait; gets its one ``Ack``, or
    its error. ``deadline``: of the last record handed over. ``message_id``: of its one record, if that is not to be the
    record's key.
    """

    name: LaneName
    count: int
    deadline: float = 0.0
    settle: Callable[[Ack | SkialithError], object] | None = None
    failed: bool = False
    message_id: bytes | None = None
    promise: Outcome = field(default_factory=Promise)
    acks: list[Ack] = field(default_factory=list)

    @property
    def over(self) -> bool:
        """Nobody wants the rest of it."""
        return self.failed or self.promise.given_up

    def acknowledge(self, ack: Ack) -> None:
        """The next of its records is durable."""
        self.acks.append(ack)
        if self.settle is not None:
            self.settle(ack)
        elif len(self.acks) == self.count:
            self.promise.set(self.acks)

    def fail(self, error: SkialithError) -> None:
        """One of its records failed, and so did those behind it."""
        self.failed = True
        if self.settle is not None:
            self.settle(error)
        else:
            self.promise.fail(error)


@dataclass(slots=True, eq=False)
class Lane:
    """What one agent or thread has waiting. ``turn`` is taken while anything of it is in flight, leases included.

    ``subjects``: of an agent's events and checkpoints; of a thread's operations, twice.
    """

    name: LaneName
    subjects: tuple[str, str]
    turn: Turn = field(default_factory=Turn)
    running: bool = False
    holders: int = 0
    lease: Lease | None = None
    _queue: deque[Entry] | None = None

    @property
    def queue(self) -> deque[Entry]:
        """What waits, oldest first; it is there while something does, since most of a process's many agents have nothing."""
        if self._queue is None:
            self._queue = deque()
        return self._queue

    def take_all(self) -> list[Entry]:
        """All that waits, which does not any more."""
        queue, self._queue = self._queue, None
        return [] if queue is None else list(queue)


@asynccontextmanager
async def holding(turn: Turn) -> AsyncIterator[None]:
    """Hold the turn, as soon as nobody else does; on the loop."""
    if not turn.try_take():
        await _given(turn)
    try:
        yield
    finally:
        turn.give()


async def _given(turn: Turn) -> None:
    mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def accept(_: object) -> None:
        if mine.done():  # cancelled meanwhile
            turn.give()
        else:
            mine.set_result(None)

    if turn.take_later(accept):  # its holder gave it back just now
        return
    try:
        await mine
    except asyncio.CancelledError:
        if not turn.withdraw(accept) and not mine.cancelled():
            turn.give()
        raise
