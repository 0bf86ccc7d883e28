"""Who waits for what on the wire: one thread for one PubAck, a window for many, a consumer's pulls, and whose turn it is."""

from collections.abc import Callable
from threading import Event
from typing import final

from ..records import Message

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
    ``waiting``: records that were handed over and did not leave yet; while there are any, nothing overtakes them.
    """

    taken: bool
    retired: bool
    waiting: int
    suspect: bool
    def try_take(self) -> bool: ...
    def retire(self) -> bool:
        """Take the turn for ever, so that nothing is appended or handed over with it any more; False if it is in use."""

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
    """What a process appended: highest sequence, bytes since the stream's size was last read, and which sequences."""

    last_seq: int
    appended_bytes: int
    def note(self, seq: int, size: int) -> None: ...
    def take(self) -> list[tuple[int, int, int]]:
        """The sequences noted since the last call, as runs of first, last and how many. Of very many, early runs are merged, and
        then hold fewer than all between first and last."""

    def set_back(self, last: int) -> None:
        """Of what was noted before the last :meth:`take` only sequences up to ``last`` are in the log."""

@final
class Window:
    """A run of messages in flight, each with an answer of its own."""

    def __new__(cls, first: int, count: int, callback: Callable[[None], object]) -> Window:
        """``first``: token of the first of ``count`` messages. ``callback``: runs on the loop when every one has its answer."""

    lost: bool
    """The connection ended before every answer came."""
    sent: bool
    """Of the record of :meth:`Wire.send`: it is on its way."""

    def answers(self) -> list[tuple[int, bool] | bytes | None]:
        """In order: sequence and duplicate; the body of another answer (empty: no responders); None without an answer."""

@final
class Deliveries:
    """What one consumer delivered on the current connection and nobody took yet.

    ``pulls``: open pull requests; ``expected``: messages that they may still bring. ``size``: bytes of what waits.
    ``arrived`` is set when the first message came, a status, or a message with which ``enough_rows`` or ``enough_bytes`` wait.
    """

    arrived: Event
    expected: int
    enough_rows: int
    enough_bytes: int
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

@final
class Waiter:
    """One thread that waits for one PubAck; for the wire alone."""

@final
class Pull:
    """One pull request: how many messages it may still bring; for the wire alone."""
