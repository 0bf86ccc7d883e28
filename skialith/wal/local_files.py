"""What the embedded server keeps in its directory: the locks, the state file, the configuration of nats-server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..config import LOCAL_LOG_BYTES, LOCAL_LOG_FILES, Durability
from ..errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

    from . import local_watch

USERS_LOCK = "users.lock"
WATCHER_LOCK = "watcher.lock"
START_LOCK = "start.lock"
STORE_LOCK = "store.lock"
CONFIG_FILE = "nats-server.conf"
LOG_FILE = "nats-server.log"
STORE_FOLDER = "wal"
_STATE_FILE = "nats-server.json"
_GREETING_SECONDS = 1.0
_GREETING_BYTES = 64 * 1024
_PORTS = range(20_000, 32_768)
"""Below the ephemeral ports: a client that keeps reconnecting to a free ephemeral port can end up connected to itself
and hold the port."""


class LocalAddress(NamedTuple):
    """A running embedded server. ``url`` holds its token; ``wal_bytes`` is what one stream may use, for good."""

    url: str
    pid: int
    wal_bytes: int
    directory: Path
    durability: Durability


class State(NamedTuple):
    """What the state file holds: how the last server was started."""

    port: int
    token: str
    name: str
    durability: Durability
    wal_bytes: int
    store_bytes: int

    @classmethod
    def load(cls, directory: Path) -> State | None:
        """None if there is no such file or it is not whole (a power loss may have left anything)."""
        try:
            values = json.loads((directory / _STATE_FILE).read_bytes())
            state = cls(**values)
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None
        kinds = (int, str, str, str, int, int)
        whole = all(isinstance(value, kind) for value, kind in zip(state, kinds, strict=True))
        return state if whole and state.durability in ("process", "power") else None

    def save(self, directory: Path) -> None:
        replace_file(directory / _STATE_FILE, json.dumps(self._asdict()))

    def server_config(self) -> str:
        """The configuration of nats-server. Paths are relative to its working directory, see ``local_watch``."""
        sync = "sync_interval: always\n" if self.durability == "power" else ""
        return (
            f'server_name: "{self.name}"\nhost: "127.0.0.1"\nport: {self.port}\n'
            f'authorization {{ token: "{self.token}" }}\n'
            f'log_file: "{LOG_FILE}"\nlogfile_size_limit: {LOCAL_LOG_BYTES}\nlogfile_max_num: {LOCAL_LOG_FILES}\n'
            f'jetstream {{\nstore_dir: "{STORE_FOLDER}"\nmax_file_store: {self.store_bytes}\n{sync}}}\n'
        )

    def address(self, directory: Path) -> LocalAddress:
        url = f"nats://{self.token}@127.0.0.1:{self.port}"
        return LocalAddress(url, recorded_pid(directory), self.wal_bytes, directory, self.durability)

    def answers(self, deadline: float) -> bool:
        """Whether this very server greets on its port with JetStream ready; waits a second at most."""
        deadline = min(deadline, time.monotonic() + _GREETING_SECONDS)
        received = b""
        try:
            with socket.create_connection(
                ("127.0.0.1", self.port), max(0.01, deadline - time.monotonic())
            ) as connection:
                while b"\r\n" not in received and len(received) < _GREETING_BYTES:
                    connection.settimeout(max(0.01, deadline - time.monotonic()))
                    piece = connection.recv(_GREETING_BYTES)
                    if not piece:
                        return False
                    received += piece
            info: dict[str, Any] = json.loads(received.partition(b"\r\n")[0].removeprefix(b"INFO "))
        except (OSError, ValueError):
            return False  # refused, silent, or not a NATS server
        return isinstance(info, dict) and info.get("server_name") == self.name and info.get("jetstream") is True


class Flock:
    """An ``flock`` that is held until ``close``; made by ``take``. A forked child loses its copy at once.

    A lock belongs to the open file description, which a fork shares: a child that keeps the descriptor keeps the lock
    after the parent has closed its own. ``store.lock`` would outlive the server, and nobody could start it again.
    Closing in the child does not unlock for the parent.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def take(cls, path: Path, *, shared: bool = False) -> Flock | None:
        """Lock the file at ``path``, made if there is none; None if somebody else holds it. Never waits."""
        with forks_wait:
            lock = cls(path, os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            _held.add(lock)
        try:
            fcntl.flock(lock.fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except BaseException:
            lock.close()
            raise
        return lock

    def current(self) -> bool:
        """Whether the locked file still is the one at its path."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def close(self) -> None:
        with forks_wait:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1
            _held.discard(self)


_held: set[Flock] = set()
forks_wait = threading.RLock()
"""Held where a fork in another thread would catch descriptors that nobody may inherit; ``os.fork`` waits for it."""


def _after_fork_in_child() -> None:
    for lock in _held:
        os.close(lock.fd)
        lock.fd = -1
    _held.clear()
    forks_wait.release()


if sys.platform != "win32":
    os.register_at_fork(
        before=forks_wait.acquire, after_in_parent=forks_wait.release, after_in_child=_after_fork_in_child
    )


def recorded_pid(directory: Path) -> int:
    try:
        fd = os.open(directory / STORE_LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        return local_watch.recorded_pid(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, text: str) -> None:
    """Write a file that only its owner may read, in one step; callers hold ``start.lock``, so the name is free."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(new, path)


def used_bytes(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            total += os.lstat(os.path.join(root, name)).st_blocks * 512
    return total


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as nats-server does
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    for _ in range(100):
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        if is_free(port):
            return port
    raise ConfigurationError(f"no free loopback port found between {_PORTS.start} and {_PORTS.stop - 1}")
