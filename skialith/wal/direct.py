"""A record that its caller wrote to the socket itself without a thread to wait in: its PubAck comes to the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ..config import APPEND_ATTEMPT_SECONDS
from ..errors import Closed
from ..records import Ack, Record
from ._waiting import Tally, Window
from ._wire import LoopClosed, Wire
from .delivery import readable
from .lane import Lane, Ticket, who


class Direct:
    """One such record. The lane's turn is taken until it has its PubAck, or the loop takes it over to send it again.

    ``again``: called on the loop for that, with whether it may be written. ``under_way``: where it stands until then. ``size``:
    what it counts with as waiting.
    """

    __slots__ = (
        "_again",
        "_over",
        "_tally",
        "_under_way",
        "_until",
        "_window",
        "_wire",
        "lane",
        "record",
        "size",
        "ticket",
    )

    def __init__(
        self,
        wire: Wire,
        tally: Tally,
        lane: Lane,
        ticket: Ticket,
        record: Record,
        again: Callable[[Direct, bool], None],
        under_way: set[Direct],
    ) -> None:
        self.lane = lane
        self.ticket = ticket
        self.record = record
        self.size = len(record.body or b"")
        self._wire = wire
        self._tally = tally
        self._again = again
        self._under_way = under_way
        self._until = min(time.monotonic() + APPEND_ATTEMPT_SECONDS, ticket.deadline)
        self._over = False
        self._window = Window(0, 1, self._answered)

    def send(self, subject: str) -> bool:
        """False if nothing was written: something of the lane is in flight, or amiss, or it takes more than one message."""
        message_id = self.ticket.message_id or self.record.key
        self._under_way.add(self)
        try:
            return self._wire.send(self._window, self.lane.turn, subject, self.record, message_id, self.size)
        except BaseException:  # what a signal's handler raised
            self.ticket.promise.give_up()
            raise
        finally:
            if not self._window.sent:
                self._under_way.discard(self)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Where its caller waits for the ticket: the loop takes it over when an attempt is over, or the caller has gone."""
        seconds = max(0.0, self._until - time.monotonic())
        timer = asyncio.get_running_loop().call_later(seconds, self._overdue)
        try:
            yield
        except BaseException:
            self._overdue()
            raise
        finally:
            timer.cancel()

    def _overdue(self) -> None:
        with suppress(LoopClosed):  # then it was ended
            self._wire.hand_over(self.lane.turn, 0, 0, self._answered, None)

    # ---- on the loop

    def end_attempt(self, now: float) -> None:
        """Take it over if its attempt is over: its caller's loop, which should say so, may be blocked or stand still."""
        if now > self._until and self._window.sent:
            self._answered(None)

    def _answered(self, _: None) -> None:
        self._settle(readable(self._window.answers()[0]))

    def _settle(self, answer: tuple[int, bool] | bytes | None) -> None:
        if self._over:
            return
        self._over = True
        self._under_way.discard(self)
        self._wire.give_up(self._window)
        if isinstance(answer, tuple):
            self._wire.leave(self.lane.turn, 1, self.size)
            self._tally.note(answer[0], self.size)
            self.ticket.acknowledge(Ack(*answer))
        else:
            self._again(self, answer is None)
        self.lane.turn.give()

    def ended(self) -> None:
        """The loop has ended, nothing comes any more."""
        if not self._over:
            self._over = True
            self._wire.leave(self.lane.turn, 1, self.size)
            self.ticket.fail(
                Closed(
                    f"{who(self.ticket.name)}: the log was closed before the PubAck came; the record may or may not be written",
                    outcome="unknown",
                )
            )
