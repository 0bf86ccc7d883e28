"""The process that stores records one by one for a writer which may have died of them: ``python -m skialith.apart FD``.

It says what it is about to do, so that the writer knows how far it came, and ends when the writer is gone.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from typing import Any

from .config import WRITER_APART_SECONDS
from .errors import BodyMissing, SkialithError
from .records import Message, Position, Record
from .stores import open_store
from .writer.apart import receive, send
from .writer.batch import decode
from .writer.sinks import EventSink, Sink, TraceSink

_LIFE_SECONDS = WRITER_APART_SECONDS / 6
"""Between two signs of life."""


class _Writer:
    """The writer at the other end, which reads the bodies of large records from the log.

    While it waits it is told that this process lives. Whoever waits for a database lets go of the GIL; a conversion that never
    ends mostly does not, and then no sign of life comes.
    """

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._sending = threading.Lock()
        self._busy = threading.Event()
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        with contextlib.suppress(OSError):
            while self._busy.wait():
                time.sleep(_LIFE_SECONDS)
                if self._busy.is_set():
                    self.say("alive")

    def say(self, *frame: str) -> None:
        """One frame."""
        with self._sending:
            send(self._wire, list(frame))

    def asks(self) -> list[Any]:
        """The next frame; signs of life begin."""
        self._busy.clear()
        asked = receive(self._wire)
        self._busy.set()
        return asked

    def read_body(self, record: Record) -> bytes:
        """The body of the record that is being handled."""
        self.say("body")
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
        writer = _Writer(wire)
        while True:
            if asked := writer.asks():
                writer.say(*_handled(sink, namespace, writer, *asked))
            else:
                writer.say(*(["ready"] if away is None else ["away", away]))


def _handled(sink: Sink, namespace: str, writer: _Writer, subject: str, data: bytes, *position: int) -> list[str]:
    try:
        record = decode(namespace, Message(subject, data, Position(*position), "", 0, 0))
        writer.say("decoded")
        loaded = sink.load(record, writer)
        if loaded is not None:
            sink.write([loaded])
    except Exception as error:  # noqa: BLE001 - the writer meets it again and judges
        return ["survived", f"{type(error).__name__}: {error}"]
    return ["stored"]


if __name__ == "__main__":
    main(int(sys.argv[1]))
