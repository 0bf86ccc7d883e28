"""The command ``skialith serve``; what it runs is imported when it does."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..cli_settings import takes_settings
from ..cli_show import plural, say
from ..config import Config
from ..errors import ConfigurationError
from ..stores import open_store
from ..urls import redact
from .config import BODY_BYTES, DEFAULT_HOST, DEFAULT_PORT, LAG_RECORDS, LAG_SECONDS, LOG_FORMATS, SidecarConfig, load

log = logging.getLogger("skialith.sidecar")

_PANEL = "HTTP (each has its SKIALITH_HTTP_* variable; the token is SKIALITH_TOKEN)"


def _option(name: str, text: str, metavar: str | None = None) -> typer.models.OptionInfo:
    option = typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=_PANEL)
    assert isinstance(option, typer.models.OptionInfo)
    return option


@takes_settings
def serve(
    config: Config,
    host: Annotated[str | None, _option("--host", f"Address to serve on (default: {DEFAULT_HOST}).")] = None,
    port: Annotated[int | None, _option("--port", f"0: any that is free (default: {DEFAULT_PORT}).")] = None,
    workers: Annotated[int | None, _option("--workers", "Processes (default: 1).")] = None,
    insecure: Annotated[
        bool | None, _option("--insecure", "Serve without a token on an address that others reach.")
    ] = None,
    token_file: Annotated[
        str | None, _option("--token-file", "File that holds the token, in place of SKIALITH_TOKEN.", "PATH")
    ] = None,
    body_bytes: Annotated[
        int | None, _option("--body-bytes", f"Largest body of a request (default: {BODY_BYTES}).")
    ] = None,
    lag_records: Annotated[
        int | None, _option("--lag-records", f"Not ready when more records wait (default: {LAG_RECORDS}).")
    ] = None,
    lag_seconds: Annotated[
        float | None, _option("--lag-seconds", f"Not ready when one waits longer (default: {LAG_SECONDS:g}).")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, _option("--cors-origin", "Origin whose pages may call; may be repeated.", "URL")
    ] = None,
    tls_cert: Annotated[str | None, _option("--tls-cert", "Certificate with its chain, PEM.", "PATH")] = None,
    tls_key: Annotated[str | None, _option("--tls-key", "Its key, PEM.", "PATH")] = None,
    tls_client_ca: Annotated[
        str | None, _option("--tls-client-ca", "Only clients with a certificate of it, PEM.", "PATH")
    ] = None,
    log_format: Annotated[
        str | None, _option("--log-format", "auto: JSON unless stderr is a terminal.", "|".join(LOG_FORMATS))
    ] = None,
    access_log: Annotated[bool | None, _option("--access-log", "A line for every request.")] = None,
) -> None:
    """Serve the HTTP API, with the writer, for agents in any language (extra: sidecar).

    It runs in the foreground until SIGTERM or Ctrl-C: requests under way are answered, what is durable is stored (bounded), and
    the exit code is 0. A second signal ends it at once; what is not stored yet is safe in the log.
    """
    sidecar = load(
        host=host,
        port=port,
        workers=workers,
        insecure=insecure,
        token=None if token_file is None else _token(token_file),
        body_bytes=body_bytes,
        lag_records=lag_records,
        lag_seconds=lag_seconds,
        cors_origins=tuple(cors_origin) if cors_origin else None,
        tls_cert=tls_cert,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        log_format=log_format,
        access_log=access_log,
    )
    _serve(replace(config, writer="on"), sidecar)


def _token(path: str) -> str:
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--token-file {path}: {error}") from error
    if not token:
        raise ConfigurationError(f"--token-file {path} is empty")
    return token


def _serve(config: Config, sidecar: SidecarConfig) -> None:
    try:
        from . import logs, server
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("skialith"):
            raise
        raise ConfigurationError(f"`skialith serve` needs {error.name}: pip install 'skialith[sidecar]'") from error
    logs.install(sidecar)
    if not sidecar.loopback and sidecar.token is None:
        log.warning("--insecure: whoever reaches %s can read and write everything", sidecar.host)

    store = open_store(config.store_url)
    source = f"the embedded server in {config.directory}" if config.embedded else redact(config.nats_url or "")

    def up(url: str) -> None:
        say(f"Skialith serves {url} ({plural(sidecar.workers, 'worker')})", style="bold green")
        say(f"  namespace {config.namespace}, log: {source}, database: {store.url}")
        say("Ctrl-C stops it; what is acknowledged stays.")

    server.serve(config, sidecar, up)
    say("stopped")
