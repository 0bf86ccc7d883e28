"""Dead letters of both places: found, shown as JSON, stored after all, or given up.

A dead letter is kept in the table ``dead_letters``, or in the stream of the log behind it when the table did not take it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from . import trace_json
from .errors import ConfigurationError, InvalidArgument, SkialithError, StoreUnavailable
from .records import DeadLetter, Kind, Record, decode_record, iso
from .runtime import Runtime
from .stores.base import LetterPlace
from .writer.sinks import trace_of

_PAGE = 500
_KINDS: dict[int, str] = {Kind.EVENT: "event", Kind.CHECKPOINT: "checkpoint"}
"""What ``kind`` is in JSON; of a graph's record it is the operation on its thread."""


class NoSuchLetter(SkialithError):
    """There is no dead letter with this id (any more)."""


class Found(NamedTuple):
    """A dead letter and where it is kept: the table ``dead_letters``, or the stream of the log behind it."""

    letter: DeadLetter
    place: Literal["table", "stream"]

    @property
    def id(self) -> str:
        """``<sink>/<key in hex>``, unique among dead letters."""
        return f"{self.letter.sink}/{self.letter.key.hex()}"

    @property
    def at(self) -> LetterPlace:
        """Where it stands among the others."""
        return LetterPlace(self.letter.position, self.letter.sink, self.letter.key)


# ---- finding them


def page(engine: Runtime, after: LetterPlace | None, limit: int) -> tuple[list[Found], LetterPlace | None]:
    """Dead letters behind ``after``, oldest first, at most ``limit``, without payloads; and where to go on, None if these are
    the last.

    One that is kept in both places (after a crash in the midst of a replay) is listed once. Raises ``StoreUnavailable``.
    """
    found = [Found(letter, "stream") for letter in _in_stream(engine, whole=False)]
    rows = engine.store.dead_letters(engine.config.namespace, after=after, limit=limit + 1, whole=False)
    found.extend(Found(letter, "table") for letter in rows)
    places = {each.at: each for each in found if after is None or each.at > after}
    listed = [places[at] for at in sorted(places)[: limit + 1]]
    return listed[:limit], listed[limit - 1].at if len(listed) > limit else None


def every(engine: Runtime, limit: int | None, *, whole: bool = True) -> tuple[list[Found], StoreUnavailable | None]:
    """Dead letters of both places, oldest first; and why the table could not be read, if it could not."""
    unread = None
    found = [Found(letter, "stream") for letter in _in_stream(engine, whole)]
    try:
        found.extend(Found(letter, "table") for letter in islice(_in_table(engine, whole), limit))
    except StoreUnavailable as error:
        unread = error
    return sorted(found, key=lambda each: each.at)[:limit], unread


def one(engine: Runtime, sink: str, key: bytes) -> list[Found]:
    """The dead letter with this sink and key, once for each place that keeps it; the table's first.

    Raises ``NoSuchLetter``, or ``StoreUnavailable`` when the table cannot be read.
    """
    deadline = time.monotonic() + engine.config.timeout
    in_stream = engine.wal.dead_letter(sink, key, deadline)
    in_table = engine.store.dead_letter(sink, key)
    found = []
    if in_table is not None and in_table.namespace == engine.config.namespace:
        found.append(Found(in_table, "table"))
    if in_stream is not None:
        found.append(Found(in_stream, "stream"))
    if not found:
        raise NoSuchLetter(
            f"no dead letter {f'{sink}/{key.hex()}'!r} in the namespace {engine.config.namespace!r}: it was replayed or "
            "discarded, or never was one"
        )
    return found


def _in_stream(engine: Runtime, whole: bool) -> list[DeadLetter]:
    return engine.wal.dead_letters(time.monotonic() + engine.config.timeout, whole=whole)


def _in_table(engine: Runtime, whole: bool) -> Iterator[DeadLetter]:
    after: LetterPlace | None = None
    while True:
        letters = engine.store.dead_letters(engine.config.namespace, after=after, limit=_PAGE, whole=whole)
        yield from letters
        if not letters:
            return
        after = Found(letters[-1], "table").at


# ---- what becomes of them


def replay(engine: Runtime, found: Found) -> None:
    """Store it after all, and remove it from where it is kept.

    Raises ``InvalidArgument`` if there is nothing to store, ``StoreDataError`` if the database refuses it again,
    ``StoreUnavailable``, and ``ConfigurationError`` for a letter of the stream if this database is not the log's.
    """
    letter = found.letter
    is_trace = letter.sink == "trace_ingest"
    record = letter.record or _decoded(letter)
    if record.body is None and not is_trace:
        raise InvalidArgument("the body of the record is lost, so there is nothing to store; discard it")
    if found.place == "stream":
        _check_binding(engine)
    engine.store.replay_dead_letter(letter, None if is_trace else record, trace_of(record) if is_trace else None)
    if found.place == "stream":
        _remove_from_stream(engine, letter)


def _decoded(letter: DeadLetter) -> Record:
    """The record in a message that could not be decoded when it was given up; a later version may be able to."""
    try:
        return decode_record(letter.namespace, letter.raw, letter.position)
    except ValueError as error:
        text = f"the message does not decode as a record ({error}), so there is nothing to store; discard it"
        raise InvalidArgument(text) from error


def _check_binding(engine: Runtime) -> None:
    """A letter leaves the log only for the database that this log feeds: in another one it would be lost."""
    wal_id = engine.wal.stream.wal_id
    if engine.store.bound_wal(engine.config.namespace) != wal_id:
        raise ConfigurationError(
            f"the database {engine.store.url} is not fed by the log {wal_id}: give --database-url of the writer of this log"
        )


def discard(engine: Runtime, found: Found) -> None:
    """Remove it for good: for a record this is the last copy."""
    if found.place == "table":
        engine.store.discard_dead_letter(found.letter.sink, found.letter.key)
    else:
        _remove_from_stream(engine, found.letter)


def _remove_from_stream(engine: Runtime, letter: DeadLetter) -> None:
    timeout = engine.config.timeout
    deadline = time.monotonic() + timeout
    engine.wal.call(lambda: engine.wal.dead.discard(letter.sink, letter.key, deadline), timeout)


# ---- telling of them


def document(found: Found) -> dict[str, Any]:
    """Everything but the payload, in JSON's types."""
    letter, record = found.letter, found.letter.record
    kind = None if record is None else _KINDS.get(record.kind, record.event_type)
    return {
        "id": found.id,
        "kept_in": found.place,
        "sink": letter.sink,
        "agent_id": None if record is None else record.agent_id,
        "kind": kind,
        "event_id": record.record_id if record is not None and kind == "event" else None,
        "step_index": None if record is None else record.step_index,
        "cursor": letter.position.cursor(),
        "error": letter.error,
        "error_code": letter.error_code,
        "given_up_at": iso(letter.dead_us),
        "decodes": record is not None,
    }


def payload(letter: DeadLetter) -> str:
    """The JSON text of the payload; ``null`` when there is no record, or its body is lost."""
    return "null" if letter.record is None or letter.record.body is None else trace_json.shown(letter.record)
