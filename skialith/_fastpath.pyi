"""The wire in C: record keys, subject tokens, the record's msgpack form, publish frames, PubAcks and ack subjects.

Text arguments must be real Unicode: a lone surrogate raises ``UnicodeEncodeError`` (a ``ValueError``) everywhere.
An integer that does not fit the stated range raises ``OverflowError`` or ``ValueError``. Nothing here blocks or
keeps state.
"""

def event_key(namespace: str, agent_id: str, event_id: str) -> bytes:
    """The 16-byte identity of an event: BLAKE2b-128 of the three texts in UTF-8.

    Each text stands behind its length in bytes, 4 bytes big-endian.
    """

def subject_token(agent_id: str) -> str:
    """One subject token, 1 to 200 of ``A-Z a-z 0-9 _ - % ~``, a different one for each id.

    Every UTF-8 byte outside ``[A-Za-z0-9_-]`` becomes ``%XX``. What would be longer than 200 becomes its first 167
    characters or fewer (no escape is cut), ``~`` and 32 hex digits of BLAKE2b-128 of the id; compare the id inside the
    record then. Raises ``ValueError`` for an empty id.
    """

def encode_record(
    kind: int,
    agent_id: str,
    record_id: str,
    key: bytes,
    step_index: int,
    event_type: str,
    created_us: int,
    codec: int,
    body: bytes | None,
    manifest: tuple[int, int, bytes] | None,
) -> bytes:
    """The record as one msgpack array of ten, exactly one of ``body`` and ``manifest`` (size, chunks, digest) given.

    ``kind`` and ``codec``: 0 to 255. ``key``: 16 bytes. ``step_index`` and ``created_us``: signed 64 bits. Raises
    ``ValueError`` for anything else.
    """

def decode_record(
    data: bytes,
) -> tuple[int, str, str, bytes, int, str, int, int, bytes | None, tuple[int, int, bytes] | None]:
    """``(kind, agent_id, record_id, key, step_index, event_type, created_us, codec, body, manifest)`` of a record.

    Any valid msgpack form of the fields is read, not only the shortest. Raises ``ValueError`` saying what is wrong:
    malformed, cut short, bytes left over, or a version this Skialith does not know.
    """

def hpub(subject: str, reply: str, headers: bytes, payload: bytes) -> bytes:
    """A whole HPUB frame. ``reply`` may be empty; ``headers`` is empty or ``Key: value`` lines, each ended by CRLF.

    Raises ``ValueError`` for subjects that are empty or not printable ASCII, and for a control line over 4096 bytes.
    """

def pub(subject: str, reply: str, payload: bytes) -> bytes:
    """A whole PUB frame; as :func:`hpub` without headers."""

def record_headers(msg_id: bytes) -> bytes:
    """The header line of every record: ``Nats-Msg-Id``, the hex of ``msg_id``."""

def fence(sequence: int, subject: str) -> bytes:
    """The header lines that let the server accept a message only while ``sequence`` is the last one on ``subject``.

    ``sequence``: 0 to 2**64-1.
    """

def parse_puback(data: bytes) -> tuple[int, bool, str, int, int, str, int]:
    """``(seq, duplicate, stream, err_code, code, description, batch_count)`` of a PubAck.

    A refusal has ``err_code`` or ``code`` set (``seq`` is 0 unless the server sent one); a success has both 0 and
    ``seq`` at least 1. Raises ``ValueError`` if it is neither.
    """

def parse_ack_subject(reply: str | bytes) -> tuple[int, int, int, int]:
    """``(stream_seq, store_time_ns, deliveries, pending)`` from the reply subject of a consumer's message.

    Reads ``$JS.ACK.<stream>.<consumer>.<delivered>.<sseq>.<cseq>.<time>.<pending>`` and the longer form with domain and
    account hash behind ``ACK``. Raises ``ValueError`` for anything else.
    """

def scan_payload(data: bytes, max_depth: int) -> bool:
    """Whether one msgpack value is plain: every map key is text and nothing is an extension.

    Linear, about 2 ns a value. ``max_depth``: deepest nesting of lists and maps let through, 0 to 1024. Raises
    ``ValueError`` for what is deeper, cut short, or followed by more bytes. Does not look inside text, so invalid UTF-8
    passes.
    """

__pyx_capi__: dict[str, object]
"""What other compiled modules take from here."""
