"""A bounded pool of database connections that survives fork: a child never closes or uses a connection of its parent.

Connections to a server stay open in the parent, and a child leaves its copies of them alone. SQLite's are all closed before
the fork: its library keeps the locks of a process on a file in memory, and a child that inherits that memory opens the file
anew without taking any lock of its own. The parent's last ``close()`` then deletes the write-ahead file under the child,
and what the child commits is gone.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from ..config import DATABASE_CHECKOUT_SECONDS, DATABASE_CONNECTIONS, DATABASE_FORK_SECONDS
from ..errors import StoreUnavailable

C = TypeVar("C")


class _State(Generic[C]):
    """The connections of one process: ``idle`` ones, ``users`` (threads that have one or are about to), all ``open`` ones,
    and when each was ``used`` last."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.idle: list[C] = []
        self.users: list[int] = []
        self.open: dict[int, C] = {}
        self.used: dict[int, float] = {}
        self.forking = False


class Pool(Generic[C]):
    """Connections made by ``connect`` when none is idle, at most ``limit`` at once, each used by one thread at a time.

    ``close`` ends a connection; its errors are ignored. ``alive`` says whether an idle one still works, asked before it is
    used again. ``leave`` is called in a forked child for each connection of the parent, which nothing touches after that;
    without it, all connections are closed before a fork, which waits for those in use.
    """

    def __init__(
        self,
        connect: Callable[[], C],
        close: Callable[[C], None],
        *,
        alive: Callable[[C], bool] = lambda _: True,
        leave: Callable[[C], None] | None = None,
        limit: int = DATABASE_CONNECTIONS,
        wait: float = DATABASE_CHECKOUT_SECONDS,
    ) -> None:
        self._connect = connect
        self._close = close
        self._alive = alive
        self._leave = leave
        self._limit = limit
        self._wait = wait
        self._state: _State[C] = _State()
        self._closed = False
        self._torn = False
        _pools.add(self)

    @contextmanager
    def connection(self, trusted: float = 0.0) -> Iterator[C]:
        """One connection for the block; closed after any error in the block, otherwise kept for the next caller.

        ``trusted``: an idle one that was used in the last so many seconds is not asked whether it is alive. Raises
        ``StoreUnavailable`` when the pool is closed or no connection becomes free in time, or what ``connect`` raises.
        """
        state = self._current()
        idle = self._enter(state)
        connection: C | None = None
        try:
            connection = self._open(state, idle, trusted)
            yield connection
        except BaseException:
            # A child that was forked in the midst of the block leaves everything as it is.
            if state.pid == os.getpid():
                if connection is not None:
                    self._end(state, connection)
                self._exit(state, None)
            raise
        self._exit(state, connection)

    def close(self) -> None:
        """Close all idle connections, and those in use when they come back. May be called twice."""
        state = self._current()
        with state.changed:
            self._closed = True
            self._end_idle(state)
            state.changed.notify_all()

    # ---- fork

    def before_fork(self) -> None:
        """Close all connections and let nobody open one until the fork is done, unless a child may have copies of them."""
        if self._leave is not None:
            return
        state = self._current()
        deadline = time.monotonic() + DATABASE_FORK_SECONDS
        with state.changed:
            state.forking = True
            self._end_idle(state)
            # A thread that forks in the midst of its own transaction would wait for itself.
            while state.users and threading.get_ident() not in state.users:
                if not state.changed.wait(max(0.0, deadline - time.monotonic())):
                    return
                self._end_idle(state)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        with self._state.changed:
            self._state.forking = False
            self._state.changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Start empty, and leave the parent's connections alone for ever."""
        self._current()

    # ---- how

    def _current(self) -> _State[C]:
        state = self._state
        if state.pid != os.getpid():
            # Nothing of the parent's state may be used, not even its lock: another thread may hold it for ever.
            for connection in list(state.open.values()):
                _keep_for_ever(connection)
                if self._leave is not None:
                    self._leave(connection)
            if self._leave is None and (state.open or state.users):
                self._torn = True
            self._state = state = _State()
        return state

    def _enter(self, state: _State[C]) -> C | None:
        """Wait for a place; gives an idle connection, or None if a new one is to be opened."""
        deadline = time.monotonic() + self._wait
        with state.changed:
            while not self._closed and (state.forking or len(state.users) >= self._limit):
                if not state.changed.wait(max(0.0, deadline - time.monotonic())):
                    raise StoreUnavailable(
                        f"all {self._limit} database connections of this process were in use for {self._wait:g} s; "
                        "the database is slow or hangs, try again"
                    )
            if self._closed:
                raise StoreUnavailable("the store is closed", retryable=False)
            if self._torn:
                raise StoreUnavailable(
                    "this process was forked in the midst of a SQLite transaction of its parent, and whatever it did with "
                    "the file now could destroy records: fork when nothing is written, or start children by spawn",
                    retryable=False,
                )
            state.users.append(threading.get_ident())
            return state.idle.pop() if state.idle else None

    def _open(self, state: _State[C], idle: C | None, trusted: float) -> C:
        if idle is not None:
            if time.monotonic() - state.used.get(id(idle), 0.0) < trusted or self._alive(idle):
                return idle
            self._end(state, idle)
        connection = self._connect()
        state.open[id(connection)] = connection
        return connection

    def _exit(self, state: _State[C], connection: C | None) -> None:
        with state.changed:
            if connection is not None and not self._closed:
                state.idle.append(connection)
                state.used[id(connection)] = time.monotonic()
            elif connection is not None:
                self._end(state, connection)
            state.users.remove(threading.get_ident())
            state.changed.notify_all()

    def _end(self, state: _State[C], connection: C) -> None:
        state.open.pop(id(connection), None)
        state.used.pop(id(connection), None)
        with suppress(Exception):
            self._close(connection)

    def _end_idle(self, state: _State[C]) -> None:
        while state.idle:
            self._end(state, state.idle.pop())


_pools: WeakSet[Pool[Any]] = WeakSet()


def _keep_for_ever(connection: object) -> None:
    """Make ``connection`` outlive even the interpreter's own clean-up, which would close it under the parent."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


class _Forks:
    """Takes every pool of the process through a fork."""

    def __init__(self) -> None:
        self._lock = (
            threading.RLock()
        )  # of two threads that fork at once, each would hold a pool and wait for the other's
        self._held: list[Pool[Any]] = []

    def before(self) -> None:
        self._lock.acquire()
        for pool in list(_pools):
            self._held.append(pool)
            pool.before_fork()

    def after_in_parent(self) -> None:
        while self._held:
            self._held.pop().after_fork_in_parent()
        self._lock.release()

    def after_in_child(self) -> None:
        self._lock, self._held = threading.RLock(), []
        for pool in list(_pools):
            pool.after_fork_in_child()


_forks = _Forks()
os.register_at_fork(before=_forks.before, after_in_parent=_forks.after_in_parent, after_in_child=_forks.after_in_child)
