"""The doctor's look at the database: what it takes, which log feeds it, and what that log has lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from .cli_show import plural, printable, span, when
from .cli_sql import sqlite_file
from .config import Config
from .errors import SkialithError
from .findings import CLOCK_WARN_SECONDS, Finding
from .losses import Loss, losses
from .records import Position
from .stores import open_store
from .stores.base import Store
from .wal.continuity import shown

GoesOn: TypeAlias = Callable[[int], Position]

_SET_BACK = (
    "set it by NTP, in small steps. Until it has caught up, histories show what is saved now before what stands ahead, and what "
    "a writer held that died waits: delete the consumers `writer` and `trace_ingest` of the stream, they are made anew"
)
_WHAT_IS_LOST = (
    "each of these is a record that is lost, or a lease or a part of a large record, which have no rows. What was acknowledged\n"
    "in that time behind the last row of before shows nowhere here: processes that live on name theirs in their logs and by\n"
    "`RecordsLost` of their next flush(). Save again what is missing, the same event ids are safe: docs/PRODUCTION.md"
)


def examine_database(config: Config, wal_id: str | None, goes_on: GoesOn) -> Iterator[Finding]:
    """Reachable, migrated, writable, bound to this log, and whether the log went back. ``goes_on``: where the log goes on."""
    if (file := sqlite_file(config)) is not None and not file.exists():
        detail = f"{file} is not there yet; the first writer makes it"
        yield Finding("database", "warn", detail, "start `skialith writer`, or an agent with writer on")
        return
    try:
        store = open_store(config.store_url, power=config.durability == "power")
    except SkialithError as error:
        yield Finding("database", "fail", str(error), "correct SKIALITH_DATABASE_URL")
        return
    try:
        yield from _store(config, store, wal_id, goes_on)
    finally:
        store.close()


def _store(config: Config, store: Store, wal_id: str | None, goes_on: GoesOn) -> Iterator[Finding]:
    if (error := _failing(store.ping)) is not None:
        fix = "start it or correct SKIALITH_DATABASE_URL; until then records are safe in the log"
        yield Finding("database", "fail", f"{printable(store.url)} does not answer: {error}", fix)
        return
    yield Finding("database", "ok", printable(store.url))
    if (error := _failing(partial(store.counts, config.namespace))) is not None:
        fix = "run `skialith migrate` if the database is new (the first writer does it too)"
        yield Finding("tables", "warn", f"the tables cannot be read: {error}", fix)
        return
    if (error := _failing(store.probe)) is not None:
        fix = "records wait in the log until this is mended"
        yield Finding("tables", "fail", f"the database takes no rows: {error}", fix)
        return
    counts = store.counts(config.namespace)
    yield Finding("tables", "ok", f"migrated and writable; {plural(counts.events, 'event')} in this namespace")
    bound = store.bound_wal(config.namespace)
    yield _binding(config, bound, wal_id)
    if bound is not None and bound == wal_id:
        yield from _losses(config, store, goes_on)
    yield from _order(config, store)
    if counts.dead_letters:
        fix = "`skialith dead-letters list` shows them; replay or discard them"
        yield Finding("dead letters", "warn", f"{counts.dead_letters:,} in the table", fix)


def _order(config: Config, store: Store) -> Iterator[Finding]:
    """Whether stored records stand ahead of this clock."""
    ahead = Position(time.time_ns() + int(CLOCK_WARN_SECONDS * 1e9), 0)
    if (later := store.traces(config.namespace, after=ahead, limit=1)[0]) != []:
        text = f"records stand up to {span((later[0].position.time_ns - time.time_ns()) / 1e9)} or more ahead of this clock"
        yield Finding("order", "warn", f"{text}: the clock of the log's server was set back, or is ahead", _SET_BACK)


def _binding(config: Config, bound: str | None, wal_id: str | None) -> Finding:
    """A database remembers which log feeds a namespace, and refuses another one."""
    if bound is None:
        return Finding("binding", "ok", f"no log feeds the namespace {config.namespace} yet; the first writer's will")
    if wal_id is None or bound == wal_id:
        return Finding("binding", "ok", f"fed by {bound}")
    return Finding(
        "binding",
        "fail",
        f"the namespace {config.namespace} is fed by {bound}, and this log is {wal_id}: nothing is stored",
        "use the server or directory of before, or another namespace; if the old log is gone for good: "
        "`skialith migrate --adopt-wal` (what the old one held that was not stored is lost; the processes that wrote it name it)",
    )


def _losses(config: Config, store: Store, goes_on: GoesOn) -> Iterator[Finding]:
    """Whether the log came back older, once or now, and what that lost."""
    try:
        found = list(losses(store, config.namespace, goes_on))
    except SkialithError as error:
        yield Finding("losses", "warn", f"whether the log ever went back cannot be told: {error}", "try again")
        return
    if not found:
        yield Finding("losses", "ok", "no record is known to be lost: the log goes on where the database's rows end")
    for loss in found:
        yield Finding("losses", "warn", _went_back(loss), _WHAT_IS_LOST)


def _went_back(loss: Loss) -> str:
    missing = sum(run[2] for run in loss.missing)
    between = (
        f"{plural(missing, 'sequence')} between have no row: {shown(loss.missing)}{'' if loss.whole else ', and more'}"
    )
    return (
        f"between {when(loss.before.time_ns // 1000)} and {when(loss.after.time_ns // 1000)} the log went back from sequence "
        f"{loss.before.seq} or later to {loss.after.seq - 1} or before: {between if missing else 'all between have their rows'}"
    )


def _failing(call: Callable[[], object]) -> SkialithError | None:
    try:
        call()
    except SkialithError as error:
        return error
    return None
