"""A consumer as the writer sees it: blocking pulls, bulk acks that die with their connection."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..config import (
    ACK_WAIT_SECONDS,
    API_TIMEOUT_SECONDS,
    LONGEST_MESSAGE_BYTES,
    PULL_AHEAD_BYTES,
    PULL_AHEAD_RECORDS,
    PULL_BYTES,
    PULL_RECORDS,
)
from ..errors import WalUnavailable
from ..records import DeadLetter, Message, Record
from .api import ApiError
from .log import Log
from .loop import LoopThread
from .read import Reader
from .stream import TRACE_INGEST, WRITER, Stream
from .transport import Connection, Disconnected

_EXPIRES_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 1.0
"""How soon a consumer that is gone is looked for again, with its whole stream perhaps."""
_CALL_GRACE_SECONDS = 5.0
_STALE_SECONDS = ACK_WAIT_SECONDS / 2
"""Messages that waited this long here are left to be delivered again, to a writer that is not stuck."""


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
        self._wire = connection.wire
        self._stream = stream
        self._log = log
        self._reader = reader
        self._consumer = consumer
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream.name}.{consumer}"
        self._deliveries = self._wire.deliveries(stream.name, consumer)
        self._gone = consumer == TRACE_INGEST and not stream.traces
        self._look_again = 0.0
        self._asked_at = 0.0
        self._least_bytes = PULL_BYTES
        self._released = False

    def pull(self, rows: int, size: int, linger: float, wait: float) -> list[Message]:
        """Up to ``rows`` messages or ``size`` bytes; at most ``linger`` s after the first, [] after ``wait`` s without one.

        Raises ``WalUnavailable`` when the log cannot be reached.
        """
        deliveries = self._deliveries
        deliveries.enough_rows, deliveries.enough_bytes = rows, size
        end = time.monotonic() + wait
        lingering = False
        while True:
            deliveries.arrived.clear()
            if len(deliveries) >= rows or deliveries.size >= size:
                break
            if len(deliveries) and not lingering:
                lingering, end = True, time.monotonic() + linger
            self._ask()
            left = end - time.monotonic()
            if left <= 0:
                break
            deliveries.arrived.wait(left)
        taken = deliveries.take(rows, size, time.monotonic() - _STALE_SECONDS)
        if taken:
            self._ask()
        elif not self._wire.is_open:
            raise WalUnavailable(
                f"the log cannot be reached: {self._connection.last_error or 'the connection is lost'}"
            )
        return taken

    def _ask(self) -> None:
        """Keep pull requests open for what the next batches need."""
        self._note_status()
        if self._released or (self._gone and not self._restored()):
            return
        if self._stream.seen_server != self._connection.server_id:
            return  # it may be another log, which is not for this database
        deliveries, wire = self._deliveries, self._wire
        now = time.monotonic()
        if deliveries.pulls and now - self._asked_at > _EXPIRES_SECONDS + 1.0:
            wire.forget_pulls(deliveries)  # They should have expired by now: their end was lost on the way.
        size = max(self._least_bytes, self._connection.max_payload + 64 * 1024)
        request = b'{"batch":%d,"expires":%d,"max_bytes":%d}' % (PULL_RECORDS, int(_EXPIRES_SECONDS * 1e9), size)
        while deliveries.expected + len(deliveries) + PULL_RECORDS <= PULL_AHEAD_RECORDS and (
            (deliveries.pulls + 1) * size + deliveries.size <= PULL_AHEAD_BYTES
            or (deliveries.pulls == 0 and deliveries.size < size)
        ):
            if not wire.pull(deliveries, self._subject, request, PULL_RECORDS):
                return
            self._asked_at = now

    def _note_status(self) -> None:
        status = self._deliveries.take_status()
        if status is None:
            return
        code, text = status
        self._gone = self._gone or code == "503" or "Consumer Deleted" in text
        if "MaxBytes" in text:
            # A message from when the server's max_payload was larger: no pull as small as this one ever gets it.
            self._least_bytes = min(2 * self._least_bytes, LONGEST_MESSAGE_BYTES)

    def _restored(self) -> bool:
        """Whether the consumer is there again."""
        if time.monotonic() < self._look_again:
            return False
        self._look_again = time.monotonic() + _LOOK_AGAIN_SECONDS
        try:
            there = self._loop.call(
                self._stream.restore_consumer(self._consumer), API_TIMEOUT_SECONDS + _CALL_GRACE_SECONDS
            )
        except (ApiError, Disconnected) as error:
            raise WalUnavailable(f"the consumer is gone and could not be made anew: {error}") from error
        if there:
            self._gone, self._look_again = False, 0.0
        return there

    def release(self) -> int:
        """Give back what was fetched ahead, so that another writer need not wait for it; returns how many messages."""
        self._released = True
        held = self._deliveries.release()
        self._wire.tell(held, b"-NAK")
        return len(held)

    def ack(self, messages: Sequence[Message]) -> None:
        """Acknowledge, fire and forget; those pulled on an older connection are delivered again instead."""
        self._wire.tell(messages, b"+ACK")

    def nak(self, messages: Sequence[Message], delay: float = 0.0) -> None:
        """Give messages back, to be delivered again ``delay`` seconds from now."""
        self._wire.tell(messages, b"-NAK" if delay <= 0 else b'-NAK {"delay": %d}' % int(delay * 1e9))

    def in_progress(self, messages: Sequence[Message]) -> None:
        """Start the messages' ack wait anew."""
        self._wire.tell(messages, b"+WPI")

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
            ticket.promise.wait(API_TIMEOUT_SECONDS + _CALL_GRACE_SECONDS)
        except TimeoutError as error:
            raise WalUnavailable("no PubAck for a dead letter in time; it is tried again", outcome="unknown") from error
