"""A private PostgreSQL for the benches, with default durability: fsync and synchronous_commit are on."""

from __future__ import annotations

import atexit
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from glob import glob
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tests.fixtures.nats import free_port

if TYPE_CHECKING:
    from typing_extensions import Self

START_SECONDS = 60.0
"""How long a server may take to answer on a busy machine."""
STOP_SECONDS = 60.0
"""How long a server may take to end after SIGINT, which rolls back what is open."""
USER = "skialith"


class Postgres:
    """One postgres on a free loopback port; its data live in a temporary folder of their own until the end of the block.

    The server refuses to run as root, and a folder below root's is out of reach for others. So the folder is one of the
    system's temporary ones, and a root hands it and the process to ``postgres``, or to ``nobody`` where that is missing.
    """

    def __init__(self) -> None:
        self.password = secrets.token_hex(8)
        self.port = free_port()
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def url(self, database: str) -> str:
        """Where ``database`` is; created if the server does not have it."""
        with self.connect() as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone() is None:
                connection.execute(f'CREATE DATABASE "{database}"')
        return self._url(database)

    def connect(self) -> Any:
        """A psycopg connection in autocommit."""
        import psycopg

        return psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=5)

    def setting(self, name: str) -> str:
        """What the server runs with."""
        with self.connect() as connection:
            return str(connection.execute(f"SHOW {name}").fetchone()[0])

    def start(self) -> Self:
        """Make a new database cluster, start the server and wait until it answers."""
        self._folder = Path(tempfile.mkdtemp(prefix="skialith-postgres-"))
        atexit.register(self.stop)
        self._initialise(self._folder)
        for _ in range(5):
            if self._start_once(self._folder):
                return self
            self.port = free_port()
        said = (self._folder / "log").read_text("utf-8", "replace")[-2000:]
        self.stop()
        raise RuntimeError(f"postgres did not start on port {self.port}:\n{said}")

    def stop(self) -> None:
        """SIGINT (SIGQUIT if that takes too long), wait for the end, remove the data. May be called twice."""
        if self._owner != os.getpid():
            return
        self._end()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- how

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def _initialise(self, folder: Path) -> None:
        (folder / "password").write_text(self.password)
        for path in (folder, folder / "password"):
            os.chown(path, *_ids())
        command = [_binary("initdb"), f"--pgdata={folder / 'data'}", f"--username={USER}", "--auth=scram-sha-256"]
        command += [f"--pwfile={folder / 'password'}", "--encoding=UTF8", "--no-locale"]
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False, **_identity())
        if done.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{(done.stdout + done.stderr).decode('utf-8', 'replace')[-2000:]}")

    def _start_once(self, folder: Path) -> bool:
        import psycopg

        command = [_binary("postgres"), "-D", str(folder / "data"), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        with (folder / "log").open("ab") as log:
            self._process = process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the run must not end it under the benches' feet
                **_identity(),
            )
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            try:
                # The password is this server's own, so nobody else's server on the port is taken for it.
                self.connect().close()
            except psycopg.OperationalError:
                time.sleep(0.02)
            else:
                return True
        self._end()
        return False

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)  # a SIGKILL would leave its children
        process.wait()


def _binary(name: str) -> str:
    """Path of one of PostgreSQL's programs; Debian keeps them off the PATH."""
    found = shutil.which(name) or max(glob(f"/usr/lib/postgresql/*/bin/{name}"), default=None)
    if found is None:
        raise RuntimeError(f"the benches need {name}: apt-get install postgresql")
    return found


def _ids() -> tuple[int, int]:
    """User and group that the server runs as."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return entry.pw_uid, entry.pw_gid
    raise RuntimeError("postgres does not run as root, and there is neither a user postgres nor a user nobody")


def _identity() -> dict[str, Any]:
    """The same as arguments of ``subprocess``; nothing for who is not root."""
    if os.geteuid() != 0:
        return {}
    user, group = _ids()
    return {"user": user, "group": group, "extra_groups": []}
