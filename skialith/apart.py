"""The process that stores records one by one for a writer which may have died of them: ``python -m skialith.apart FD``.

It says what it is about to do, so that the writer knows how far it came, and ends when the writer is gone.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys

from .config import WRITER_APART_SECONDS
from .errors import BodyMissing, SkialithError
from .records import Message, Position, Record
from .stores import open_store
from .writer.apart import receive, send
from .writer.batch import decode
from .writer.sinks import EventSink, Sink, TraceSink


class _Bodies:
    """Bodies of large records, which the writer reads from the log."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire

    def read_body(self, record: Record) -> bytes:
        """The body of the record that is being handled."""
        send(self._wire, ["body"])
        (body,) = receive(self._wire)
        if body is None:
            raise BodyMissing(f"the body of the record at sequence {record.position.seq} cannot be had")
        return bytes(body)


def main(descriptor: int) -> None:
    """Serve the writer at the other end of the socket ``descriptor``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as wire, contextlib.suppress(EOFError, OSError):
        wire.settimeout(WRITER_APART_SECONDS)  # a fork of the writer may hold its end when it is gone
        name, namespace, url, power = receive(wire)
        store = open_store(url, power=power)
        sink: Sink = EventSink(store) if name == EventSink.name else TraceSink(store)
        away = None
        try:
            sink.probe()
        except SkialithError as error:
            away = str(error)
        while True:
            asked = receive(wire)
            if not asked:
                send(wire, ["ready"] if away is None else ["away", away])
            else:
                send(wire, _handled(sink, namespace, wire, *asked))


def _handled(sink: Sink, namespace: str, wire: socket.socket, subject: str, data: bytes, *position: int) -> list[str]:
    try:
        record = decode(namespace, Message(subject, data, Position(*position), "", 0, 0))
        send(wire, ["decoded"])
        loaded = sink.load(record, _Bodies(wire))
        if loaded is not None:
            sink.write([loaded])
    except Exception as error:  # noqa: BLE001 - the writer meets it again and judges
        return ["survived", f"{type(error).__name__}: {error}"]
    return ["stored"]


if __name__ == "__main__":
    main(int(sys.argv[1]))
