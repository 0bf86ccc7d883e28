"""One engine per process and configuration: wires settings to log, writer and database; owns fork and exit."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import sys
import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable

from . import _fastpath
from .config import CLOSE_SECONDS, FLUSH_AGENTS, TRIM_SECONDS, Config
from .errors import (
    Closed,
    ConfigurationError,
    FlushTimeout,
    RecordsLost,
    SkialithError,
    StoreError,
    StoreMisconfigured,
    StoreUnavailable,
    UnsupportedEnvironment,
    WalError,
)
from .graph_past import Filled, NoThreads, Past, ThreadStore
from .graph_recent import Recent
from .history import Found, History, NothingStored, PastStore, StepPast, newest_checkpoint
from .records import NOWHERE, Position, Record
from .stores import open_store
from .stores.base import Store
from .wal.client import Wal
from .wal.continuity import Run, Setback, shown, without
from .wal.local import LocalServer
from .wal.stream import TRACE_INGEST, WRITER
from .writer.apart import Apart
from .writer.drain import Drain
from .writer.sinks import BoundSource, EventSink, TraceSink
from .writer.status import DrainStatus

log = logging.getLogger("skialith")

_MOST_ROWS = 1_000_000
"""Rows that are looked at for what a lost log took along."""


class _Registry:
    """The runtimes of this process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.runtimes: dict[Config, Runtime] = {}
        self.inherited: list[dict[Config, Runtime]] = []

    def forget_parent(self) -> None:
        """In a forked child: keep what it got for ever and never touch it, not even the lock."""
        self.pid = os.getpid()
        self.inherited.append(self.runtimes)
        self.lock = threading.RLock()
        self.runtimes = {}

    def close_all(self) -> None:
        """At interpreter exit: what was not closed is closed now."""
        while self.runtimes:
            _, runtime = self.runtimes.popitem()
            try:
                runtime.close()
            except SkialithError as error:
                log.warning("closing at exit: %s", error)


_registry = _Registry()


def process_id() -> int:
    """This process, without asking the kernel at every call."""
    return _registry.pid


def acquire(config: Config, *, create: bool = True, loop: asyncio.AbstractEventLoop | None = None) -> Runtime:
    """The running runtime of these settings, started if need be; give it back with ``Runtime.release``.

    Raises ``ConfigurationError`` or ``WalUnavailable`` within the settings' timeout; without ``create`` a ``WalError`` when
    the namespace has no log yet. ``loop``: a server's running loop, which a runtime that is started now uses in place of a
    thread; it must outlive the runtime, and nothing that blocks may be called on it.
    """
    _refuse_green_threads()
    with _registry.lock:
        runtime = _registry.runtimes.get(config)
        if runtime is None:
            runtime = Runtime(config, loop)
            runtime.start(create)
            _registry.runtimes[config] = runtime
        runtime.users += 1
        return runtime


def close_all() -> None:
    """Close every runtime of this process, for an end that does not come by ``atexit``; each is bounded by ``CLOSE_SECONDS``."""
    _registry.close_all()


def _refuse_green_threads() -> None:
    gevent = sys.modules.get("gevent.monkey")
    patched = gevent is not None and bool(gevent.is_module_patched("threading"))
    eventlet = sys.modules.get("eventlet.patcher")
    if patched or (eventlet is not None and bool(eventlet.is_monkey_patched("thread"))):
        raise UnsupportedEnvironment(
            "gevent/eventlet monkey-patching replaces the threads and sockets that Skialith runs on: use real threads or "
            "processes (for Celery: --pool=prefork, threads or solo)"
        )


