"""The NATS byte stream in C: appends and their PubAcks, replies to whoever waits, deliveries to consumers, the rest to nats-py.

A ``Wire`` outlives connections; each one is a ``Link``, attached and detached on the loop thread. Whatever thread receives
handles all whole frames: it settles waiting appends, collects deliveries, and leaves to the loop what belongs there.
"""

from collections.abc import Callable, Sequence
from typing import Any

from typing_extensions import disjoint_base

from ..records import Message, Record
from ._link import Link
from ._waiting import Deliveries, Reply, Tally, Turn, Window

class Unsettled(Exception):
    """A message was sent and no answer to it came: it may or may not be written."""

class LoopClosed(Exception):
    """Nothing can be handed over any more."""

@disjoint_base
class Wire:
    """See the module. ``call_soon``: runs a callback on the loop, from any thread."""

    epoch: int
    is_open: bool
    takes_records: bool
    """Whether records may be written; everything else may whenever it is open."""
    appending: int
    """Threads in :meth:`append`."""
    queued: int
    """Records that were handed over, or written with :meth:`send`, and did not leave yet."""
    last_received: float
    heard_last: float
    """``last_received`` of the last connection that was open and ended."""
    max_payload: int
    def __init__(
        self,
        inbox: str,
        call_soon: Callable[..., object],
        on_rest: Callable[[], object],
        on_lost: Callable[[int], object],
        limits: tuple[int, int, int, int],
    ) -> None:
        """``inbox``: prefix of reply subjects. ``on_rest``: on the loop, when there is something for nats-py; ``on_lost``
        the same, when the connection ``epoch`` ended by itself. ``limits``: longest control line and message that are taken
        from a server, and most records and bytes that wait for the loop or for PubAcks; bytes but the third."""

    # ---- connections, on the loop

    def attach(self, link: Link) -> None: ...
    def detach(self, epoch: int) -> None:
        """End a connection, whoever waits on it; does nothing if it is not the current one."""

    def open(self, max_payload: int, records: bool = True) -> None:
        """From now on anybody may write; records only if ``records``, or after :meth:`admit`."""

    def admit(self, records: bool) -> None:
        """Whether records may be written from now on, on a connection that is open."""

    def on_ready(self) -> None:
        """The link's ``poll_fd`` is readable."""

    def feed(self, data: bytes) -> None:
        """Bytes that came through TLS."""

    def take_rest(self) -> bytes:
        """What came for nats-py."""

    def end(self) -> list[tuple[Callable[[Any], object], Any]]:
        """The loop has ended; any thread may say so. Returns the callbacks that did not run any more, with their arguments."""

    # ---- frames, from any thread

    def put(self, frames: bytes) -> bool:
        """Queue whole frames for the current connection, in the order of the calls; False if there is none."""

    def expect(self, callback: Callable[[Reply | None], object]) -> int:
        """Register for replies to a token. The callback runs on the loop; with None when the connection ends."""

    def forget(self, token: int) -> None: ...
    def reply_subject(self, token: int) -> str: ...

    # ---- handing over to the loop, from any thread

    def hand_over(
        self, turn: Turn, records: int, size: int, callback: Callable[[Any], object], payload: object
    ) -> bool:
        """Count records in and run ``callback(payload)`` on the loop, in the order of the calls; False if there is no room,
        or the turn was retired.

        Until they leave, :meth:`append` with the same turn does nothing: it would overtake them. Raises ``LoopClosed``; then
        the callback never runs. No signal can come between counting and handing over.
        """

    def leave(self, turn: Turn, records: int, size: int) -> None:
        """Records that were handed over have their PubAck or their error."""

    def wait_for_room(self, seconds: float) -> None:
        """Return when records left after :meth:`hand_over` found too many, or for no reason, and after a second at most.

        No ``threading.Event``: a signal's handler that raises inside one can leave its lock held, and the loop would hang.
        """

    def when_room(self, callback: Callable[[None], object]) -> bool:
        """Call ``callback`` once when records left after :meth:`hand_over` found too many, or for no reason; by whatever
        thread they leave, so it waits for nothing. False if nothing waits that could leave."""

    def forget_room(self, callback: Callable[[None], object]) -> None:
        """It waits for room no longer."""

    # ---- appends

    def append(
        self, turn: Turn, tally: Tally, subject: str, record: Record, deadline: float
    ) -> tuple[int, bool] | None:
        """Append one record directly and wait for its PubAck: sequence and duplicate.

        None: nothing was written, by this call; it is to be made the long way (the turn is taken or has no permission, records
        of it wait, no open connection, the server refused it). Raises ``Unsettled``, and what a signal's handler raises; the
        turn is then without permission and suspect, if it is fenced.
        """

    def send(self, window: Window, turn: Turn, subject: str, record: Record, message_id: bytes, size: int) -> bool:
        """Write one record directly; the callback of ``window`` runs on the loop when it has its answer, or the connection ends.

        The turn is taken until somebody gives it on the loop, and the record counts with ``size`` bytes as handed over until
        :meth:`leave`. False: nothing was written, as ``None`` of :meth:`append`, or too much is waiting. What a signal's handler
        raises tells neither: ``window.sent`` does.
        """

    def post(
        self, link: Link, token: int, subject: str, fence: bytes, record: Record, message_id: bytes | None = None
    ) -> int:
        """Write a record to the socket, for :meth:`append` and :meth:`send`; its size, or 0 if it is too large for one message
        of this server."""

    def ask(self, subject: str, payload: bytes, deadline: float) -> Reply | None:
        """Send a request and return its first reply, which the calling thread reads itself.

        None: no open connection, or it ended, or no reply before the deadline (``time.monotonic()``)."""

    def pipeline(
        self, messages: list[tuple[str, bytes, bytes]], fence: bytes, callback: Callable[[None], object]
    ) -> Window | None:
        """Send messages (subject, message id, data) one behind the other; the callback runs on the loop when every one
        has its answer, or the connection ends. None: no open connection, nothing was sent."""

    def give_up(self, window: Window) -> None:
        """Wait no longer."""

    # ---- consumers

    def deliveries(self, stream: str, consumer: str) -> Deliveries: ...
    def pull(self, deliveries: Deliveries, subject: str, request: bytes, batch: int) -> bool:
        """Send a pull request for ``batch`` messages; False if there is no open connection."""

    def forget_pulls(self, deliveries: Deliveries) -> None:
        """Expect nothing more of its pull requests; what still comes is taken all the same."""

    def tell(self, messages: Sequence[Message], word: bytes) -> None:
        """Acknowledge in one write the messages that came on the current connection; passes over the others."""
