"""What every command starts from: the settings as options, and the log and database that they name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from .agent import SkialithAgent
from .cli_show import note
from .cli_sql import sqlite_file
from .config import Config, load
from .errors import ConfigurationError, SkialithError
from .runtime import Runtime, acquire
from .stores import open_store
from .wal.local_files import STORE_FOLDER

_PANEL = "Settings (before or behind the command; each has its SKIALITH_* variable)"


def _option(name: str, metavar: str, text: str, kind: Any = str) -> Any:
    option = typer.Option(f"--{name}", metavar=metavar, help=text, show_default=False, rich_help_panel=_PANEL)
    return Annotated[kind | None, option]


SETTINGS: dict[str, Any] = {
    "nats_url": _option("nats-url", "URL", "NATS server(s) with JetStream; without it a private embedded server."),
    "database_url": _option("database-url", "URL", "mysql://user:pass@host/db or sqlite:///path; without it SQLite."),
    "namespace": _option("namespace", "NAME", "One log and one set of rows (default: default)."),
    "directory": _option("directory", "PATH", "Embedded server and SQLite file (default: .skialith)."),
    "durability": _option("durability", "process|power", "What an acknowledged record survives (default: process)."),
    "timeout": _option("timeout", "SECONDS", "How long a call may take (default: 10).", float),
}
"""The options that every command takes, by the name of the setting."""


class NothingHere(SkialithError):
    """The command looks at an embedded log, and there is none."""


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the settings as options; it is called with the ``Config`` first, writer off.

    Given to the command they win over those given before it, and these over the environment. A command with a parameter
    ``given`` gets the names of the settings that were options.
    """
    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    wants_given = any(parameter.name == "given" for parameter in own)
    own = [parameter for parameter in own if parameter.name != "given"]

    def run(ctx: typer.Context, **values: Any) -> None:
        settings: dict[str, Any] = dict(ctx.find_root().obj or {})
        settings.update({name: value for name in SETTINGS if (value := values.pop(name)) is not None})
        if wants_given:
            values["given"] = frozenset(settings)
        command(load(**{**settings, "writer": "off"}), **values)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = inspect.Signature([context, *own, *_parameters()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def common_settings(callback: Callable[..., None]) -> Callable[..., None]:
    """Give the program itself the settings as options; they count for whichever command follows."""
    own = list(inspect.signature(callback, eval_str=True).parameters.values())

    def run(ctx: typer.Context, **values: Any) -> None:
        given = {name: values.pop(name) for name in SETTINGS}
        ctx.obj = {name: value for name, value in given.items() if value is not None}
        callback(**values)

    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    run.__signature__ = inspect.Signature([context, *own, *_parameters()])  # type: ignore[attr-defined]
    run.__name__, run.__doc__ = callback.__name__, callback.__doc__
    return run


def _parameters() -> list[inspect.Parameter]:
    return [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in SETTINGS.items()
    ]


@contextmanager
def looking(config: Config) -> Iterator[Runtime]:
    """The engine to look with: no writer runs here, and nothing is made that was not there.

    An embedded server that does not run is started, and stops when nobody uses it any more. In place of a SQLite file
    that is not there an empty one is read. Raises as :func:`changing`.
    """
    check_something_here(config)
    with ExitStack() as stack:
        file = sqlite_file(config)
        absent = file is not None and not file.exists()
        if absent:
            config = replace(config, database_url=stack.enter_context(_empty_database()))
        engine = stack.enter_context(changing(config))
        if absent:
            note(
                f"there is no database at {file} yet, so this is the log alone; if yours is elsewhere give --database-url"
            )
        yield engine


@contextmanager
def changing(config: Config) -> Iterator[Runtime]:
    """The engine of a log that is there, to change something by hand; no writer runs here.

    Raises :class:`NothingHere`, ``WalError`` when the namespace has no log, and what opening a ``SkialithAgent`` raises.
    """
    check_something_here(config)
    engine = acquire(config, create=False)
    try:
        yield engine
    finally:
        engine.release()


@contextmanager
def _empty_database() -> Iterator[str]:
    with TemporaryDirectory(prefix="skialith-") as folder:
        url = f"sqlite:///{folder}/empty.db"
        store = open_store(url)
        store.migrate()
        store.close()
        yield url


def agent_of(engine: Runtime, agent_id: str) -> SkialithAgent:
    """The agent, on this engine."""
    return SkialithAgent(agent_id, **asdict(engine.config))


def check_something_here(config: Config) -> None:
    """Raises :class:`NothingHere` when the settings name an embedded log that does not exist."""
    if not config.embedded:
        return
    try:
        os.stat(config.path / STORE_FOLDER)
    except (FileNotFoundError, NotADirectoryError):
        raise NothingHere(
            f"nothing here yet: there is no Skialith log in {config.directory}.\n"
            "To begin: `skialith demo` shows what it does, `skialith up` starts a log here, and so does a program that "
            "opens a SkialithAgent. For a log elsewhere give --directory or --nats-url."
        ) from None
    except OSError as error:
        raise ConfigurationError(f"the directory {config.directory} cannot be read: {error.strerror}") from error
