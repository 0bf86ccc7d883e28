"""A drain: the thread that moves records from a consumer of the log into a sink and acknowledges after the commit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from random import Random

from ..config import (
    ACK_WAIT_SECONDS,
    ERROR_TEXT_CHARACTERS,
    WRITER_BATCH_BYTES,
    WRITER_BATCH_ROWS,
    WRITER_CONNECTION_LOSSES,
    WRITER_GIVE_BACK_SECONDS,
    WRITER_LINGER_SECONDS,
    WRITER_POLL_SECONDS,
)
from ..errors import BodyMissing, StoreConnectionLost, StoreDataError, StoreUnavailable
from ..records import Message, Record
from .apart import Apart, suspects
from .batch import Batch, Deadly, Endless, Undecodable, decode, decode_run, tries
from .dead_letters import bury, letter_for
from .held import Aside, Held
from .outage import Outage, Throttle
from .sinks import Sink, Source
from .status import DrainStatus

log = logging.getLogger("skialith.writer")

_KEEP_SECONDS = ACK_WAIT_SECONDS / 3
"""How often the ack wait of a running transaction's messages is started anew."""
_KEEPER_GRACE_SECONDS = 0.1
"""The second thread ends at once when told to, even if the first one used up the deadline."""


def _nothing() -> None:
    return None


