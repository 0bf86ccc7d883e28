"""Dead letters: what becomes of a record refused for its data, or of a message that does not decode."""

from __future__ import annotations

import time
from hashlib import blake2b

from ..config import ERROR_TEXT_CHARACTERS
from ..errors import StoreDataError, StoreUnavailable
from ..records import DeadLetter, Message, Record
from .batch import Deadly, Undecodable, decode
from .sinks import Sink, Source


def letter_for(sink: str, namespace: str, message: Message, record: Record | None, error: Exception) -> DeadLetter:
    """The dead letter of a message that ``error`` speaks against.

    ``record``: as the sink loaded it; None reads its head from the message, if that decodes.
    """
    if record is None and not isinstance(error, Deadly):  # of which it is not known that it can be decoded
        try:
            record = decode(namespace, message)
        except Undecodable:
            record = None
    return DeadLetter(
        key=key_of(message) if record is None else record.key,
        sink=sink,
        namespace=namespace,
        subject=message.subject,
        position=message.position,
        error_code=error.code if isinstance(error, StoreDataError) else 0,
        error=str(error)[:ERROR_TEXT_CHARACTERS],
        dead_us=time.time_ns() // 1000,
        raw=message.data,
        record=record,
    )


def key_of(message: Message) -> bytes:
    """The 16-byte key of a message that does not decode: a hash of its subject and position."""
    return blake2b(f"{message.subject}\0{message.position.cursor()}".encode(), digest_size=16).digest()


def bury(letter: DeadLetter, sink: Sink, source: Source) -> str:
    """Keep ``letter`` in the database's ``dead_letters``, or in the log's dead-letter stream if that refuses it.

    Returns where it is kept, for the log line. Raises ``StoreUnavailable`` when the database is merely away,
    ``WalError`` when the log is: the letter is kept nowhere then and the message stays unacknowledged.
    """
    try:
        sink.bury(letter)
        return "table dead_letters"
    except StoreUnavailable as error:
        sink.probe()  # Raises when the database is away; when it is not, this letter is what it does not take.
        refused: Exception = error
    except Exception as error:  # noqa: BLE001 - whatever the table has against it, the stream takes it
        refused = error
    # The letter keeps the record's own error, which is the one that counts.
    source.bury(letter)
    return f"log, because the table dead_letters refused it ({refused})"
