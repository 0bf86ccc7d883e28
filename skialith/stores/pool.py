"""A bounded pool of database connections that survives fork: a child never closes or uses what it inherited."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from ..config import DATABASE_CHECKOUT_SECONDS, DATABASE_CONNECTIONS
from ..errors import StoreUnavailable

C = TypeVar("C")


class _State(Generic[C]):
    """The connections of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.returned = threading.Condition()
        self.idle: list[C] = []
        self.open: dict[int, C] = {}
        self.slots = 0


class Pool(Generic[C]):
    """Connections made by ``connect`` when none is idle, at most ``limit`` at once, each used by one thread at a time.

    ``close`` ends a connection; its errors are ignored. ``alive`` says whether an idle one still works, asked before it is
    used again. ``inherit`` is called in a forked child for every connection of the parent, which is then never touched again.
    """

    def __init__(
        self,
        connect: Callable[[], C],
        close: Callable[[C], None],
        *,
        alive: Callable[[C], bool] = lambda _: True,
        inherit: Callable[[C], None] = lambda _: None,
        limit: int = DATABASE_CONNECTIONS,
        wait: float = DATABASE_CHECKOUT_SECONDS,
    ) -> None:
        self._connect = connect
        self._close = close
        self._alive = alive
        self._inherit = inherit
        self._limit = limit
        self._wait = wait
        self._state: _State[C] = _State()
        self._closed = False
        _pools.add(self)

    @contextmanager
    def connection(self) -> Iterator[C]:
        """One connection for the block; closed after any error in the block, otherwise kept for the next caller.

        Raises ``StoreUnavailable`` when the pool is closed or no connection becomes free in time, or what ``connect`` raises.
        """
        state = self._current()
        connection = self._checkout(state)
        try:
            yield connection
        except BaseException:
            self._discard(state, connection)
            raise
        self._return(state, connection)

    def close(self) -> None:
        """Close all idle connections, and those in use when they come back. May be called twice."""
        state = self._current()
        with state.returned:
            self._closed = True
            idle, state.idle = state.idle, []
            state.returned.notify_all()
        for connection in idle:
            self._discard(state, connection)

    def after_fork(self) -> None:
        """Start empty in a child and leave the parent's connections alone for ever; does nothing in the parent."""
        self._current()

    def _current(self) -> _State[C]:
        state = self._state
        if state.pid != os.getpid():
            # Nothing of the parent's state may be used, not even its lock: another thread may hold it for ever.
            for connection in list(state.open.values()):
                _keep_for_ever(connection)
                self._inherit(connection)
            self._state = state = _State()
        return state

    def _checkout(self, state: _State[C]) -> C:
        deadline = time.monotonic() + self._wait
        with state.returned:
            while not self._closed and not state.idle and state.slots >= self._limit:
                if not state.returned.wait(deadline - time.monotonic()):
                    raise StoreUnavailable(
                        f"all {self._limit} database connections of this process were in use for {self._wait:g} s; "
                        "the database is slow or hangs, try again"
                    )
            if self._closed:
                raise StoreUnavailable("the store is closed", retryable=False)
            reused = state.idle.pop() if state.idle else None
            if reused is None:
                state.slots += 1
        if reused is not None:
            try:
                if self._alive(reused):
                    return reused
            except BaseException:
                self._discard(state, reused)
                raise
            self._forget(state, reused)
        return self._new(state)

    def _new(self, state: _State[C]) -> C:
        try:
            connection = self._connect()
        except BaseException:
            self._free_slot(state)
            raise
        state.open[id(connection)] = connection
        return connection

    def _return(self, state: _State[C], connection: C) -> None:
        with state.returned:
            if not self._closed:
                state.idle.append(connection)
                state.returned.notify()
                return
        self._discard(state, connection)

    def _discard(self, state: _State[C], connection: C) -> None:
        self._forget(state, connection)
        self._free_slot(state)

    def _forget(self, state: _State[C], connection: C) -> None:
        state.open.pop(id(connection), None)
        with suppress(Exception):
            self._close(connection)

    def _free_slot(self, state: _State[C]) -> None:
        with state.returned:
            state.slots -= 1
            state.returned.notify()


_pools: WeakSet[Pool[Any]] = WeakSet()


def _keep_for_ever(connection: object) -> None:
    """Make ``connection`` outlive even the interpreter's own clean-up, which would close it under the parent."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
