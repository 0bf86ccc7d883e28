"""What a child puts into a seam of itself: it dies or stops there at the nth passage."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from skialith.stores.sql import SqlStore
from skialith.stores.sqlite import SqliteStore


class Fuse:
    """Kills the process at the nth passage."""

    def __init__(self, passages: int) -> None:
        self._left = passages
        self._lock = threading.Lock()

    def burn(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self.blow()

    def blow(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # the signal is on its way; nothing may happen behind this point


class Freeze(Fuse):
    """Stops the process at the nth passage, until somebody continues it; it holds no lock of the database meanwhile."""

    def __init__(self, passages: int) -> None:
        super().__init__(passages)
        self._locking = threading.RLock()
        for name in ("migrate", "bind_wal", "write_records", "write_traces"):
            self._serialize(SqlStore, name)
        self._serialize(SqliteStore, "_connect")

    def _serialize(self, owner: type, name: str) -> None:
        original = getattr(owner, name)

        def method(*arguments: Any, **named: Any) -> Any:
            with self._locking:
                return original(*arguments, **named)

        setattr(owner, name, method)

    def blow(self) -> None:
        with self._locking:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.2)  # the other threads stop a little later


def burn_after(owner: type, name: str, fuse: Fuse) -> None:
    original = getattr(owner, name)

    def method(*arguments: Any) -> None:
        original(*arguments)
        fuse.burn()

    setattr(owner, name, method)


def replace(owner: object, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)
