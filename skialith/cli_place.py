"""A place for commands that leave nothing behind: a directory of their own, and streams that go with them."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .config import Config
from .errors import SkialithError
from .runtime import acquire
from .wal.local_files import STORE_LOCK, WATCHER_LOCK, Flock

_STOP_SECONDS = 12.0


@contextmanager
def own_directory(prefix: str, below: Path | None = None) -> Iterator[Path]:
    """A new directory ``below`` another one (default: the system's for temporary files).

    It is removed when the embedded server that ran in it has stopped.
    """
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=below))
    try:
        yield directory
    finally:
        _wait_for_stop(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _wait_for_stop(directory: Path) -> None:
    """Until the embedded server and its watcher have let go of their locks."""
    deadline = time.monotonic() + _STOP_SECONDS
    for name in (WATCHER_LOCK, STORE_LOCK):
        while (directory / name).exists() and time.monotonic() < deadline:
            lock = Flock.take(directory / name)
            if lock is not None:
                lock.close()
                break
            time.sleep(0.02)


def remove_streams(config: Config) -> None:
    """Remove the log of a namespace that a command made for itself; its rows stay."""
    try:
        engine = acquire(config, create=False)
    except SkialithError:
        return  # it was never made
    try:
        stream = engine.wal.stream
        for name in (stream.name, stream.dead_name):
            engine.wal.call(partial(stream.api.call, f"STREAM.DELETE.{name}"), config.timeout)
    finally:
        engine.release()
