"""How the sidecar runs: one socket, one process or several that are watched, and an end that loses nothing that was answered."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.synchronize import Event, Lock
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.supervisors import Multiprocess

from ..config import Config
from ..errors import ConfigurationError, SkialithError
from . import logs
from .config import (
    CONCURRENT_REQUESTS,
    IDLE_CONNECTION_SECONDS,
    SHUTDOWN_SECONDS,
    WORKER_HANGS_SECONDS,
    SidecarConfig,
    metrics_folder,
    share_metrics,
)

log = logging.getLogger("skialith.sidecar")

Report = Callable[[SkialithError | None], None]
"""Told what became of a start; None: it serves."""

_BACKLOG = 2048
_RESTART_SECONDS = 1.0
_SPARE_FILES = 256
"""Open files of a process beside its clients' connections."""


class WorkerFailed(SkialithError):
    """A worker ended before it served, and could not say why."""


def serve(config: Config, sidecar: SidecarConfig, on_up: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; a second one of them ends the process at once.

    ``on_up`` is called with the URL when all workers serve. Raises ``ConfigurationError``, also for an address that is in use,
    ``WalUnavailable`` when the log is away at the start, or :class:`WorkerFailed`.
    """
    _check_tls(sidecar)
    with _bound(sidecar) as sock:
        host, port = sock.getsockname()[:2]
        scheme = "https" if sidecar.tls_cert else "http"
        up = partial(on_up, f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")
        _allow_connections()
        if sidecar.workers == 1:
            _alone(config, sidecar, sock, up)
        else:
            _several(config, sidecar, sock, up)


# ---- the socket


def _bound(sidecar: SidecarConfig) -> socket.socket:
    where = f"{sidecar.host} port {sidecar.port}"
    try:
        found = socket.getaddrinfo(sidecar.host, sidecar.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigurationError(f"--host {sidecar.host}: no such address here ({error})") from error
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)  # not before this is the port ours
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{where} is in use by another process, perhaps another sidecar: stop that one, or give this one another --port "
                "(0 takes any that is free)"
            ) from error
        raise ConfigurationError(f"cannot serve on {where}: {error.strerror}") from error
    return sock


def _check_tls(sidecar: SidecarConfig) -> None:
    if sidecar.tls_cert is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    option = "--tls-cert, --tls-key"
    try:
        context.load_cert_chain(sidecar.tls_cert, sidecar.tls_key, password="")
        if sidecar.tls_client_ca is not None:
            option = "--tls-client-ca"
            context.load_verify_locations(sidecar.tls_client_ca)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{option}: {error}; PEM files are wanted, the key without a password") from error


def _allow_connections() -> None:
    """Raise the soft limit of open files to what our own limit of connections needs, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONCURRENT_REQUESTS + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _settings(app: Callable[[], ASGIApp], sidecar: SidecarConfig) -> uvicorn.Config:
    from .protocol import Protocol

    return uvicorn.Config(
        app,
        factory=True,
        workers=sidecar.workers,
        loop="uvloop",
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=int(IDLE_CONNECTION_SECONDS),
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        timeout_worker_healthcheck=WORKER_HANGS_SECONDS,
        ssl_certfile=sidecar.tls_cert,
        ssl_keyfile=sidecar.tls_key,
        ssl_ca_certs=sidecar.tls_client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if sidecar.tls_client_ca else ssl.CERT_NONE,
    )


# ---- one process


class _Server(uvicorn.Server):
    """Ends with exit code 0 after the first signal, and by the second one itself."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit:
            _die_of(sig)
        self.should_exit = True


def _die_of(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _alone(config: Config, sidecar: SidecarConfig, sock: socket.socket, up: Callable[[], None]) -> None:
    errors: list[SkialithError] = []

    def report(error: SkialithError | None) -> None:
        if error is None:
            up()
        else:
            errors.append(error)

    share_metrics(None)
    try:
        _Server(_settings(partial(_Reporting, config, sidecar, report), sidecar)).run(sockets=[sock])
    except SystemExit:
        raise _first(errors) from None


def _first(errors: list[SkialithError]) -> SkialithError:
    return errors[0] if errors else WorkerFailed("the sidecar could not start; its log says why")


class _Reporting:
    """The application, which reports whether it started; an error goes there and not as a traceback into the log."""

    def __init__(self, config: Config, sidecar: SidecarConfig, report: Report) -> None:
        from .app import create  # where prometheus_client is imported, which looks where to count

        self._app = create(config, sidecar)
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        started = False

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "lifespan.startup.failed":
                return  # with a traceback; what is raised next says it better
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                started = True
                log.info("serving", extra={"worker": os.getpid()})
                self._report(None)

        try:
            await self._app(scope, receive, told)
        except SkialithError as error:
            if started:
                raise
            logging.getLogger("uvicorn.error").disabled = True  # it has nothing to add
            self._report(error)
            await send({"type": "lifespan.startup.failed", "message": ""})


# ---- several processes


@dataclass(slots=True)
class _Reports:
    """The way by which workers tell their supervisor what became of their start. ``served``: whether one of them ever did."""

    sender: Connection
    lock: Lock
    served: Event

    def send(self, report: SkialithError | None) -> None:
        with self.lock:
            self.sender.send(report)


def _several(config: Config, sidecar: SidecarConfig, sock: socket.socket, up: Callable[[], None]) -> None:
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    reports = _Reports(sender, spawn.Lock(), spawn.Event())
    errors: list[SkialithError] = []
    failed = True
    listener = threading.Thread(target=_listen, args=(receiver, sidecar.workers, up, errors), daemon=True)
    try:
        with tempfile.TemporaryDirectory(prefix="skialith-metrics-", ignore_cleanup_errors=True) as folder, sender:
            share_metrics(folder)
            workers = _Workers(_settings(partial(_worker_app, config, sidecar, reports), sidecar), [sock])
            listener.start()
            try:
                workers.run()
            finally:
                workers.kill_all()
                failed = workers.failed
    except _Killed as killed:
        _die_of(killed.number)
    listener.join()  # it ends when nobody is left who could send
    if errors or failed:
        raise _first(errors)


def _listen(receiver: Connection, expected: int, up: Callable[[], None], errors: list[SkialithError]) -> None:
    serving = 0
    while True:
        try:
            report = receiver.recv()
        except EOFError:
            return
        if report is not None:
            logging.getLogger("uvicorn.error").disabled = True  # it only says that it stops
            errors.append(report)
            continue
        serving += 1
        if serving == expected:
            up()


class _Killed(BaseException):
    """The second signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Workers(Multiprocess):
    """Replaces workers that die; ends when one cannot start, or by a signal, of which the second one kills."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self._told = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def failed(self) -> bool:
        """Whether it ended by itself."""
        return not self._told

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._told:
            raise _Killed(number)
        self._told = True
        self.signal_queue.append(number)

    def terminate_all(self) -> None:
        for sock in self.sockets:
            sock.close()  # connections are taken for as long as anybody has it open
        super().terminate_all()

    def keep_subprocess_alive(self) -> None:
        for worker in self.processes:
            worker.child_conn.close()  # while it is open here too, the death of a worker that is asked goes unnoticed
        super().keep_subprocess_alive()

    def kill_all(self) -> None:
        """End whatever still runs, at once."""
        for worker in self.processes:
            if worker.process.is_alive():
                worker.process.kill()


def _worker_app(config: Config, sidecar: SidecarConfig, reports: _Reports) -> ASGIApp:
    """What a worker serves; made in the worker."""
    logs.install(sidecar)
    threading.Thread(target=_end_with_parent, name="skialith-orphan", daemon=True).start()

    def report(error: SkialithError | None) -> None:
        if error is None:
            reports.served.set()
        elif error.retryable and reports.served.is_set():
            # The settings are fine, something is away for now: the others go on, and this one is tried again.
            log.error("a worker could not start, the next try follows: %s", error)
            time.sleep(_RESTART_SECONDS)
            os._exit(1)
        reports.send(error)

    return _Reporting(config, sidecar, report)


def _end_with_parent() -> None:
    """A supervisor that was killed leaves workers that hold its port: they end as if told to."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(metrics_folder() or "", ignore_errors=True)  # counting goes on in files that are open
        os.kill(os.getpid(), signal.SIGTERM)
