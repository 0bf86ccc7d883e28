"""A batch: messages that are stored in one transaction, and how it is halved to find the one that is not."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from .. import _rows
from ..config import WRITER_BODY_READS, WRITER_DEATHS, WRITER_MEMORY_TRIES
from ..errors import BodyMissing
from ..records import Message, Record, decode_record


class Undecodable(Exception):
    """A message is not a record that this Skialith can read."""


class Deadly(Exception):
    """A process that handled nothing but this message died of it. ``decodes``: it had decoded the record by then."""

    def __init__(self, text: str, *, decodes: bool) -> None:
        super().__init__(text)
        self.decodes = decodes


class Endless(Exception):
    """A process that handled nothing but this message did not come to an end with it."""


@dataclass(slots=True)
class Batch:
    """Messages with their records, one each, in the order of the log.

    ``records``: None for a single message that is still to be decoded; in it, None for a message that needs no row.
    ``apart``: a single message that another process has to survive first. ``losses``: tries that ended with the connection to
    the database. ``suspected``: part of a batch that failed although the database answers. ``strikes``: how often a single
    message did so. ``doubted``: a single message was refused for its data once while the database took another one.
    ``refused``: why a single message is a dead letter.
    """

    messages: list[Message]
    records: list[Record | None] | None
    apart: bool = False
    losses: int = 0
    suspected: bool = False
    strikes: int = 0
    doubted: bool = False
    refused: Exception | None = None

    def rows(self) -> list[Record]:
        """The records to be stored."""
        return [record for record in self.records or () if record is not None]

    def halves(self) -> list[Batch]:
        """This batch as two, in order."""
        records = self.records
        if records is None or len(records) < 2:
            raise ValueError("only a decoded batch of two or more can be halved")
        middle = len(records) // 2
        return [
            Batch(self.messages[:middle], records[:middle], suspected=self.suspected),
            Batch(self.messages[middle:], records[middle:], suspected=self.suspected),
        ]


def decode_run(namespace: str, messages: Sequence[Message], kinds: Container[int]) -> list[Record | None]:
    """The records in ``messages`` up to the first one that needs a closer look (see ``decode``), all in one go.

    None stands for a record that is of none of ``kinds``.
    """
    return _rows.records(Record, namespace, list(messages), kinds)


def decode(namespace: str, message: Message) -> Record:
    """The record in a message, at its position, without the body of a large one. Raises ``Undecodable``."""
    try:
        return decode_record(namespace, message.data, message.position)
    except ValueError as error:
        raise Undecodable(f"the message does not decode: {error}") from error
    except Exception as error:
        raise Undecodable(f"the message does not decode: {type(error).__name__}: {error}") from error


def tries(error: Exception) -> int:
    """How often in a row a record must fail like this, alone, to be given up."""
    if isinstance(error, BodyMissing):
        return WRITER_BODY_READS
    if isinstance(error, Deadly):
        return WRITER_DEATHS
    # A record is no worse for it that its process is short of memory; another one, or a later one, may not be.
    return WRITER_MEMORY_TRIES if isinstance(error.__cause__, MemoryError) else 1
