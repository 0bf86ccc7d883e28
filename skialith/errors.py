"""Every error Skialith raises, in one picklable hierarchy; this module imports nothing of Skialith.

Each error answers the two questions a caller has after a failure: what became of the record
(``outcome``) and is it safe to call again with the same id (``retryable``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Outcome = Literal["not_written", "unknown", "durable"]
"""What became of the record a failed call was about.

``not_written``: it is certain that nothing was written. ``unknown``: the record may or may not be in the
log; calling again with the same event id is safe and settles it. ``durable``: the record has its PubAck;
what failed came after that.
"""


class SkialithError(Exception):
    """Base of all errors. ``outcome`` and ``retryable`` are always set; the driver's error is ``__cause__``.

    Extra facts (limits, sizes, owners) are attributes. Instances survive ``pickle`` with all of them,
    because task queues send errors between processes.
    """

    outcome: Outcome = "not_written"
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        outcome: Outcome | None = None,
        retryable: bool | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message)
        if outcome is not None:
            self.outcome = outcome
        if retryable is not None:
            self.retryable = retryable
        for name, value in facts.items():
            setattr(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[SkialithError], args: tuple[Any, ...], state: dict[str, Any]) -> SkialithError:
    error = cls.__new__(cls, *args)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error


class InvalidArgument(SkialithError, ValueError):
    """An argument was refused before anything was sent. ``argument`` names it."""

    argument: str = ""


class InvalidPayload(InvalidArgument):
    """A payload holds a value that cannot be carried. ``path`` leads to it: ``data.messages[3].content``."""

    path: str = ""


class RecordTooLarge(InvalidArgument):
    """A record is over the limit, refused before anything was sent. ``size`` and ``limit`` in bytes.

    ``outcome`` is ``"unknown"`` if it was sent to a server before that took larger ones, and got no answer there.
    """

    size: int = 0
    limit: int = 0


class ConfigurationError(SkialithError, ValueError):
    """A setting, URL, password, server or database does not allow Skialith to run; the message names the fix."""


class UnsupportedEnvironment(ConfigurationError):
    """This process cannot run Skialith's threads (gevent or eventlet monkey-patching)."""


class StepMismatch(InvalidArgument):
    """A step was recorded for another function than the one that is given now; nothing was called and nothing was sent.

    ``recorded`` and ``given`` name the two functions, ``step`` is the step's id.
    """

    step: str = ""
    recorded: str = ""
    given: str = ""


class StepFailed(SkialithError):
    """The function of a step raised an error that was to be recorded, in this run or in an earlier one.

    ``step``: the step's id. ``error_type`` and ``error_message``: the error's class (``module.Class``) and text. In the run
    that called the function the error itself is ``__cause__``.
    """

    outcome: Outcome = "durable"
    step: str = ""
    error_type: str = ""
    error_message: str = ""


class RunEnded(SkialithError):
    """A step was called after an earlier one of the same run could not be recorded or read (``__cause__``); nothing was called
    and nothing was sent. ``resume()`` begins a new run."""

    retryable = True


class Closed(SkialithError):
    """The agent or its runtime was closed before the call, and nothing was sent; or during it, and ``outcome`` says whether
    the record may be written."""


class BlockingCallInEventLoop(SkialithError):
    """A blocking verb was called on a thread that runs an asyncio loop; nothing was sent."""


class WalError(SkialithError):
    """The write-ahead log did not take the record."""


class WalUnavailable(WalError):
    """No PubAck by the deadline: server unreachable, no leader, or no answer. Retry with the same id is safe."""

    retryable = True


class WalFull(WalError):
    """The stream is at its size limit (or above the share kept free for leases). Retry once the writer caught up."""

    retryable = True


class WalRejected(WalError):
    """The server refused the record for a reason that a retry does not mend. ``code`` is its error code."""

    code: int = 0


class BodyMissing(WalRejected):
    """The body of a large record is not in the log (any more): stored and trimmed, or torn. Its head has a PubAck."""

    outcome: Outcome = "durable"


class AgentFenced(SkialithError):
    """Another owner took this agent over, or the lease expired. Call ``resume()`` to own it again.

    ``owner`` describes the new owner (``"host pid 123"``) or is empty when the lease merely expired.
    """

    owner: str = ""
    agent_id: str = ""


class StoreError(SkialithError):
    """The database failed. Records that have a PubAck stay in the log."""


class StoreUnavailable(StoreError):
    """The database cannot be used now (down, locked, full, wrong password, missing table): transient for a record."""

    retryable = True


class StoreMisconfigured(StoreUnavailable):
    """Wrong user, password or database name, or a missing privilege: refused at start, transient for a record."""


class StoreConnectionLost(StoreUnavailable):
    """The connection was lost during a statement. The writer halves a batch that does this twice."""


class StoreDataError(StoreError):
    """The database refused a row because of its data. ``code`` is the driver's error code, 0 if it has none."""

    code: int = 0


class RecordIncomplete(StoreError, ValueError):
    """A bug of the caller's, which speaks against no record: it came to be stored without its body."""


@contextmanager
def making_rows() -> Iterator[None]:
    """Whatever a conversion raises speaks against what is converted, and not against the database: ``StoreDataError``."""
    try:
        yield
    except SkialithError:
        raise
    except Exception as error:
        raise StoreDataError(f"no row can be made of it: {type(error).__name__}: {error}") from error


class ChannelValueMissing(StoreError):
    """A checkpoint refers to values of channels that were deleted (by a prune, or with the thread, while it was written).

    ``thread_id``, ``checkpoint_id``, ``channels``.
    """

    outcome = "durable"
    thread_id: str = ""
    checkpoint_id: str = ""
    channels: tuple[str, ...] = ()


class FlushTimeout(SkialithError):
    """``flush()`` or ``close()`` ran out of time; what is not STORED yet stays DURABLE in the log.

    ``remaining`` is the number of records still to be stored, -1 if it could not be read.
    """

    outcome: Outcome = "durable"
    retryable = True
    remaining: int = -1


class RecordsLost(SkialithError):
    """The log's server came back without records that it had acknowledged to this process, and the database does not have them
    either. Raised once for each such loss, by the next ``flush()``, when all the rest is stored.

    ``sequences``: runs of (first, last, how many between are lost), as the ``Ack`` of each record named it. Saving
    again what they held is safe, with the same event ids.
    """

    outcome: Outcome = "unknown"
    sequences: tuple[tuple[int, int, int], ...] = ()


class BatchFailed(SkialithError):
    """``save_events`` failed part way. ``acks`` holds one ``Ack`` per record that is durable, in order, and
    ``failed`` the index of the first record that is not; ``outcome`` speaks of that record and of all behind it: with
    ``"unknown"`` any of them may be written, because they can travel as one atomic batch. Saving all again is safe.
    """

    failed: int = 0
    acks: list[Any]
