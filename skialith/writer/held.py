"""What a drain holds of one pull, and what it remembers of records that it gave back alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ..config import (
    WRITER_ASIDE_FIRST_SECONDS,
    WRITER_ASIDE_LONGEST_SECONDS,
    WRITER_ASIDE_RECORDS,
    WRITER_BATCH_BYTES,
)
from ..records import Message, Position, Record
from .batch import Batch


class Aside:
    """Records that could not be stored alone though others could: how often each was given back, the last ones only."""

    def __init__(self) -> None:
        self._times: dict[Position, tuple[int, type[Exception], int]] = {}

    def __len__(self) -> int:
        return len(self._times)

    def __contains__(self, message: Message) -> bool:
        return message.position in self._times

    def times(self, message: Message, error: Exception) -> int:
        """How often in a row it was given back alone for an error like this one, the last time included."""
        _, kind, in_a_row = self._times.get(message.position, (0, type(error), 0))
        return in_a_row if kind is type(error) else 0

    def add(self, message: Message, error: Exception) -> float:
        """Remember it once more; returns for how many seconds to give it back."""
        in_a_row = self.times(message, error) + 1
        times = self._times.pop(message.position, (0, type(error), 0))[0] + 1
        self._times[message.position] = (times, type(error), in_a_row)
        if len(self._times) > WRITER_ASIDE_RECORDS:
            del self._times[next(iter(self._times))]
        return min(WRITER_ASIDE_FIRST_SECONDS * 2.0 ** min(times - 1, 30), WRITER_ASIDE_LONGEST_SECONDS)

    def forget(self, messages: Sequence[Message]) -> None:
        """They are settled."""
        if self._times:
            for message in messages:
                self._times.pop(message.position, None)


class Held:
    """The messages of one pull that are neither acknowledged nor given back, and the batches they are tried in.

    ``unsettled``: all of them. It is replaced and never changed, so that other threads may read it.
    """

    def __init__(self, aside: Aside) -> None:
        self.unsettled: list[Message] = []
        self._aside = aside
        self._waiting: list[Message] = []
        self._suspects: deque[Message] = deque()
        self._pieces: deque[Batch] = deque()

    def take(self, messages: list[Message], suspects: Sequence[Message] = ()) -> None:
        """Hold what was pulled; records that failed alone before come last, to be tried alone again.

        ``suspects``: those of them that another process has to survive first; behind all others, whose turn may not come again.
        """
        self.unsettled = messages
        if suspects:
            apart = {id(message) for message in suspects}
            messages = [message for message in messages if id(message) not in apart]
            self._suspects.extend(suspects)
        self._waiting.extend(sorted(messages, key=self._aside.__contains__) if self._aside else messages)

    def next(
        self,
        decode: Callable[[Message], Record | None],
        decode_run: Callable[[Sequence[Message]], list[Record | None]],
    ) -> Batch | None:
        """The next batch to be tried, None at the end. Decodes until it is full: large bodies one batch at a time."""
        if self._pieces:
            return self._pieces.popleft()
        messages: list[Message] = []
        records: list[Record | None] = []
        size = 0
        while self._waiting and size < WRITER_BATCH_BYTES:
            # Their bodies are in the messages, so they are in memory already.
            if run := [] if self._aside else _decoded(decode_run, self._waiting):
                messages += self._waiting[: len(run)]
                records += run
                del self._waiting[: len(run)]
                continue
            message = self._waiting.pop(0)
            if message in self._aside:
                self._pieces.append(Batch([message], None))
                break
            try:
                record = decode(message)
            except Exception:  # noqa: BLE001 - it comes up again at once, alone
                # Decoded again next, where its error counts: the others are not to wait for it.
                self._pieces.append(Batch([message], None))
                break
            messages.append(message)
            records.append(record)
            size += 0 if record is None else len(record.body or b"")
        if messages:
            return Batch(messages, records)
        if self._pieces:
            return self._pieces.popleft()
        return Batch([self._suspects.popleft()], None, apart=True) if self._suspects else None

    def again(self, batch: Batch) -> None:
        """Try ``batch`` again before anything else."""
        self._pieces.appendleft(batch)

    def halve(self, batch: Batch) -> None:
        """Try the halves of ``batch`` before anything else."""
        self._pieces.extendleft(reversed(batch.halves()))

    def settled(self, messages: Sequence[Message]) -> None:
        """These are acknowledged or given back."""
        if len(messages) == len(self.unsettled):
            self.unsettled = []
            return
        done = {id(message) for message in messages}
        self.unsettled = [message for message in self.unsettled if id(message) not in done]

    def let_go(self) -> list[Message]:
        """Hold nothing any more; returns what was held."""
        unsettled, self.unsettled = self.unsettled, []
        self._waiting.clear()
        self._suspects.clear()
        self._pieces.clear()
        return unsettled


def _decoded(
    decode_run: Callable[[Sequence[Message]], list[Record | None]], messages: Sequence[Message]
) -> list[Record | None]:
    """As ``decode_run``, up to the first message that it cannot bear: that one is left to the other decoder."""
    try:
        return decode_run(messages)
    except Exception:  # noqa: BLE001 - of one of them; it is found by halving
        half = len(messages) // 2
        return _decoded(decode_run, messages[:half]) if half else []
