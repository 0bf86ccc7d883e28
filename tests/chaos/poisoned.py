"""A writer with a fault in one of its conversions, which certain records meet: it raises, or the process dies.

The process that the writer tries such records in has the same fault: ``python -m tests.chaos.poisoned PLACE DOING FD``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from skialith import _rows, apart, records, trace_json
from skialith.records import Position, Record
from skialith.stores import rows
from skialith.writer import batch
from skialith.writer.apart import Apart

SURPRISES: dict[str, type[Exception]] = {"3.0.0": RuntimeError, "6.0.0": MemoryError, "9.0.0": RecursionError}
"""The ids of the records, and what is raised of each if something is."""


def install(place: str, doing: str) -> None:
    """``place``: both decoders, the rows of events and checkpoints, or the JSON of traces, several joined by ``+``.

    ``doing``: ``"raise"``, or the name of a signal that the process sends itself.
    """

    def meet(event_id: str) -> None:
        if doing == "raise":
            raise SURPRISES[event_id]("in the test")
        os.kill(os.getpid(), signal.Signals[doing])
        time.sleep(60)  # the signal is on its way; nothing may happen behind this point

    for each in place.split("+"):
        _PLACES[each](meet)
    Apart.command = (sys.executable, "-m", "tests.chaos.poisoned", place, doing)


Meet = Callable[[str], None]


def _look(meet: Meet, data: Iterable[bytes]) -> None:
    for each in data:
        for event_id in SURPRISES:
            if b"\xa5" + event_id.encode() in each[:100]:
                meet(event_id)


def _decode(meet: Meet) -> None:
    runs, single = _rows.records, records.decode_record

    def decode_run(cls: Any, namespace: str, messages: list[Any], kinds: Any) -> list[Any]:
        _look(meet, (message.data for message in messages))
        return runs(cls, namespace, messages, kinds)

    def decode_record(namespace: str, data: bytes, position: Position) -> Record:
        _look(meet, [data])
        return single(namespace, data, position)

    _replace(_rows, "records", decode_run)
    _replace(batch, "decode_record", decode_record)


def _before(meet: Meet, owner: object, name: str) -> None:
    original = getattr(owner, name)

    def convert(several: list[Record]) -> Any:
        for record in several:
            if record.record_id in SURPRISES:
                meet(record.record_id)
        return original(several)

    _replace(owner, name, convert)


def _replace(owner: object, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


_PLACES: dict[str, Callable[[Meet], None]] = {
    "decode": _decode,
    "rows": lambda meet: _before(meet, rows, "of_records"),
    "json": lambda meet: _before(meet, trace_json, "of_records"),
}


if __name__ == "__main__":
    install(sys.argv[1], sys.argv[2])
    apart.main(int(sys.argv[3]))