class Runtime:
    """The log connection, the drains and the database of one configuration in one process."""

    def __init__(self, config: Config, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.config = config
        self._loop = loop
        self.pid = process_id()
        self.users = 0
        self.closed = False
        self.store: Store = open_store(config.store_url, power=config.durability == "power")
        self._local = (
            LocalServer(config.path, durability=config.durability, binary=config.nats_server)
            if config.embedded
            else None
        )
        self.wal: Wal
        self._drains: list[Drain] = []
        self._trimmer = _Trimmer(self._trim)
        self._since = NOWHERE
        self._bound = False
        self._used = _Lately()

    def start(self, create: bool = True) -> None:
        deadline = time.monotonic() + self.config.timeout
        wal_bytes = None
        if self._local is not None:
            wal_bytes = self._local.acquire(self.config.timeout).wal_bytes
        self.wal = Wal(self.config, self.find_url, wal_bytes, self._loop)
        try:
            self.wal.open(max(1.0, deadline - time.monotonic()), create)
            self._recent = Recent(self.wal, self.thread, self.config.timeout)
            self._since = self.wal.end(deadline)
            if self.config.writer == "on":
                self._start_writer()
        except BaseException:
            self.close(flush=False)
            raise

    def find_url(self) -> str:
        """URL of the log's server with its credentials; an embedded server that died is started again."""
        if self._local is not None:
            return self._local.ensure(self.config.timeout).url
        return self.config.nats_url or ""

    def _start_writer(self) -> None:
        binder = _Binder(self.store, self.config, self.wal)
        # trace_ingest idles while the namespace has no traces, so that switching them on needs no restart.
        sinks: list[tuple[str, EventSink | TraceSink]] = [
            (WRITER, EventSink(self.store)),
            (TRACE_INGEST, TraceSink(self.store)),
        ]
        for consumer, sink in sinks:
            drain = Drain(
                BoundSource(self.wal.source(consumer), binder.bind),
                sink,
                self.config.namespace,
                on_progress=self._trimmer.note,
                before_first=binder.bind,
                apart=Apart(
                    [sink.name, self.config.namespace, self.config.store_url, self.config.durability == "power"]
                ),
            )
            self._drains.append(drain)
        self._prepare_store(binder)
        self._trimmer.start()
        for drain in self._drains:
            drain.start()

    def _prepare_store(self, binder: _Binder) -> None:
        """Schema and binding now, if the database answers; a database that is down is prepared when it is back."""
        try:
            binder.bind()
        except StoreMisconfigured as error:
            raise ConfigurationError(str(error)) from error
        except StoreUnavailable as error:
            log.warning("the database is away, records wait in the log until it is back: %s", error)

    def _trim(self) -> bool:
        try:
            return self.wal.trim()
        except (WalError, Closed) as error:
            log.info("trimming %s put off: %s", self.wal.stream.name, error)
            return False

    # ---- what agents use

    def check_open(self) -> None:
        if self.closed:
            raise Closed("the agent was used after close(); nothing was sent. Open a new SkialithAgent")

    def note_agent(self, agent_id: str) -> None:
        self._used.note(agent_id)

    def note_thread(self, thread_name: str) -> None:
        """A graph's thread is used: its dead letters count at a flush, and the log is watched for a writer that stands still."""
        self._used.note(thread_name)
        self.wal.watch_writer()

    def newest_checkpoint(self, agent_id: str, deadline: float) -> Found:
        return newest_checkpoint(self.wal, self._reading, self.config.namespace, agent_id, deadline)

    def stored_checkpoint(self, agent_id: str) -> Record | None:
        """The newest checkpoint that the database has."""
        return self._reading().latest_checkpoint(self.config.namespace, agent_id)

    def history(self, agent_id: str) -> History:
        return History(self.wal, self._reading, self.config.namespace, agent_id, self.config.timeout)

    def steps(self, agent_id: str) -> StepPast:
        return StepPast(self.wal, self._reading, self.config.namespace, agent_id, self.config.timeout)

    def thread(self, thread_id: str | None) -> Past:
        """A look at a graph's thread, or at all threads."""
        return Past(self.wal, self._reading_threads, self.config.namespace, thread_id, self.config.timeout)

    def latest_checkpoint(self, thread_id: str, checkpoint_ns: str) -> Filled | None:
        """The latest checkpoint of a graph's thread in a namespace, with what belongs to it; None if there is none."""
        return self._recent.latest(thread_id, checkpoint_ns)

    def _reading_threads(self) -> ThreadStore:
        return NoThreads() if isinstance(self._reading(), NothingStored) else self.store

    def _reading(self) -> PastStore:
        """The database to read this log's past from: the one its writer feeds, and no other.

        Raises ``ConfigurationError`` when this is another database, because an agent would find itself new there.
        """
        if not self._bound:
            bound = self.store.bound_wal(self.config.namespace)
            if bound is None:
                if not self.wal.anything_stored(self.config.timeout):
                    return NothingStored()
                # The first writer may have come in between; it bound the database before it stored anything.
                bound = self.store.bound_wal(self.config.namespace)
            if bound != self.wal.stream.wal_id:
                raise ConfigurationError(
                    f"the database {self.store.url} does not hold what was moved out of the log {self.wal.stream.wal_id!r}: "
                    "set SKIALITH_DATABASE_URL to the database of the writer of this log; if that is this one, and the log was "
                    "made anew because its server was lost, run `skialith migrate --adopt-wal`"
                )
            self._bound = True
        return self.store

    def flush(self, timeout: float) -> int:
        """Wait until all that this process appended is STORED; returns how many of it are dead letters."""
        self.wal.flush(timeout)
        return self.flushed()

    def flushed(self) -> int:
        """What :meth:`flush` does when the log has said that nothing waits. Raises ``RecordsLost``."""
        setbacks = self.wal.take_setbacks()
        try:
            lost = [run for setback in setbacks for run in self._not_stored(setback)]
        except (StoreError, ConfigurationError):
            self.wal.continuity.setbacks.extend(setbacks)  # to be told when the database answers
            raise
        if lost:
            raise RecordsLost(
                f"{sum(run[2] for run in lost):,} records that were acknowledged to this process are lost, at sequences "
                f"{shown(lost)}: the log's server came back without them (see `skialith doctor`); save again what they held, the "
                "same ids are safe. Everything else is stored",
                sequences=tuple(lost),
            )
        return self.count_dead()

    def _not_stored(self, setback: Setback) -> list[Run]:
        """Those of the records that the database does not have either."""
        if isinstance(self._reading(), NothingStored):
            return list(setback.runs)
        first, last = min(run[0] for run in setback.runs), max(run[1] for run in setback.runs)
        rows = self.store.sequences(self.config.namespace, first, last, (0, setback.until_ns), _MOST_ROWS)
        return [
            left
            for run in setback.runs
            for left in without(run, rows[bisect_left(rows, run[0]) : bisect_right(rows, run[1])])
        ]

    def count_dead(self) -> int:
        """How many of the records that this process appended are dead letters."""
        since = Position(self._since.time_ns, self._since.seq + 1)
        letters = self.wal.dead_letters(time.monotonic() + self.config.timeout, whole=False)
        dead = [
            (each.subject, each.key)
            for each in letters
            if each.sink == WRITER and (each.position.time_ns >= since.time_ns or each.position.seq >= since.seq)
        ]
        if not isinstance(self._reading(), NothingStored):
            dead += self.store.dead_keys(self.config.namespace, WRITER, since)
        if not dead:
            return 0
        tokens = self._used.tokens()  # by subject, which tells the agent of what does not decode too
        return len({key for subject, key in dead if subject.rpartition(".")[2] in tokens})

    def drain_status(self) -> list[DrainStatus]:
        return [drain.status() for drain in self._drains]

    # ---- life

    def release(self) -> None:
        """Give back what :func:`acquire` returned; the last one closes the runtime."""
        with _registry.lock:
            self.users -= 1
            if self.users > 0 or self.closed:
                return
            _registry.runtimes.pop(self.config, None)
        self.close()

    def close(self, *, flush: bool = True) -> None:
        """Refuse new records, flush, stop the drains, release, disconnect; bounded by ``CLOSE_SECONDS``. May be called twice.

        What is not stored by then stays durable in the log.
        """
        if self.closed:
            return
        self.closed = True
        deadline = time.monotonic() + CLOSE_SECONDS
        if flush and hasattr(self, "wal") and not self.wal.settle(max(0.0, deadline - time.monotonic()) / 2):
            log.warning("closing while calls wait for their PubAck: they end with outcome 'unknown'")
        flushed = flush and bool(self._drains) and self._flush_for_close(deadline)
        for drain in self._drains:
            drain.stop(max(0.5, deadline - time.monotonic()))
        self._trimmer.stop(max(0.5, deadline - time.monotonic()))
        if hasattr(self, "wal"):
            if flushed:
                self._trim()
            self.wal.close()
        self.store.close()
        if self._local is not None:
            self._local.release()

    def _flush_for_close(self, deadline: float) -> bool:
        """Whether all that this process appended is stored."""
        if not all(status.database_ok for status in self.drain_status()):
            log.warning("closing while the database is away: what is not stored stays in the log")
            return False
        try:
            self.wal.flush(max(0.0, deadline - time.monotonic()))
        except (FlushTimeout, WalError, StoreError) as error:
            log.warning("closing: %s", error)
            return False
        return True


class _Lately:
    """The agents and graphs' threads that were used last; a process may see ever new ones for as long as it lives."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, name: str) -> None:
        with self._lock:
            self._names[name] = None
            self._names.move_to_end(name)
            if len(self._names) > FLUSH_AGENTS:
                self._names.popitem(last=False)

    def tokens(self) -> set[str]:
        """Their last tokens in subjects."""
        with self._lock:
            names = list(self._names)
        return {_fastpath.subject_token(name) for name in names}


class _Binder:
    """Prepares the database before the first batch: schema, and the log that feeds this namespace."""

    def __init__(self, store: Store, config: Config, wal: Wal) -> None:
        self._store = store
        self._config = config
        self._wal = wal
        self._lock = threading.Lock()
        self._bound = ""

    def bind(self) -> None:
        """Raises ``ConfigurationError`` when another log feeds this database, or this log feeds another database."""
        wal_id = self._wal.stream.wal_id
        if self._bound == wal_id:
            return
        with self._lock:
            if self._bound == wal_id:
                return
            # In this order: whoever stores something has bound its database before.
            stored = self._wal.anything_stored(self._config.timeout)
            self._store.migrate()
            if stored and self._store.bound_wal(self._config.namespace) is None:
                raise ConfigurationError(
                    f"records of the log {self._wal.stream.wal_id!r} are in another database than {self._store.url}, which "
                    "would take the rest: set SKIALITH_DATABASE_URL to the database of its writer, or use writer='off' here; if "
                    "that database is gone for good, run `skialith migrate --adopt-wal`"
                )
            self._store.bind_wal(self._config.namespace, wal_id)
            self._bound = wal_id


class _Trimmer:
    """A thread that trims about once a second, at its start and then only after acks moved or a trim failed.

    At its start, because whoever acknowledged before may have ended before it trimmed, and a full log moves no acks.
    """

    def __init__(self, trim: Callable[[], bool]) -> None:
        self._trim = trim
        self._moved = threading.Event()
        self._moved.set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="skialith-trim", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def note(self) -> None:
        self._moved.set()

    def stop(self, timeout: float) -> None:
        self._stopping.set()
        self._moved.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _main(self) -> None:
        while not self._stopping.is_set():
            self._moved.wait()
            self._moved.clear()
            if self._stopping.wait(TRIM_SECONDS):
                return
            if not self._trim():
                self._moved.set()


os.register_at_fork(after_in_child=_registry.forget_parent)
atexit.register(_registry.close_all)
