"""The oracle of ``_rows``: order, rows and the text of an INSERT once more in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from skialith.records import Kind, Record, Trace
from skialith.stores import rows

Row = tuple[Any, ...]

_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - the columns are UTC without a zone
_FIRST, _LAST = datetime(1000, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999)  # noqa: DTZ001
_ESCAPES = {b"\0": b"\\0", b"\n": b"\\n", b"\r": b"\\r", b"\x1a": b"\\Z", b'"': b'\\"', b"'": b"\\'"}


def in_order(items: Sequence[Any]) -> list[Any]:
    """By key, then by position."""
    return sorted(items, key=lambda item: (item.key, item.position))


def of_records(records: Sequence[Record]) -> tuple[list[Row], list[Row]]:
    """Rows of events and of checkpoints."""
    events = [rows.of_record(record)[0] for record in records if record.kind == Kind.EVENT]
    checkpoints = [rows.of_record(record)[0] for record in records if record.kind != Kind.EVENT]
    return events, checkpoints


def of_trace(trace: Trace) -> Row:
    """The row of a trace."""
    return (
        trace.key,
        trace.namespace,
        trace.agent_id,
        trace.event_id,
        trace.step_index,
        trace.event_type,
        trace.payload_json,
        _datetime(trace.created_us),
        _datetime(trace.position.time_ns // 1000),
        *trace.position,
    )


def _datetime(unix_us: int) -> str:
    try:
        moment = _EPOCH + timedelta(microseconds=unix_us)
    except OverflowError:
        moment = _LAST if unix_us > 0 else _FIRST
    return min(max(moment, _FIRST), _LAST).isoformat(sep=" ", timespec="microseconds")


def escaped(data: bytes) -> bytes:
    """As a string literal of a session without NO_BACKSLASH_ESCAPES."""
    data = data.replace(b"\\", b"\\\\")
    for byte, stands in _ESCAPES.items():
        data = data.replace(byte, stands)
    return data


def literal(value: bytes | str | int | None) -> bytes:
    """One value as SQL."""
    if value is None:
        return b"NULL"
    if isinstance(value, bytes):
        return b"_binary'" + escaped(value) + b"'"
    if isinstance(value, str):
        return b"'" + escaped(value.encode()) + b"'"
    return b"%d" % value


def statements(
    head: bytes,
    tail: bytes,
    values: Sequence[Row],
    most_rows: int,
    most_bytes: int,
    repeated: Sequence[int],
    most_characters: int,
) -> list[bytes]:
    """The statements that insert ``values``."""
    made: list[list[bytes]] = []
    for row in values:
        cut = [row[n][:most_characters] if isinstance(row[n], str) else row[n] for n in repeated]
        text = b"(" + b", ".join(literal(value) for value in (*row, *cut)) + b")"
        if not made or len(made[-1]) == most_rows or len(head + b", ".join([*made[-1], text]) + tail) > most_bytes:
            made.append([])
        made[-1].append(text)
    return [head + b", ".join(texts) + tail for texts in made]
