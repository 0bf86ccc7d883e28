"""The way into a database in C: records in key order, their rows, an INSERT's text, and a payload as JSON text.

What takes long for a byte (escaping, JSON, sorting) runs without the GIL. Nothing here blocks or keeps state. A tuple
that is shorter or of other types than is stated raises ``TypeError`` or ``ValueError``, an integer that is over 64 bits
``OverflowError``, a lone surrogate ``UnicodeEncodeError``.
"""

from collections.abc import Callable, Container
from typing import Any, TypeAlias, TypeVar

_Message: TypeAlias = tuple[Any, ...]
_Record = TypeVar("_Record", bound=tuple[Any, ...])
_Item = TypeVar("_Item", bound=tuple[Any, ...])
_Trace = TypeVar("_Trace", bound=tuple[Any, ...])
_Row: TypeAlias = tuple[Any, ...]

def records(
    cls: type[_Record], namespace: str, messages: list[_Message], kinds: Container[int]
) -> list[_Record | None]:
    """A ``cls`` (``Record``) for each message up to the first one that does not decode or has its body elsewhere.

    A message is a tuple with ``data`` and ``position``. None stands for a record of another kind than ``kinds``.
    """

def in_order(items: list[_Item], key_at: int, position_at: int) -> list[_Item]:
    """``items`` by their key (16 bytes, compared as bytes), and those of one key by their position, two signed and unsigned
    64-bit integers; what is equal in both stays in its order.
    """

def of_records(
    records: list[_Item], most_bytes: int, of_large: Callable[[_Item], _Row]
) -> tuple[list[_Row], list[_Row]]:
    """Rows of events (``EVENT_COLUMNS``) and of checkpoints (``CHECKPOINT_COLUMNS``) of records, each in order.

    The row of a record whose body is over ``most_bytes``, or is not there, is what ``of_large`` makes of it.
    """

def having(rows: list[_Row], column: int, value: str) -> list[_Row]:
    """Those of ``rows`` that have ``value`` at ``column``, in order."""

def traces(cls: type[_Trace], records: list[_Item], texts: list[str], most_characters: int) -> list[_Trace]:
    """A ``cls`` (``Trace``) for each record with its JSON text; its event type is cut at ``most_characters``."""

def of_traces(traces: list[_Item]) -> list[_Row]:
    """Rows of traces, as ``TRACE_COLUMNS``; a time that no database can hold becomes the nearest one that it can."""

def insert(
    head: bytes,
    tail: bytes,
    rows: list[_Row],
    start: int,
    most_rows: int,
    most_bytes: int,
    repeated: tuple[int, ...],
    most_characters: int,
) -> tuple[bytes, int]:
    """``(statement, next)``: ``head``, the rows from ``start`` on as SQL literals, ``tail``; ``next`` is the first row left.

    At most ``most_rows`` rows, and as many as ``most_bytes`` hold, but one at least. Behind the columns of each row those
    at ``repeated`` stand once more, a text cut at ``most_characters``. bytes become ``_binary'...'``, str ``'...'`` in
    UTF-8, escaped with backslashes as for a utf8mb4 session without NO_BACKSLASH_ESCAPES; int and None as they are.
    """

def json_texts(bodies: list[bytes], depth: int, most_bytes: int) -> list[str | None]:
    """The JSON text of each msgpack value, as ``trace_json.to_json`` writes it; None for what that has to decide.

    None: malformed, an extension, a key that is not text or stands twice, a map of over 64 keys, text that is not UTF-8, a
    float that is not finite (or one of the few whose shortest form takes more than C's library), lists and maps over
    ``depth`` - 1 levels (``depth`` 0 to 64), a text over ``most_bytes``.
    """
