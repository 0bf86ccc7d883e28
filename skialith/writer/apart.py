"""Records that a writer may have died of: another process stores them first, one by one, and the writer looks on."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import ormsgpack

from ..config import WRITER_APART_LONGEST_SECONDS, WRITER_APART_SECONDS, WRITER_SUSPECT_DELIVERIES
from ..errors import BodyMissing, StoreUnavailable, WalError
from ..records import Message, Record
from .batch import Deadly, Endless, decode
from .sinks import Source

log = logging.getLogger("skialith.writer")

_LENGTH_BYTES = 4


def suspects(messages: Sequence[Message]) -> list[Message]:
    """Those that were delivered so often that a writer may have died of them.

    That is all the delivery count is good for: it rises as well when the database is away, when writers are killed and when
    acknowledgements are lost. So of several those behind come first every other time: one that kills is no wall.
    """
    found = [message for message in messages if message.deliveries >= WRITER_SUSPECT_DELIVERIES]
    return found[::-1] if found and found[0].deliveries % 2 else found


def send(wire: socket.socket, frame: list[Any]) -> None:
    """Send one frame: a msgpack array behind its length."""
    data = ormsgpack.packb(frame)
    wire.sendall(len(data).to_bytes(_LENGTH_BYTES, "big") + data)


def receive(wire: socket.socket) -> list[Any]:
    """The next frame. Raises ``EOFError`` when the other side is gone, ``TimeoutError`` as the socket is set."""
    length = int.from_bytes(_exactly(wire, _LENGTH_BYTES), "big")
    frame: list[Any] = ormsgpack.unpackb(_exactly(wire, length))
    return frame


def _exactly(wire: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        try:
            some = wire.recv(min(size - len(data), 1 << 20))
        except ConnectionResetError:
            some = b""
        if not some:
            raise EOFError
        data += some
    return bytes(data)


class Apart:
    """The other process, started when it is needed and kept until :meth:`close`. For one drain's thread.

    ``settings``: what ``skialith.apart`` is told first (sink, namespace, database); never on a command line, it has a password.
    """

    command: tuple[str, ...] = (sys.executable, "-X", "faulthandler", "-m", "skialith.apart")

    def __init__(self, settings: list[Any]) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: socket.socket | None = None

    def store(self, message: Message, source: Source) -> bool:
        """Whether the other process has stored the record; False if it met an error that is to be met here.

        Raises ``Deadly`` when it died of it, ``Endless`` when it does not end, ``StoreUnavailable`` when the database does not
        take a probe over there, so that nothing can be said of the record.
        """
        wire = self._ready()
        if wire is None:
            return False
        decodes, deadline = False, time.monotonic() + WRITER_APART_LONGEST_SECONDS
        try:
            send(wire, [message.subject, message.data, *message.position])
            while True:
                word, *facts = receive(wire)
                if word == "decoded":
                    decodes = True
                elif word == "body":
                    send(wire, [_body(message, self._settings[1], source)])
                elif word != "alive":
                    break
                elif time.monotonic() > deadline:
                    raise TimeoutError
        except TimeoutError as error:
            self.close()
            raise Endless("a process that stores nothing but this record does not come to an end") from error
        except (EOFError, OSError) as error:
            raise Deadly(
                f"a process that stored nothing but this record {self._how_it_ended()}", decodes=decodes
            ) from error
        if word != "stored":
            log.info("%s at sequence %d, alone: %s", message.subject, message.position.seq, facts[0])
        return bool(word == "stored")

    def record(self, message: Message, source: Source) -> Record:
        """The record of a message that decodes, with its body if that can be had; for its dead letter."""
        record = decode(self._settings[1], message)
        if record.manifest is None:
            return record
        with contextlib.suppress(BodyMissing):
            return record._replace(body=source.read_body(record))
        return record

    def close(self) -> None:
        """End the other process; it is started again when it is needed."""
        if self._wire is not None:
            self._wire.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._wire = None

    def _ready(self) -> socket.socket | None:
        """The wire to a process that has just said that it waits for a record; None if none can be started."""
        if self._wire is not None and self._answers() == ["ready"]:
            return self._wire
        self.close()
        try:
            self._start()
        except OSError as error:
            log.warning("records that were delivered often are handled here: no process can be started: %s", error)
            self.close()
            return None
        answer = self._answers()
        if answer == ["ready"]:
            return self._wire
        ended = self._how_it_ended()
        if answer:
            raise StoreUnavailable(str(answer[1]))
        log.warning("records that were delivered often are handled here: a process of its own %s", ended)
        return None

    def _answers(self) -> list[Any]:
        """What it says when asked whether it is ready; nothing if it is gone."""
        if self._wire is None:
            return []
        try:
            send(self._wire, [])
            while (answer := receive(self._wire)) == ["alive"]:  # sent on the way, about the record before
                pass
            return answer
        except (EOFError, OSError):  # TimeoutError too
            return []

    def _start(self) -> None:
        self._wire, theirs = socket.socketpair()
        with theirs:
            self._wire.settimeout(WRITER_APART_SECONDS)
            # In a session of its own: what is sent to the writer's group, like Ctrl-C, must not look like the record's doing.
            self._process = subprocess.Popen(
                [*self.command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        send(self._wire, self._settings)

    def _how_it_ended(self) -> str:
        process, deadline = self._process, time.monotonic() + 1.0
        while process is not None and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        code = None if process is None else process.returncode
        self.close()
        if code is None:
            return "did not answer any more"
        with contextlib.suppress(ValueError):
            return f"died of {signal.Signals(-code).name}"
        return f"ended with code {code}"


def _body(message: Message, namespace: str, source: Source) -> bytes | None:
    """The body that the other process asks for, None if it cannot be had; it has decoded the record, so that is no danger."""
    try:
        return source.read_body(decode(namespace, message))
    except (BodyMissing, WalError):
        return None
