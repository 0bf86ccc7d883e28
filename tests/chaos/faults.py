"""Seams that a child changes in itself: where it dies by its own SIGKILL or stops, and the limits it goes by."""

from __future__ import annotations

import ctypes
import importlib
import struct
from collections.abc import Callable, Sequence
from typing import Any

from skialith import letters
from skialith.records import Ack, Message, Record
from skialith.runtime import Runtime
from skialith.steps import Call
from skialith.stores.sql import SqlStore
from skialith.wal import transport
from skialith.wal._waiting import Window
from skialith.wal._wire import Wire
from skialith.wal.delivery import Delivery
from skialith.wal.lane import Entry, Lane
from skialith.wal.transport import Connection
from skialith.writer.drain import Drain

from .canaries import CANARIES
from .fuses import Freeze, Fuse, burn_after, replace

POINTS = ("before send", "after send", "after PubAck", "after pull", "before commit", "after commit", "before ack")
"""The path of a record, in order."""
WRITER_POINTS = POINTS[3:]
"""Those on a writer's side."""
STEP_POINTS = ("before function", "after function", "before send", "after send", "after PubAck", "after record")
"""The path of a step, in order: its function, then its record."""


def install(die: dict[str, int], freeze: dict[str, int], canary: str = "") -> None:
    """Set the points (name and passage) at which this process dies or stops, and break what ``canary`` names."""
    for point, passages in die.items():
        _POINTS[point](Fuse(passages))
    for point, passages in freeze.items():
        _POINTS[point](Freeze(passages))
    if canary:
        CANARIES[canary]()


def limit(limits: dict[str, float]) -> None:
    """Change named limits in this process: ``{"stores.mysql.DATABASE_LOCK_SECONDS": 1}``, by the module that uses them."""
    for path, value in limits.items():
        module, _, name = path.rpartition(".")
        used = importlib.import_module(f"skialith.{module}")
        assert hasattr(used, name), path
        setattr(used, name, value)


def drop_capabilities() -> None:
    """Be root in name only: this thread, and all that it starts, may do with a file what its permissions say."""
    version, none = 0x20080522, bytes(24)  # of two sets of 32: effective, permitted, inheritable
    header = struct.pack("Ii", version, 0)
    library = ctypes.CDLL(None, use_errno=True)
    if library.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


# ---- points


def _before_send(fuse: Fuse) -> None:
    class Burning(Wire):
        def post(self, *arguments: Any) -> int:
            fuse.burn()
            return super().post(*arguments)

        def pipeline(self, *arguments: Any) -> Window | None:
            fuse.burn()
            return super().pipeline(*arguments)

    replace(transport, "Wire", Burning)
    original = Connection.send

    def send(self: Connection, frame: bytes) -> None:
        if _is_record(frame):
            fuse.burn()
        original(self, frame)

    replace(Connection, "send", send)


def _after_send(fuse: Fuse) -> None:
    class Burning(Wire):
        def post(self, *arguments: Any) -> int:
            size = super().post(*arguments)
            fuse.burn()
            return size

        def pipeline(self, *arguments: Any) -> Window | None:
            window = super().pipeline(*arguments)
            fuse.burn()
            return window

    replace(transport, "Wire", Burning)
    original = Connection.send

    def send(self: Connection, frame: bytes) -> None:
        original(self, frame)
        if _is_record(frame):
            fuse.burn()

    replace(Connection, "send", send)


def _is_record(frame: bytes) -> bool:
    return frame.startswith(b"HPUB skialith.") and b".log." in frame[: frame.index(b"\r\n")]


def _after_puback(fuse: Fuse) -> None:
    class Burning(Wire):
        def append(self, *arguments: Any) -> tuple[int, bool] | None:
            answer = super().append(*arguments)
            if answer is not None:
                fuse.burn()
            return answer

    replace(transport, "Wire", Burning)
    original = Delivery._acknowledge

    def acknowledge(self: Delivery, lane: Lane, entry: Entry, ack: Ack) -> None:
        fuse.burn()
        original(self, lane, entry, ack)

    replace(Delivery, "_acknowledge", acknowledge)


def _before_function(fuse: Fuse) -> None:
    original = Call.__enter__

    def enter(self: Call) -> None:
        fuse.burn()
        original(self)

    replace(Call, "__enter__", enter)


def _after_function(fuse: Fuse) -> None:
    """The function of a step has returned, and nothing knows of its result."""
    original = Call.succeeded

    def succeeded(self: Call, result: object) -> Record:
        fuse.burn()
        return original(self, result)

    replace(Call, "succeeded", succeeded)


def _after_record(fuse: Fuse) -> None:
    """A step is recorded, and its caller does not have the value yet."""
    original = Call.recorded

    def recorded(self: Call, *arguments: Any) -> Any:
        fuse.burn()
        return original(self, *arguments)

    replace(Call, "recorded", recorded)


def _after_pull(fuse: Fuse) -> None:
    original = Drain.pull

    def pull(self: Drain) -> list[Message]:
        messages = original(self)
        if messages:
            fuse.burn()
        return messages

    replace(Drain, "pull", pull)


def _before_ack(fuse: Fuse) -> None:
    original = Drain.ack

    def ack(self: Drain, messages: Sequence[Message]) -> None:
        fuse.burn()
        original(self, messages)

    replace(Drain, "ack", ack)


def _before_commit(fuse: Fuse) -> None:
    """All rows of the transaction are inserted, nothing is committed."""
    for name in ("_insert_records", "_insert_traces"):
        burn_after(SqlStore, name, fuse)


def _after_commit(fuse: Fuse) -> None:
    for name in ("write_records", "write_traces"):
        burn_after(SqlStore, name, fuse)


def _before_replay(fuse: Fuse) -> None:
    """A dead letter is about to be stored after all."""
    original = letters.replay

    def replay(engine: Runtime, found: letters.Found) -> None:
        fuse.burn()
        original(engine, found)

    replace(letters, "replay", replay)


def _after_replay(fuse: Fuse) -> None:
    """What a dead letter held is stored; one of the stream is still there."""
    burn_after(SqlStore, "replay_dead_letter", fuse)


def _after_discard(fuse: Fuse) -> None:
    original = letters.discard

    def discard(engine: Runtime, found: letters.Found) -> None:
        original(engine, found)
        fuse.burn()

    replace(letters, "discard", discard)


_POINTS: dict[str, Callable[[Fuse], None]] = {
    "before send": _before_send,
    "after send": _after_send,
    "after PubAck": _after_puback,
    "before function": _before_function,
    "after function": _after_function,
    "after record": _after_record,
    "after pull": _after_pull,
    "before commit": _before_commit,
    "after commit": _after_commit,
    "before ack": _before_ack,
    "before replay": _before_replay,
    "after replay": _after_replay,
    "after discard": _after_discard,
}
