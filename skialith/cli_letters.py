"""The dead-letters commands: look at what the database refused, store it after all, or give it up."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from . import letters
from .cli_settings import changing, looking, takes_settings
from .cli_show import console, emit, facts, note, plural, printable, say, table, when
from .cli_show import show as show_table
from .config import Config
from .errors import ConfigurationError, InvalidArgument, SkialithError, StoreUnavailable
from .letters import Found, NoSuchLetter
from .records import DeadLetter, Kind
from .runtime import Runtime

app = typer.Typer(no_args_is_help=True, help="What the database refused: list, show, replay, discard.")

Json = Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.")]
Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID...", help="As `list` shows them; the first characters will do.", show_default=False),
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]

_PEOPLE_LETTERS = 100


# ---- the commands


@app.command("list")
@takes_settings
def list_letters(
    config: Config,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many (default 100; --json: all).")
    ] = None,
    as_json: Json = False,
) -> None:
    """List dead letters, oldest first, from the table and from the log."""
    wanted = limit if as_json or limit else _PEOPLE_LETTERS
    with looking(config) as engine:
        found, unread = letters.every(engine, None if wanted is None else wanted + 1, whole=False)
    more = wanted is not None and len(found) > wanted
    found = found[:wanted]
    if as_json:
        emit([letters.document(each) for each in found])
    elif found:
        rows = table("ID", "AGENT", "RECORD", "GIVEN UP", "IN", "WHY")
        for each in found:
            rows.add_row(
                each.id,
                printable(_agent(each)),
                printable(_record(each)),
                when(each.letter.dead_us),
                each.place,
                printable(each.letter.error),
            )
        show_table(rows)
        note(
            "`skialith dead-letters replay ID` stores one after all, when what was wrong is mended; `discard ID` drops it"
        )
    else:
        say(f"no dead letters in the namespace {config.namespace}")
    if more:
        note(f"more than {wanted} of them: --limit shows more")
    _warn_unread(unread)


@app.command()
@takes_settings
def show(config: Config, letter_id: Annotated[str, typer.Argument(metavar="ID")], as_json: Json = False) -> None:
    """Show one dead letter: the record, its payload, and the error."""
    with looking(config) as engine:
        found = _chosen(engine, [letter_id])[0]
    if as_json:
        emit({**letters.document(found), "data": _data(found.letter), "raw_hex": found.letter.raw.hex()})
        return
    letter = found.letter
    rows: list[tuple[str, Any]] = [
        ("id", found.id),
        ("kept in", "the table dead_letters" if found.place == "table" else "the log's dead-letter stream"),
        ("refused by", letter.sink),
        ("agent", printable(_agent(found))),
        ("record", printable(_record(found))),
        ("saved", when(letter.position.time_ns // 1000)),
        ("position", letter.position.cursor()),
        ("given up", when(letter.dead_us)),
        ("error", printable(f"{letter.error} (code {letter.error_code})" if letter.error_code else letter.error)),
    ]
    show_table(facts(rows))
    if letter.record is None:
        note(f"the message does not decode as a record ({len(letter.raw)} bytes, in --json); it cannot be replayed")
    else:
        say(json.dumps(_data(letter), indent=2, ensure_ascii=False))


@app.command()
@takes_settings
def replay(config: Config, ids: Ids = None, everything: All = False) -> None:
    """Store dead letters after all, and remove them from where they were kept."""
    _check_selection(ids, everything)
    with changing(config) as engine:
        found = _selected(engine, ids)
        failures = _each(found, "storing", lambda each: letters.replay(engine, each))
    _report("stored", found, failures)


@app.command()
@takes_settings
def discard(
    config: Config,
    ids: Ids = None,
    everything: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Give dead letters up for good: for a record this is the last copy."""
    _check_selection(ids, everything)
    with changing(config) as engine:
        found = _selected(engine, ids)
        if found and not yes:
            if not sys.stdin.isatty():
                raise InvalidArgument(
                    "discard asks before it removes a last copy, and here is nobody to ask: give --yes"
                )
            question = f"Remove {plural(len(found), 'dead letter')} for good? They are the last copy of these records."
            typer.confirm(question, abort=True)
        failures = _each(found, "discarding", lambda each: letters.discard(engine, each))
    _report("discarded", found, failures)


# ---- what they do


def _each(found: list[Found], doing: str, act: Callable[[Found], None]) -> list[tuple[Found, SkialithError]]:
    """Do it to each, showing progress when there are many; what fails is kept and the rest goes on."""
    failures: list[tuple[Found, SkialithError]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    screen = console(error=True)
    with Progress(
        *columns, console=screen, transient=True, disable=not screen.is_terminal or len(found) < 2
    ) as progress:
        task = progress.add_task(doing, total=len(found))
        for each in found:
            try:
                act(each)
            except (StoreUnavailable, ConfigurationError):
                raise  # it is the same for the others; what is done stays done
            except SkialithError as error:
                failures.append((each, error))
            progress.advance(task)
    return failures


def _report(done: str, found: list[Found], failures: list[tuple[Found, SkialithError]]) -> None:
    say(f"{done}: {plural(len(found) - len(failures), 'dead letter')}")
    for each, error in failures:
        say(f"not {done}: {each.id}: {printable(str(error))}", style="red", error=True)
    if failures:
        raise typer.Exit(1)


# ---- finding them


def _check_selection(ids: list[str] | None, everything: bool) -> None:
    if bool(ids) == everything:
        raise InvalidArgument("give the ids of dead letters (`skialith dead-letters list`), or --all")


def _selected(engine: Runtime, ids: list[str] | None) -> list[Found]:
    """Those with these ids, or all."""
    if ids:
        return _chosen(engine, ids)
    found, unread = letters.every(engine, None)
    if unread is not None:
        raise unread
    return found


def _chosen(engine: Runtime, ids: list[str]) -> list[Found]:
    """The dead letters with these ids; the first characters of an id, or of its key, are enough if they fit one."""
    found, unread = letters.every(engine, None)
    chosen: list[Found] = []
    for wanted in ids:
        matching = [each for each in found if each.id.startswith(wanted) or each.letter.key.hex().startswith(wanted)]
        # One letter can be kept in both places, after a crash between two steps of a replay.
        different = len({each.id for each in matching})
        if different > 1:
            raise InvalidArgument(f"{different} dead letters begin with {wanted!r}: give more of the id")
        if not matching:
            if unread is not None:
                raise unread
            raise NoSuchLetter(f"no dead letter {wanted!r} in the namespace: `skialith dead-letters list` shows them")
        chosen.extend(each for each in matching if each not in chosen)
    return chosen


def _warn_unread(unread: StoreUnavailable | None) -> None:
    if unread is not None:
        say(
            f"the table dead_letters was not read, so this is the log's part alone: {unread}",
            style="yellow",
            error=True,
        )
        raise typer.Exit(1)


# ---- telling of them


def _agent(found: Found) -> str:
    return found.letter.record.agent_id if found.letter.record is not None else "(unknown)"


def _record(found: Found) -> str:
    record = found.letter.record
    if record is None:
        return "(does not decode)"
    if record.kind == Kind.CHECKPOINT:
        return f"checkpoint of step {record.step_index}"
    if record.kind == Kind.GRAPH:
        return f"{record.event_type} on a thread"
    return f"event {record.record_id}" if found.letter.sink == "writer" else f"trace of event {record.record_id}"


def _data(letter: DeadLetter) -> Any:
    return json.loads(letters.payload(letter))
