"""The command line: puts the commands together, and turns errors into one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import time
from importlib import import_module
from typing import Annotated

import typer

from . import cli_letters, cli_read, cli_serve
from .cli_bench import bench
from .cli_demo import demo
from .cli_settings import changing, common_settings, takes_settings
from .cli_show import console, emit, plural, printable, say
from .config import Config
from .doctor import examine
from .errors import ConfigurationError, InvalidArgument, SkialithError
from .sidecar.command import serve
from .stores import open_store

app = typer.Typer(
    name="skialith",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LEVEL_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def _version(wanted: bool) -> None:
    if wanted:
        say(f"skialith {import_module('skialith').__version__}")
        raise typer.Exit


@app.callback()
@common_settings
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and stop.")
    ] = False,
) -> None:
    """The write-ahead log for AI agents."""


@takes_settings
def migrate(
    config: Config,
    adopt_wal: Annotated[
        bool, typer.Option("--adopt-wal", help="Let this log feed the namespace from now on, in place of another one.")
    ] = False,
) -> None:
    """Bring the database's schema up to date.

    The first writer does it too; any number of processes may do it at once.
    """
    store = open_store(config.store_url, power=config.durability == "power")
    try:
        with console(error=True).status(f"migrating {store.url}"):
            applied = store.migrate()
    finally:
        store.close()
    names = ", ".join(f"{number:04d}" for number in applied)
    say(
        f"{store.url}: applied {plural(len(applied), 'migration')} ({names})" if applied else f"{store.url}: up to date"
    )
    if adopt_wal:
        with changing(config) as engine:
            wal_id = engine.wal.stream.wal_id
            engine.store.bind_wal(config.namespace, wal_id, adopt=True)
        say(f"the namespace {config.namespace} is fed by {wal_id} from now on")


@takes_settings
def traces(
    config: Config,
    switch: Annotated[str, typer.Argument(metavar="on|off", help="Whether events become rows of agent_traces.")],
) -> None:
    """Switch agent_traces on or off for a namespace."""
    if switch not in ("on", "off"):
        raise InvalidArgument(f"traces {switch!r}: use on or off", argument="switch")
    with changing(config) as engine:
        stream, timeout = engine.wal.stream, config.timeout
        engine.wal.call(lambda: stream.set_traces(switch == "on", time.monotonic() + timeout), timeout)
    say(f"traces are {switch} for the namespace {config.namespace}; running writers follow within seconds")


@takes_settings
def doctor(config: Config, as_json: cli_read.Json = False) -> None:
    """Check everything, and say what to do about what is wrong.

    It changes nothing. Exit code 1 if a check fails.
    """
    findings = []
    for finding in examine(config):
        findings.append(finding)
        if as_json:
            continue
        say(f"{finding.level:<5}", style=_LEVEL_STYLES[finding.level], end="")
        say(f"{finding.check:<20} {printable(finding.detail)}")
        if finding.fix:
            for line in finding.fix.splitlines():
                say(f"{'':<25} -> {line}")
    if as_json:
        emit([finding._asdict() for finding in findings])
    failed = sum(finding.level == "fail" for finding in findings)
    if not as_json:
        warned = sum(finding.level == "warn" for finding in findings)
        found = [plural(count, name) for count, name in ((failed, "failure"), (warned, "warning")) if count]
        say(f"\n{' and '.join(found) or 'all is well'}")
    if failed:
        raise typer.Exit(1)


_IN_ORDER = (
    *(demo, cli_serve.up, cli_serve.writer, serve),
    *(cli_read.status, cli_read.agents, cli_read.history, cli_read.state),
    *(doctor, bench, migrate, traces),
)
for _command in _IN_ORDER:
    app.command()(_command)
app.add_typer(cli_letters.app, name="dead-letters")


# ---- running it


def main() -> None:
    """The entry point. Exit codes: 0 done, 1 it failed, 2 the command or a setting is wrong, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        app(prog_name="skialith")
    except (ConfigurationError, InvalidArgument) as error:
        _fail(error, 2)
    except SkialithError as error:
        _fail(error, 1)
    except BrokenPipeError:
        _closed_pipe()
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: SkialithError, code: int) -> None:
    say(f"error: {error}", style="red", error=True)
    sys.exit(code)


def _closed_pipe() -> None:
    """Whoever read our output has enough (`| head`); Python would complain of that once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


if __name__ == "__main__":
    main()
