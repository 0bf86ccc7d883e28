"""A consumer as the writer sees it: blocking pulls, bulk acks that die with their connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout

from nats.aio.msg import Msg

from .. import _fastpath
from ..config import (
    ACK_WAIT_SECONDS,
    API_TIMEOUT_SECONDS,
    WRITER_BATCH_BYTES,
    WRITER_BATCH_ROWS,
)
from ..errors import WalUnavailable
from ..records import DeadLetter, Message, Position, Record
from .api import ApiError
from .log import Log
from .loop import LoopThread
from .read import Reader
from .stream import TRACE_INGEST, WRITER, Stream
from .transport import Connection, Disconnected

_EXPIRES_SECONDS = 5.0
_CALL_GRACE_SECONDS = 5.0
_LARGEST_PULL_BYTES = 65 * 1024 * 1024
"""Over the largest message that a server can be configured to take."""
_STALE_SECONDS = ACK_WAIT_SECONDS / 2
"""Messages that waited this long here are left to be delivered again, to a writer that is not stuck."""


class _Pull:
    """The one outstanding pull request and what it delivered, on the loop."""

    def __init__(self, connection: Connection, stream: Stream, consumer: str) -> None:
        self._connection = connection
        self._stream = stream
        self._consumer = consumer
        self._buffer: deque[tuple[float, Message]] = deque()
        self._arrived = asyncio.Event()
        self._listening = False
        self._requested = False
        self._gone = consumer == TRACE_INGEST and not stream.traces
        self._look_again = 0.0
        self._until = 0.0
        self._least_bytes = WRITER_BATCH_BYTES

    async def take(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        self._drop_stale()
        await self._request()
        if not self._buffer:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), wait)
            except asyncio.TimeoutError:
                return []
        end = time.monotonic() + linger
        while self._buffer and len(self._buffer) < rows and self._size() < size:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                break
        taken = self._cut(rows, size)
        await self._request()
        return taken

    def _size(self) -> int:
        return sum(len(message.data) for _, message in self._buffer)

    def _cut(self, rows: int, size: int) -> list[Message]:
        taken: list[Message] = []
        total = 0
        while self._buffer and len(taken) < rows:
            total += len(self._buffer[0][1].data)
            if taken and total > size:
                break
            taken.append(self._buffer.popleft()[1])
        return taken

    def release(self) -> list[Message]:
        """Empty the buffer and ask for nothing more; what it held is to be given back."""
        held = [message for _, message in self._buffer]
        self._buffer.clear()
        return held

    def _drop_stale(self) -> None:
        oldest = time.monotonic() - _STALE_SECONDS
        epoch = self._connection.epoch
        while self._buffer and (self._buffer[0][0] < oldest or self._buffer[0][1].epoch != epoch):
            self._buffer.popleft()

    async def _request(self) -> None:
        """Keep one pull request open while the buffer has room for a batch."""
        if self._gone:
            if time.monotonic() < self._look_again:
                return
            self._look_again = time.monotonic() + _EXPIRES_SECONDS
            if not await self._stream.restore_consumer(self._consumer):
                return
            self._gone, self._look_again = False, 0.0
        if len(self._buffer) >= WRITER_BATCH_ROWS or (self._requested and time.monotonic() < self._until):
            return
        if not self._listening:
            await self._connection.listen(self._consumer, self._on_message)
            self._listening = True
        self._requested = True
        self._until = time.monotonic() + _EXPIRES_SECONDS + 1.0
        size = max(self._least_bytes, self._connection.max_payload + 64 * 1024)
        body = {
            "batch": WRITER_BATCH_ROWS,
            "expires": int(_EXPIRES_SECONDS * 1e9),
            "max_bytes": size,
        }
        reply = self._connection.listener_subject(self._consumer)
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream.name}.{self._consumer}"
        try:
            self._connection.send(_fastpath.pub(subject, reply, json.dumps(body).encode()))
        except Disconnected:
            self._end()
            raise

    def _end(self) -> None:
        self._requested = False
        self._arrived.set()

    def _on_message(self, message: Msg | None) -> None:
        if message is None:
            self._end()
            return
        if not message.reply:
            headers = message.headers or {}
            status, text = headers.get("Status", ""), headers.get("Description", "")
            self._gone = status == "503" or "Consumer Deleted" in text
            if "MaxBytes" in text:
                # A message from when the server's max_payload was larger: no pull as small as this one ever gets it.
                self._least_bytes = min(2 * self._least_bytes, _LARGEST_PULL_BYTES)
            self._end()
            return
        seq, time_ns, deliveries, _ = _fastpath.parse_ack_subject(message.reply)
        position = Position(time_ns, seq)
        self._buffer.append(
            (
                time.monotonic(),
                Message(
                    message.subject,
                    message.data,
                    position,
                    message.reply,
                    self._connection.epoch,
                    deliveries,
                ),
            )
        )
        self._arrived.set()


class ConsumerSource:
    """The durable consumer ``writer`` or ``trace_ingest``. Blocking, for one writer thread."""

    def __init__(
        self,
        loop: LoopThread,
        connection: Connection,
        stream: Stream,
        log: Log,
        reader: Reader,
        consumer: str,
    ) -> None:
        if consumer not in (WRITER, TRACE_INGEST):
            raise ValueError(f"no consumer is named {consumer!r}")
        self._loop = loop
        self._connection = connection
        self._log = log
        self._reader = reader
        self._pull = _Pull(connection, stream, consumer)

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        """Up to ``rows`` messages or ``size`` bytes; at most ``linger`` s after the first, [] after ``wait`` s without one.

        Raises ``WalUnavailable`` when the log cannot be reached.
        """

        async def pull() -> list[Message]:
            try:
                await self._connection.ready(time.monotonic() + wait)
                return await self._pull.take(rows, size, linger, wait)
            except Disconnected as error:
                raise WalUnavailable(f"the log cannot be reached: {self._connection.last_error or error}") from error
            except ApiError as error:
                raise WalUnavailable(f"the consumer is gone and could not be made anew: {error}") from error

        return self._loop.call(pull(), wait + linger + API_TIMEOUT_SECONDS + _CALL_GRACE_SECONDS)

    def release(self) -> None:
        """Give back what was fetched ahead, so that another writer need not wait for it. On the loop."""
        self._send(self._pull.release(), b"-NAK")

    def ack(self, messages: Sequence[Message]) -> None:
        """Acknowledge, fire and forget; those pulled on an older connection are delivered again instead."""
        self._tell(messages, b"+ACK")

    def nak(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        """Give messages back, to be delivered again ``delay`` seconds from now."""
        word = b"-NAK" if delay <= 0 else b'-NAK {"delay": %d}' % int(delay * 1e9)
        self._tell(messages, word)

    def in_progress(self, messages: Sequence[Message]) -> None:
        """Start the messages' ack wait anew."""
        self._tell(messages, b"+WPI")

    def _tell(self, messages: Sequence[Message], word: bytes) -> None:
        self._loop.call_soon(lambda: self._send(messages, word))

    def _send(self, messages: Sequence[Message], word: bytes) -> None:
        epoch = self._connection.epoch
        frames = [_fastpath.pub(message.reply, "", word) for message in messages if message.epoch == epoch]
        # Without a connection they are delivered again on the next one.
        with contextlib.suppress(Disconnected):
            self._connection.send(b"".join(frames))

    def read_body(self, record: Record) -> bytes:
        """The body of a large record. Raises ``BodyMissing`` or ``WalUnavailable``."""
        deadline = time.monotonic() + 2 * API_TIMEOUT_SECONDS
        return self._loop.call(
            self._reader.body(record, deadline),
            2 * API_TIMEOUT_SECONDS + _CALL_GRACE_SECONDS,
        )

    def bury(self, letter: DeadLetter) -> None:
        """Append to the dead-letter stream; returns when it is durable there. Raises ``WalError``."""
        ticket = self._log.bury(letter, time.monotonic() + API_TIMEOUT_SECONDS)
        try:
            ticket.future.result(API_TIMEOUT_SECONDS + _CALL_GRACE_SECONDS)
        except FutureTimeout as error:
            raise WalUnavailable("no PubAck for a dead letter in time; it is tried again", outcome="unknown") from error
