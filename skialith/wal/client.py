"""The blocking face of the log for one process: connect, append, read, own, trim, close."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ..config import (
    API_TIMEOUT_SECONDS,
    CLOSE_SECONDS,
    TRIM_SECONDS,
    WRITER_IN_HAND_SECONDS,
    WRITER_STANDS_SECONDS,
    Config,
)
from ..errors import ConfigurationError, FlushTimeout, SkialithError, WalError, WalUnavailable
from ..graphs import Operations
from ..records import Ack, DeadLetter, Position, Record
from .api import ApiError, NoResponders
from .continuity import Continuity, Setback
from .dead import DeadLetters
from .gets import Gets
from .lane import LaneName, Ticket
from .lease import Leases
from .log import Log
from .loop import LoopThread
from .power import Power
from .read import Reader
from .source import ConsumerSource
from .status import WalStatus, current_status
from .stream import WRITER, Stream
from .transport import Connection, Disconnected, NoReply
from .trim import Trim

log = logging.getLogger("skialith.wal")
T = TypeVar("T")

_GRACE_SECONDS = 5.0
_RELEASE_SECONDS = 2.0
_FLUSH_FIRST_SECONDS = 0.005
_FLUSH_LONGEST_SECONDS = 0.1
_REPLACED_SECONDS = 3.0
"""A leader that was replaced and is reachable has heard of it by now: the heartbeat of the next one comes every second."""


class Wal:
    """One connection to one namespace's log, on its own loop thread. Every method may be called from any thread."""

    def __init__(
        self,
        config: Config,
        find_url: Callable[[], str],
        wal_bytes: int | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """``find_url``: blocking, gives the server URL and restarts an embedded server; ``wal_bytes``: size of a new stream;
        ``loop``: as :class:`LoopThread`."""
        self._config = config
        self._find_url = find_url
        self._wal_bytes = wal_bytes
        self._thread = LoopThread(loop)
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False
        self._watched = False
        self._floor, self._floor_since = -1, 0.0
        self.stands_alone_from = 0
        """While the writer stands still: the first sequence that is surely not trimmed; otherwise 0."""
        self._sources: list[ConsumerSource] = []
        self.connection: Connection
        self.stream: Stream
        self.log: Log
        self.reader: Reader
        self.dead: DeadLetters

    def open(self, timeout: float, create: bool = True) -> None:
        """Connect and provision within ``timeout`` seconds. Raises ``ConfigurationError`` or ``WalUnavailable``.

        Without ``create`` a log that is not there stays so and is a ``WalError``.
        """
        self._thread.start()
        try:
            self._thread.call(self._open(time.monotonic() + timeout, create), timeout + _GRACE_SECONDS)
        except BaseException:
            self.close()
            raise

    async def _open(self, deadline: float, create: bool) -> None:
        guarded = self._config.durability == "power" and not self._config.embedded
        self.connection = Connection(self._config, self._url, guarded=guarded)
        await self.connection.connect(max(0.1, deadline - time.monotonic()))
        self.stream = Stream(self._config, self.connection, self._wal_bytes)
        power = Power(self._config, self.connection, self.stream)
        if guarded:
            power.check_settings()
            if not self.connection.info.get("cluster"):
                await power.look()  # before anything is made there
        await self.stream.provision(deadline, create)
        if guarded:
            await power.begin()
        gets = Gets(self.connection, self.stream)
        leases = Leases(self.connection, self.stream, gets, self._config.lease_seconds)
        self.reader = Reader(self.connection, self.stream, gets)
        self.continuity = Continuity(self.connection, self.stream, self.reader)
        self.connection.on_other_server = self.continuity.another_server
        self.log = Log(self.connection, self.stream, leases, self.reader)
        self.dead = DeadLetters(self.connection, self.stream, self.reader)
        self._trim = Trim(self.connection, self.stream)
        self._tasks = [
            asyncio.create_task(self._keep_house()),
            asyncio.create_task(self.continuity.watch()),
            asyncio.create_task(self.log.end_attempts()),
        ]
        if guarded:
            self._tasks.append(asyncio.create_task(power.keep()))

    def watch_writer(self) -> None:
        """From now on, notice when the writer stands still."""
        self._watched = True

    async def _look_at_writer(self) -> None:
        """Whether the writer stands still, as it does while its database is away."""
        info = await self.stream.consumer_info(WRITER)
        floor = int(info["ack_floor"]["stream_seq"])
        now = time.monotonic()
        if floor != self._floor or not info["num_pending"] + info["num_ack_pending"]:
            self._floor, self._floor_since = floor, now
        self.stands_alone_from = floor + 1 if now - self._floor_since >= WRITER_STANDS_SECONDS else 0

    async def _url(self) -> str:
        return await asyncio.get_running_loop().run_in_executor(None, self._find_url)

    async def _keep_house(self) -> None:
        """Renew leases, refresh the stream's size, forget agents; a failure is met again by the next append, which reports it."""
        while True:
            await asyncio.sleep(min(TRIM_SECONDS, self._config.lease_seconds / 10))
            try:
                self.log.forget_idle()
                self.log.owning.keep(self._config.timeout)
                if self.stream.tally.appended_bytes or self.stream.shorter:
                    await self.stream.info()
                    await self.continuity.look_again()
                if self._watched:
                    await self._look_at_writer()
            except (SkialithError, ApiError, Disconnected, NoReply, NoResponders) as error:
                log.info("housekeeping of %s put off: %s", self.stream.name, error)
            except Exception:  # a bug must not end the renewal of leases
                log.exception("housekeeping of %s failed", self.stream.name)

    @property
    def server_id(self) -> str:
        """Of the server of the current connection, or of the last one; another one after a restart."""
        return self.connection.server_id

    # ---- appending and owning

    def append(self, name: LaneName, records: Sequence[Record], deadline: float) -> Ticket:
        """Hand over records of one lane, in order. Raises ``RecordTooLarge`` or ``WalUnavailable``; nothing was sent."""
        ticket = Ticket(name, len(records))
        self.log.append(ticket, records, deadline)
        return ticket

    def wait(self, ticket: Ticket) -> list[Ack]:
        """One ``Ack`` per record, in order. Raises the call's error; interruptible, and Ctrl-C gives the call up."""
        return self.log.wait(ticket)

    def claim(self, agent_id: str, deadline: float) -> None:
        self._call(lambda: self.log.owning.claim(agent_id, deadline), deadline)

    def confirm(self, agent_id: str, deadline: float) -> None:
        """Raises ``AgentFenced`` if somebody else owns the agent by now, or ``WalUnavailable``."""
        self._call(lambda: self.log.owning.confirm(agent_id, deadline), deadline)

    def release(self, agent_id: str) -> None:
        """Give an agent up; what goes wrong leaves the lease to age out."""
        with contextlib.suppress(WalUnavailable):  # the loop thread does not answer
            self._call(lambda: self.released(agent_id), time.monotonic() + _RELEASE_SECONDS)

    async def released(self, agent_id: str) -> None:
        """As :meth:`release`; on the loop thread."""
        try:
            await self._explained(lambda: asyncio.wait_for(self.log.owning.release(agent_id), _RELEASE_SECONDS))
        except asyncio.TimeoutError:
            log.info("the lease of agent %r stays until it ages out: no answer in %g s", agent_id, _RELEASE_SECONDS)
        except (WalError, ConfigurationError) as error:
            log.info("the lease of agent %r stays until it ages out: %s", agent_id, error)

    # ---- reading

    def last_checkpoint(self, agent_id: str, deadline: float) -> Record | None:
        return self._call(lambda: self.reader.last_checkpoint(agent_id, deadline), deadline)

    def dead_records(self, agent_id: str, kind: str, deadline: float) -> list[Record]:
        """Records of one agent that stand in the dead-letter stream."""
        return self._call(lambda: self.dead.for_agent(agent_id, kind, deadline), deadline)

    def dead_letters(self, deadline: float, *, whole: bool) -> list[DeadLetter]:
        """What stands in the dead-letter stream, oldest first; large bodies only if ``whole``."""
        if not self.dead_count(deadline):
            return []
        return self._call(lambda: self.dead.read(self.stream.subjects.dead, deadline, bodies=whole), deadline)

    def dead_letter(self, sink: str, key: bytes, deadline: float) -> DeadLetter | None:
        """One dead letter of the stream, with its body."""
        if not self.dead_count(deadline):
            return None
        return self._call(lambda: self.dead.find(sink, key, deadline), deadline)

    def dead_count(self, deadline: float) -> int:
        """Messages of the dead-letter stream."""
        return self._call(lambda: self.dead.count(deadline), deadline)

    def end(self, deadline: float) -> Position:
        return self._call(lambda: self.reader.end(deadline), deadline)

    def events(self, agent_id: str, after: Position, deadline: float, seq: int = 0) -> tuple[list[Record], bool]:
        return self._call(lambda: self.reader.events(agent_id, after, deadline, seq), deadline)

    def operations(self, thread_name: str | None, deadline: float) -> Operations:
        """The operations on a graph's thread, or on all, that are in the log and in its dead letters."""
        epoch = self.connection.epoch
        if thread_name is not None:
            subjects = self.stream.subjects
            last = self._last(self.stream.name, subjects.graph(thread_name), deadline)
            if (
                last == 0
                and self._last(self.stream.dead_name, subjects.dead_letter("graph", thread_name), deadline) == 0
            ):
                return Operations([], [], True, epoch)

        async def read() -> Operations:
            found, whole = await self.reader.operations(thread_name, deadline)
            return Operations(found, await self.dead.graphs(thread_name, deadline), whole, epoch)

        return self._call(read, deadline)

    def last_operation(self, thread_name: str, deadline: float) -> tuple[int, int] | None:
        """Sequence of the last operation on a thread in the log (0: none) and the connection it was read over.

        None if only the long way tells: with replicas, which may lag, or without a connection.
        """
        epoch = self.connection.epoch
        seq = self._last(self.stream.name, self.stream.subjects.graph(thread_name), deadline)
        return None if seq is None or epoch != self.connection.epoch else (seq, epoch)

    def _last(self, stream: str, subject: str, deadline: float) -> int | None:
        """Asked by the calling thread itself, which takes half as long as over the loop."""
        if self.stream.replicas > 1:
            return None
        query = json.dumps({"last_by_subj": subject}).encode()
        until = min(deadline, time.monotonic() + API_TIMEOUT_SECONDS)
        reply = self.connection.wire.ask(f"$JS.API.DIRECT.GET.{stream}", query, until)
        headers = (reply.headers if reply is not None else None) or {}
        if headers.get("Status") == "404":
            return 0
        seq = headers.get("Nats-Sequence")
        return None if seq is None else int(seq)

    def operations_after(self, thread_name: str, seq: int, deadline: float) -> list[Record] | None:
        """The operations on a thread behind sequence ``seq`` that are in the log; None if the body of one is missing."""
        found, whole = self._call(lambda: self.reader.operations(thread_name, deadline, seq), deadline)
        return found if whole else None

    def anything_stored(self, timeout: float) -> bool:
        """Whether a writer ever acknowledged a record of this log."""
        deadline = time.monotonic() + timeout
        info = self._call(lambda: self.stream.consumer_info(WRITER, deadline), deadline)
        return int(info["ack_floor"]["consumer_seq"]) > 0

    def with_body(self, record: Record, deadline: float) -> Record:
        return self._call(lambda: self.reader.with_body(record, deadline), deadline)

    def call(self, make: Callable[[], Awaitable[T]], timeout: float) -> T:
        """Run one of this package's coroutines; for the command line."""
        return self._call(make, time.monotonic() + timeout)

    # ---- the writer's side

    def source(self, consumer: str) -> ConsumerSource:
        source = ConsumerSource(self._thread, self.connection, self.stream, self.log, self.reader, consumer)
        self._sources.append(source)
        return source

    def trim(self) -> bool:
        """Remove what is stored from the log; False if some of it must be kept for a while.

        Raises ``WalUnavailable``; the next trim does what this one did not.
        """
        return self._call(self._trim.once, time.monotonic() + 2 * _GRACE_SECONDS)

    def flush(self, timeout: float) -> None:
        """Return when the database has all that this process appended before the call. Raises ``FlushTimeout``."""
        self._call(lambda: self.flushed(timeout), time.monotonic() + timeout)

    async def flushed(self, timeout: float) -> None:
        """As :meth:`flush`; on the loop thread."""
        target, deadline = self.stream.tally.last_seq, time.monotonic() + timeout
        pause = _FLUSH_FIRST_SECONDS
        remaining, since, known = -1, 0.0, False
        while target:
            try:
                if not known:
                    await self._know_the_log(deadline)
                    known = True
                target = min(target, self.stream.tally.last_seq)  # of a log that came back shorter
                stored = await self.stream.stored(target, deadline)
                since = (since or time.monotonic()) if stored is None else 0.0
                if stored or (since and time.monotonic() - since >= _REPLACED_SECONDS):
                    break
                if time.monotonic() + pause >= deadline:
                    info = await self.stream.consumer_info(WRITER)
                    remaining = info["num_pending"] + info["num_ack_pending"]
            except WalUnavailable as error:
                raise FlushTimeout(f"flush: the log did not answer within {timeout:.1f} s: {error}") from error
            if remaining >= 0:
                raise FlushTimeout(
                    f"flush: {remaining} records are durable in the log but not in the database after {timeout:.1f} s: "
                    "check that a writer runs and reaches its database (`skialith status`)",
                    remaining=remaining,
                )
            await asyncio.sleep(pause)
            pause = min(2 * pause, _FLUSH_LONGEST_SECONDS)
        stored_by = max((each.moment for each in self.continuity.setbacks), default=-math.inf) + WRITER_IN_HAND_SECONDS
        await asyncio.sleep(max(0.0, min(stored_by, deadline) - time.monotonic()))

    async def _know_the_log(self, deadline: float) -> None:
        """Wait until it is known whether a log that may be another one has what was appended. Raises ``WalUnavailable``."""
        await self.stream.info(deadline)
        self.continuity.notice_new_log()
        while not self.continuity.sure:
            if time.monotonic() >= deadline:
                raise WalUnavailable("the log was not seen since its server came back")
            await asyncio.sleep(_FLUSH_FIRST_SECONDS)

    def take_setbacks(self) -> list[Setback]:
        """What the log lost of this process's records since the last call; whoever asks tells its caller."""
        taken, self.continuity.setbacks = self.continuity.setbacks, []
        return taken

    def settle(self, timeout: float) -> bool:
        """Wait until every call of this process has its PubAck or its error; False after ``timeout`` seconds."""
        return self.log.drained(time.monotonic() + timeout)

    # ---- looking

    def status(self, timeout: float) -> WalStatus:
        deadline = time.monotonic() + timeout
        return self._call(lambda: self.current_status(deadline), deadline)

    async def current_status(self, deadline: float) -> WalStatus:
        """As :meth:`status`; on the loop thread."""
        return await current_status(self.stream, self.dead, self.connection.info, deadline)

    # ---- life

    def close(self) -> None:
        """Fail what is in flight and stop the loop thread. May be called twice."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(SkialithError):
            self._thread.call(self._close(), CLOSE_SECONDS, whole=True)  # a lent loop may be blocked now
        self._thread.stop()
        if hasattr(self, "log"):
            self.log.end()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._give_back()
        if hasattr(self, "log"):
            self.log.owning.stop()
            await self.log.close()
            with contextlib.suppress(
                asyncio.TimeoutError, SkialithError, ApiError, Disconnected, NoReply, NoResponders
            ):
                await asyncio.wait_for(self.log.owning.release_all(), _RELEASE_SECONDS)
        if hasattr(self, "connection"):
            await self.connection.end_deliveries(self._give_back, _RELEASE_SECONDS / 2)
            await self.connection.close()

    def _give_back(self) -> int:
        """Returns how many messages were given back."""
        return sum(source.release() for source in self._sources)

    def _call(self, make: Callable[[], Awaitable[T]], deadline: float) -> T:
        return self._thread.call(self._explained(make), _patience(deadline))

    async def ask(self, make: Callable[[], Awaitable[T]], deadline: float, *, whole: bool = False) -> T:
        """Run one of this package's coroutines, awaited on a loop of the user's, which is not blocked.

        ``whole``: it goes on to its end when the caller is cancelled.
        """
        return await self._thread.ask(self._explained(make), _patience(deadline), whole=whole)

    async def _explained(self, make: Callable[[], Awaitable[T]]) -> T:
        try:
            return await make()
        except (Disconnected, NoReply, NoResponders) as error:
            cause: Any = self.connection.last_error or error
            raise WalUnavailable(f"the log cannot be reached: {cause}") from error
        except ApiError as error:
            raise WalUnavailable(f"the log refused a request: {error}") from error


def _patience(deadline: float) -> float:
    """How long to wait for a coroutine that keeps its own deadline."""
    return max(0.0, deadline - time.monotonic()) + _GRACE_SECONDS
