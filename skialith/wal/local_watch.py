"""The detached half of the embedded server: it becomes nats-server, or waits for the last user and stops it.

``local.py`` runs this file as a plain script (``python -I -S``, standard library only, so that it starts in a few
milliseconds) with the embedded directory as working directory. All paths are relative on purpose: when somebody removes
the directory under a running server and makes a new one, the old processes can never touch the new files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys
import time

_POLL_SECONDS = 0.01


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file without waiting; whether it was free."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def recorded_pid(fd: int) -> int:
    """The process id in ``store.lock``: that of the server while the lock is taken, 0 while one is being started.

    Who holds the lock writes it: a starter first overwrites what it finds, the server's process writes its own id
    before it becomes nats-server. What a crash leaves is the dead server's; a clean stop leaves the file empty.
    """
    text = os.pread(fd, 32, 0)
    return int(text) if text.strip().isdigit() else 0


def record(fd: int, text: str) -> None:
    """Overwrite the content of ``store.lock``; only for who holds its lock."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, text.encode(), 0)


def stop_server(fd: int, seconds: float) -> bool:
    """Stop the server that holds ``store.lock`` (open as ``fd``): SIGTERM, after ``seconds`` SIGKILL; take its lock.

    True when the lock is ours, which proves that no server is alive. False when it could not be had within twice
    ``seconds``, or when the recorded process is not the one that holds the file (it lives in another container).
    """
    begun = time.monotonic()
    terminated = False
    while not try_lock(fd):
        elapsed = time.monotonic() - begun
        pid = recorded_pid(fd)
        if elapsed > 2 * seconds:
            return False
        if pid and (not terminated or elapsed > seconds) and _has_open(pid, fd):
            with contextlib.suppress(ProcessLookupError):  # it died by itself; its lock is free in a moment
                os.kill(pid, signal.SIGKILL if terminated else signal.SIGTERM)
            terminated = True
        time.sleep(_POLL_SECONDS)
    record(fd, "")
    return True


def _has_open(pid: int, fd: int) -> bool:
    """Whether process ``pid`` has this file open; True where the system cannot say (no /proc)."""
    if not os.path.isdir("/proc/self/fd"):
        return True
    mine = os.fstat(fd)
    folder = f"/proc/{pid}/fd"
    try:
        return any(_same(f"{folder}/{name}", mine) for name in os.listdir(folder))
    except OSError:
        return False


def _same(path: str, mine: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), mine)
    except OSError:
        return False


def _watch(watcher: int, users_lock: str, store_lock: str, seconds: float) -> None:
    """Wait until nobody holds ``users.lock``, stop the server, and go.

    A user that arrives meanwhile waits for ``users.lock``, so the lock that says "a watcher lives" goes first: who gets
    ``users.lock`` then finds neither server nor watcher, and starts both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    users = os.open(users_lock, os.O_RDWR | os.O_CREAT, 0o600)
    store = os.open(store_lock, os.O_RDWR | os.O_CREAT, 0o600)
    while True:
        fcntl.flock(users, fcntl.LOCK_EX)
        if stop_server(store, seconds):
            break
        fcntl.flock(users, fcntl.LOCK_UN)  # it cannot be stopped: rather let users have it
        time.sleep(seconds)
    for fd in (store, watcher, users):
        os.close(fd)


def _serve(store: int, binary: str, config: str, report: int) -> None:
    """Become nats-server, holding ``store.lock`` until the process ends."""
    record(store, f"{os.getpid()}\n")
    os.set_inheritable(store, True)
    try:
        os.execv(binary, [binary, "-c", config])
    except OSError as error:
        os.write(report, f"{binary}: {error.strerror}".encode())
        os._exit(1)


def _detach() -> int:
    """Go on as a grandchild, which the user's process need not wait for; returns the pipe that it reads to its end."""
    report = os.dup(1)
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # masks and ignored signals of the user's process live through exec
    for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    return report


def main(role: str, fd: str, *arguments: str) -> None:
    """``serve FD BINARY CONFIG`` or ``watch FD USERS STORE SECONDS``; FD is a lock to hold as long as it lives."""
    report = _detach()
    if role == "serve":
        binary, config = arguments
        _serve(int(fd), binary, config, report)
    else:
        users_lock, store_lock, seconds = arguments
        os.close(report)
        _watch(int(fd), users_lock, store_lock, float(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