class Drain:
    """Pull, decode, one transaction per batch, commit, then acknowledge; for ever, whatever is away.

    ``on_progress`` is called on the drain's thread after every acknowledgement and must return at once.
    ``before_first`` is called there until it succeeds, before anything is pulled (schema, binding of the log).
    ``apart``: the process that stores records which writers may have died of; None handles them like all others.
    ``random`` and ``clock`` are for tests. A drain is started once and may be stopped before it started, and twice.
    """

    def __init__(
        self,
        source: Source,
        sink: Sink,
        namespace: str,
        *,
        on_progress: Callable[[], None] = _nothing,
        before_first: Callable[[], None] = _nothing,
        apart: Apart | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._sink = sink
        self._namespace = namespace
        self._on_progress = on_progress
        self._before_first = before_first
        self._apart = apart
        self._clock = clock
        self._pulling = Outage(f"{sink.name}: cannot read the log", random=random, clock=clock)
        self._storing = Outage(f"{sink.name}: cannot store records", random=random, clock=clock)
        self._say_dead = Throttle(clock=clock)
        self._say_aside = Throttle(clock=clock)
        self._status = DrainStatus(sink.name)

        self._aside = Aside()
        self._held = Held(self._aside)
        self._pulled_at = 0.0
        self._writing = False
        self._fruitless = False  # a record was given back alone and nothing was stored since

        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._life = threading.Lock()
        name = f"skialith-{sink.name.replace('_', '-')}"
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._keeper = threading.Thread(target=self._keep, name=f"{name}-keep", daemon=True)

    # ---- life

    def start(self) -> None:
        """Start the threads; does nothing if the drain was started or stopped before."""
        with self._life:
            if self._thread.ident is None and not self._stopping.is_set():
                self._thread.start()
                self._keeper.start()

    def stop(self, timeout: float) -> bool:
        """Finish the running transaction and give back what is not committed, within ``timeout`` seconds.

        Returns whether the drain's thread ended. If not (the database hangs), its messages are given back all the same:
        should that transaction still commit, its records are delivered again and found stored.
        """
        deadline = time.monotonic() + timeout
        with self._life:
            self._stopping.set()
        if threading.current_thread() is self._thread:
            return False
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join(max(_KEEPER_GRACE_SECONDS, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return True
        unsettled = self._held.unsettled
        if unsettled:
            log.warning(
                "%s: stopped while a transaction of %d records hangs; they stay in the log and are stored later",
                self._sink.name,
                len(unsettled),
            )
            self._source.nak(unsettled)
        return False

    def status(self) -> DrainStatus:
        """A snapshot; any thread may ask."""
        return replace(self._status, running=self._thread.is_alive())

    def _main(self) -> None:
        try:
            self._prepare()
            while not self._stopping.is_set():
                try:
                    self.step()
                except Exception as error:  # noqa: BLE001 - a bug is shown, and must not end this thread
                    # What is held is delivered again after the ack wait.
                    self._held.let_go()
                    self._trouble(error, self._clock())
                    self.pause(self._storing.pause())
        finally:
            if self._apart is not None:
                self._apart.close()
            self._ended.set()

    def _prepare(self) -> None:
        while not self._stopping.is_set():
            began = self._clock()
            try:
                self._before_first()
            except Exception as error:  # noqa: BLE001 - shown, and tried until it works
                self._trouble(error, began, database=True)
                self.pause(self._storing.pause())
            else:
                self._database_is_back()
                return

    def _keep(self) -> None:
        """The second thread: while a transaction runs long, its messages are not to be delivered again."""
        while not self._ended.wait(_KEEP_SECONDS):
            held = self._held.unsettled
            if held and self._writing and self._clock() - self._pulled_at >= _KEEP_SECONDS:
                try:
                    self._source.in_progress(held)
                except Exception:
                    log.warning(
                        "%s: the ack wait of %d records was not renewed", self._sink.name, len(held), exc_info=True
                    )

    # ---- the seams, in the order of the path

    def pull(self) -> list[Message]:
        """The next messages, [] if there are none now."""
        return self._source.pull(WRITER_BATCH_ROWS, WRITER_BATCH_BYTES, WRITER_LINGER_SECONDS, WRITER_POLL_SECONDS)

    def decode(self, message: Message) -> Record | None:
        """The record to be stored; None if there is none. Raises ``Undecodable``, or what ``Sink.load`` raises."""
        return self._sink.load(decode(self._namespace, message), self._source)

    def decode_run(self, messages: Sequence[Message]) -> list[Record | None]:
        """What ``decode`` returns of each, up to the first one whose body is elsewhere or that does not decode."""
        return decode_run(self._namespace, messages, self._sink.kinds)

    def write(self, records: Sequence[Record]) -> None:
        """One transaction; committed when it returns."""
        self._writing = True
        try:
            self._sink.write(records)
        finally:
            self._writing = False

    def ack(self, messages: Sequence[Message]) -> None:
        """Tell the log that these are done with."""
        self._source.ack(messages)

    def pause(self, seconds: float) -> bool:
        """Wait, or return early with True when the drain is stopping."""
        return self._stopping.wait(seconds)

    # ---- one round

    def step(self) -> None:
        """One round: pull, then store and acknowledge, or give back, all that was pulled."""
        began = self._clock()
        try:
            messages = self.pull()
        except Exception as error:  # noqa: BLE001 - shown, and tried for ever
            self._pulling.failed(error, began)
            self._note(error)
            self.pause(self._pulling.pause())
            return
        self._pulling.over()
        self._held.take(messages, suspects(messages) if self._apart is not None else ())
        self._pulled_at = self._clock()
        while not self._stopping.is_set() and (batch := self._held.next(self.decode, self.decode_run)) is not None:
            began = self._clock()
            try:
                self.settle(batch)
            except Exception as error:  # noqa: BLE001 - judged there; a bug counts as transient
                self._failed(batch, error, began)
            else:
                self._settled(batch)
        self._give_back()

    def settle(self, batch: Batch) -> None:
        """Store a batch, or bury what it holds, and only then acknowledge it."""
        message = batch.messages[0]
        if batch.refused is not None:
            self._bury(message, next(iter(batch.rows()), None), batch.refused)
        elif not self._stored_apart(batch):
            if batch.records is None:
                batch.records = [self.decode(message)]
            if records := batch.rows():
                self.write(records)
        self.ack(batch.messages)

    def _stored_apart(self, batch: Batch) -> bool:
        """Whether a process of its own has stored a suspect. What it only survived is stored here, where its errors count."""
        if not batch.apart or self._apart is None:
            return False
        self._writing = True
        try:
            stored = self._apart.store(batch.messages[0], self._source)
        finally:
            self._writing = False
        batch.apart = False
        return stored

    def _settled(self, batch: Batch) -> None:
        rows = len(batch.rows())
        self._status = replace(self._status, released=self._status.released + len(batch.messages))
        if batch.refused is not None:
            self._status = replace(self._status, dead_letters=self._status.dead_letters + 1)
        elif rows:
            self._status = replace(self._status, stored=self._status.stored + rows, batches=self._status.batches + 1)
        if rows or batch.refused is not None:
            self._database_is_back()
            self._fruitless = False
        if self._aside:
            self._aside.forget(batch.messages)
            self._status = replace(self._status, aside=len(self._aside))
        self._held.settled(batch.messages)
        try:
            self._on_progress()
        except Exception as error:
            # The records are stored and acknowledged, so this must not try them again.
            log.warning("%s: on_progress failed", self._sink.name, exc_info=True)
            self._note(error)

    # ---- failures

    def _failed(self, batch: Batch, error: Exception, began: float) -> None:
        """Decide what a failed try means: halve, bury, try again, give one record back, or give everything back."""
        if isinstance(error, Endless):
            self._set_aside(batch, error)
            return
        if isinstance(error, StoreDataError) and batch.refused is None:
            if len(batch.messages) > 1:
                self._held.halve(batch)
                return
            away = self._database_error()
            if away is None:
                self._doubt(batch, error)
                return
            error = away
        if isinstance(error, (Undecodable, BodyMissing, Deadly)) and batch.refused is None:
            self._blame(batch, error)
            return
        if len(batch.messages) == 1 and batch.messages[0] in self._aside and self._database_error() is None:
            self._set_aside(batch, error)
            return
        self._try_again(batch, error, began)

    def _blame(self, batch: Batch, error: Exception) -> None:
        """The record failed by its own doing: it is given up, at once or when it has failed so often enough."""
        if self._aside.times(batch.messages[0], error) + 1 >= tries(error):
            self._refuse(batch, error)
        else:
            self._set_aside(batch, error)

    def _doubt(self, batch: Batch, error: StoreDataError) -> None:
        """A record was refused for its data alone, and the database takes a probe: poison, unless the tables are to blame.

        Those that were narrowed by somebody refuse a harmless record of the same shape too; and the record is tried once
        more, because what ailed the database may have ended between its try and the probe.
        """
        try:
            self._sink.probe(next(iter(batch.rows()), None))
        except StoreDataError:  # no row can be made of it, so no table was asked
            batch.doubted = True
        except Exception as narrow:  # noqa: BLE001 - this is the answer
            self._go_on_without(batch, narrow)
            return
        if batch.doubted:
            self._blame(batch, error)
        else:
            batch.doubted = True
            self._held.again(batch)

    def _try_again(self, batch: Batch, error: Exception, began: float) -> None:
        """Anything but the data: the whole batch again, unless it is time to suspect it or to let go of it."""
        self._trouble(error, began, database=isinstance(error, StoreUnavailable))
        batch.losses += isinstance(error, StoreConnectionLost)
        overdue = self._storing.seconds >= WRITER_GIVE_BACK_SECONDS
        if overdue or batch.suspected or batch.losses >= WRITER_CONNECTION_LOSSES:
            if self._database_error() is None:
                self._suspect(batch, error)
                return
            if overdue:
                self._give_back()
                self._wait_for_database()
                return
        self._held.again(batch)
        self.pause(self._storing.pause())

    def _suspect(self, batch: Batch, error: Exception) -> None:
        """The database takes a probe, but not this batch: find the record that does it and go on without it."""
        batch.suspected = True
        if len(batch.messages) > 1:
            self._held.halve(batch)
            return
        batch.strikes += 1
        if batch.strikes < 2:
            self._held.again(batch)
            self.pause(self._storing.pause())
            return
        self._go_on_without(batch, error)

    def _go_on_without(self, batch: Batch, error: Exception) -> None:
        """Set one record aside, unless it is all of them."""
        self._set_aside(batch, error)
        if self._fruitless:
            # The second one and nothing stored between: it is the database after all, so hold nothing while it lasts.
            self._give_back()
            self.pause(self._storing.pause())
        else:
            self._fruitless = True
            self._database_is_back()

    def _set_aside(self, batch: Batch, error: Exception) -> None:
        """Give one record back for a growing while: never lost, and never in the way of the others."""
        message = batch.messages[0]
        delay = self._aside.add(message, error)
        self._note(error)
        self._status = replace(self._status, aside=len(self._aside))
        if count := self._say_aside.due():
            log.warning(
                "%s: %s at sequence %d cannot be stored though others can: %s. It stays in the log and is tried again "
                "in %.0f s (%d such since the last of these lines, %d records wait so)",
                self._sink.name,
                message.subject,
                message.position.seq,
                error,
                delay,
                count,
                len(self._aside),
            )
        self._source.nak([message], delay)
        self._held.settled(batch.messages)

    def _refuse(self, batch: Batch, error: Exception) -> None:
        batch.refused = error
        if isinstance(error, Deadly) and error.decodes:
            batch.records = [self._apart.record(batch.messages[0], self._source)] if self._apart is not None else None
        self._held.again(batch)

    def _bury(self, message: Message, record: Record | None, error: Exception) -> None:
        letter = letter_for(self._sink.name, self._namespace, message, record, error)
        kept = bury(letter, self._sink, self._source)
        self._note(error)
        if count := self._say_dead.due():
            log.error(
                "%s: %s at sequence %d is a dead letter, kept in the %s: %s (%d since the last of these lines; see "
                "`skialith dead-letters list`)",
                self._sink.name,
                message.subject,
                message.position.seq,
                kept,
                error,
                count,
            )

    def _give_back(self) -> None:
        """Let go of all that is pulled and not settled; other writers, or this one later, get it again."""
        if unsettled := self._held.let_go():
            self._source.nak(unsettled)

    def _wait_for_database(self) -> None:
        """Hold nothing and ask now and then until the database answers and takes a probe."""
        while not self.pause(self._storing.pause()):
            began = self._clock()
            error = self._database_error()
            if error is None:
                self._database_is_back()
                return
            self._trouble(error, began, database=True)

    def _database_error(self) -> Exception | None:
        """None if the database answers and takes a probe, else why not."""
        try:
            self._sink.ping()
            self._sink.probe()
        except Exception as error:  # noqa: BLE001 - this is the answer
            return error
        return None

    # ---- what is known of it

    def _database_is_back(self) -> None:
        self._storing.over()
        if not self._status.database_ok:
            self._status = replace(self._status, database_ok=True)

    def _trouble(self, error: Exception, began: float, *, database: bool = False) -> None:
        self._storing.failed(error, began)
        self._note(error)
        self._status = replace(
            self._status,
            retries=self._status.retries + 1,
            database_ok=self._status.database_ok and not database,
        )

    def _note(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"[:ERROR_TEXT_CHARACTERS]
        self._status = replace(self._status, last_error=text, last_error_at=datetime.now(timezone.utc))
