"""The NATS byte stream in C: appends and their PubAcks, replies to whoever waits, deliveries to consumers, the rest to nats-py.

A ``Wire`` outlives connections; each one is a ``Link``, attached and detached on the loop thread. Whatever thread receives
handles all whole frames: it settles waiting appends, collects deliveries, and leaves to the loop what belongs there.
"""

from collections.abc import Callable, Sequence
from threading import Event
from typing import Any, final

from typing_extensions import disjoint_base

from ..records import Message, Record
from ._link import Link

class Unsettled(Exception):
    """A message was sent and no answer to it came: it may or may not be written."""

@final
class Reply:
    """One message on the inbox. ``headers``: None without any; a status line is ``Status`` and ``Description``."""

    data: bytes
    @property
    def headers(self) -> dict[str, str] | None: ...

@final
class Turn:
    """One thing in flight: taken by a thread that tries or by a callback that waits, and what its holder may write.

    ``suspect``: an append that was made directly was given up without an answer; cleared by whoever acts on it.
    """

    taken: bool
    suspect: bool
    def try_take(self) -> bool: ...
    def take_later(self, callback: Callable[[None], object]) -> bool:
        """Take the turn if it is free; else queue up: ``callback`` is called on the loop, once, when it is the caller's."""

    def withdraw(self, callback: Callable[[None], object]) -> bool:
        """Leave the queue; False if the turn was given already."""

    def give(self) -> None:
        """Pass the turn to the next in the queue, or free it; on the loop."""

    def permit(self, fence: bytes | None, epoch: int) -> None:
        """Let appends be made directly with the header lines ``fence``, on connection ``epoch`` (0: any); None: not at all."""

@final
class Tally:
    """What a process appended: highest sequence, and bytes since the stream's size was last read."""

    last_seq: int
    appended_bytes: int
    def note(self, seq: int, size: int) -> None: ...

@final
class Window:
    """A run of messages in flight, each with an answer of its own."""

    lost: bool
    """The connection ended before every answer came."""

    def answers(self) -> list[tuple[int, bool] | bytes | None]:
        """In order: sequence and duplicate; the body of another answer (empty: no responders); None without an answer."""

@final
class Deliveries:
    """What one consumer delivered on the current connection and nobody took yet.

    ``pulls``: open pull requests; ``expected``: messages that they may still bring. ``size``: bytes of what waits.
    ``arrived`` is set when messages or a status came.
    """

    arrived: Event
    expected: int
    @property
    def pulls(self) -> int: ...
    size: int
    def __len__(self) -> int: ...
    def take(self, rows: int, size: int, not_before: float) -> list[Message]:
        """Up to ``rows`` messages or ``size`` bytes (one at least), oldest first; those that came before the time
        ``not_before`` are dropped."""

    def release(self) -> list[Message]:
        """All of them."""

    def take_status(self) -> tuple[str, str] | None:
        """Code and description of the last pull request that ended early, once."""

@disjoint_base
class Wire:
    """See the module. ``call_soon``: runs a callback on the loop, from any thread."""

    epoch: int
    is_open: bool
    appending: int
    """Threads in :meth:`append`."""
    queued: int
    """Records that were handed over and did not leave yet."""
    last_received: float
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

    def open(self, max_payload: int) -> None:
        """From now on anybody may write."""

    def on_ready(self) -> None:
        """The link's ``poll_fd`` is readable."""

    def feed(self, data: bytes) -> None:
        """Bytes that came through TLS."""

    def take_rest(self) -> bytes:
        """What came for nats-py."""

    # ---- frames, from any thread

    def put(self, frames: bytes) -> bool:
        """Queue whole frames for the current connection, in the order of the calls; False if there is none."""

    def expect(self, callback: Callable[[Reply | None], object]) -> int:
        """Register for replies to a token. The callback runs on the loop; with None when the connection ends."""

    def forget(self, token: int) -> None: ...
    def reply_subject(self, token: int) -> str: ...

    # ---- handing over to the loop, from any thread

    def hand_over(self, records: int, size: int, callback: Callable[[Any], object], payload: object) -> bool:
        """Count records in and run ``callback(payload)`` on the loop, in the order of the calls; False if there is no room.

        Raises ``RuntimeError`` when the loop is closed. No signal can come between counting and handing over.
        """

    def leave(self, records: int, size: int) -> None:
        """Records that were handed over have their PubAck or their error."""

    def wait_for_room(self, seconds: float) -> None:
        """Return when records left after :meth:`hand_over` found too many, or for no reason, and after a second at most.

        No ``threading.Event``: a signal's handler that raises inside one can leave its lock held, and the loop would hang.
        """

    # ---- appends

    def append(
        self, turn: Turn, tally: Tally, subject: str, record: Record, deadline: float
    ) -> tuple[int, bool] | None:
        """Append one record directly and wait for its PubAck: sequence and duplicate.

        None: nothing was written, by this call; it is to be made the long way (the turn is taken or has no permission,
        no open connection, the server refused it). Raises ``Unsettled``, and what a signal's handler raises; the
        turn is then without permission and suspect, if it is fenced.
        """

    def post(self, link: Link, token: int, subject: str, fence: bytes, record: Record) -> int:
        """Write a record to the socket, for :meth:`append`; its size, or 0 if it is too large for one message of this server."""

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
