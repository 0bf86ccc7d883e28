"""Settings and limits: the only reader of the environment, frozen once made.

Every setting is an argument of ``SkialithAgent`` or an environment variable ``SKIALITH_<NAME>``; the argument wins.
Every limit of the engine is a named constant here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from . import urls
from .errors import ConfigurationError, InvalidArgument

# ---- identifiers
MAX_ID_CHARACTERS = 255
"""Longest agent id and event id, in Unicode characters."""
MAX_SUBJECT_TOKEN = 200
"""Longest subject token made from an agent id; longer ones become a prefix and a hash."""
MAX_EVENT_TYPE_CHARACTERS = 255
"""Longest event type kept in ``agent_traces``; longer ones are cut there (the payload is not)."""

# ---- records
MAX_RECORD_BYTES = 64 * 1024 * 1024
"""Default limit of one record's encoded payload."""
LARGEST_RECORD_BYTES = 1024 * 1024 * 1024
"""Largest ``max_record_bytes``; readers take records up to this, whatever their own setting."""
MAX_BATCH_MESSAGES = 1000
"""Messages the server takes in one atomic batch (nats-server's default limit)."""
COMPRESS_ABOVE_BYTES = 64 * 1024
"""Payloads over this are compressed with zstd when that makes them smaller."""
ENVELOPE_RESERVE_BYTES = 8 * 1024
"""Part of the server's ``max_payload`` kept for headers and the record's own head."""
MAX_PAYLOAD_DEPTH = 200
"""Deepest nesting of lists and dicts in a payload."""

# ---- appending
DEFAULT_TIMEOUT_SECONDS = 10.0
"""Deadline of a blocking call."""
MAX_TIMEOUT_SECONDS = 25.0
"""Longest deadline of an append: retries with the same id must end inside the duplicate window."""
DUPLICATE_WINDOW_SECONDS = 30.0
"""The stream's duplicate window: longest append deadline plus a margin."""
APPEND_ATTEMPT_SECONDS = 2.0
"""How long one attempt waits for its PubAck before it is sent again with the same id."""
MAX_QUEUED_RECORDS = 10_000
"""Records one process may have waiting for a PubAck; more block the caller."""
MAX_QUEUED_BYTES = 128 * 1024 * 1024
"""Bytes one process may have waiting for a PubAck; more block the caller."""
APPEND_BATCH_RECORDS = 500
"""Records of one agent that go to the server as one atomic batch."""
APPEND_BATCH_BYTES = 4 * 1024 * 1024
"""Bytes of one agent that go to the server as one atomic batch."""
APPEND_WINDOW_RECORDS = 1000
"""Records of one agent that are in flight together on a log without replicas."""
FLUSH_AGENTS = 100_000
"""Agents and graphs' threads, the last that a process used, whose dead letters a flush counts."""
IDLE_LANES = 10_000
"""Agents that a process remembers without owning them; when there are more, the oldest are forgotten, and a tenth of this."""
AWAITED_THREADS = 8
"""Threads on which a process reads the database, opens and closes for agents whose verbs are awaited."""
AWAITED_INLINE_BYTES = 256 * 1024
"""Payloads of an awaited call over this are compressed and cut on one of these threads and not on the caller's loop."""
RETRY_FIRST_SECONDS = 0.02
"""First pause between two attempts; doubled each time, with full jitter."""
RETRY_LONGEST_SECONDS = 1.0
"""Longest pause between two attempts of an append."""

# ---- connection
CONNECT_TIMEOUT_SECONDS = 5.0
"""Longest wait for the first connection (never longer than the call's own timeout)."""
PING_SECONDS = 5.0
"""Interval of the protocol ping that finds dead connections."""
API_TIMEOUT_SECONDS = 5.0
"""How long one JetStream API request may take before it is repeated."""
POWER_CHECK_SECONDS = 10.0
"""How often ``durability="power"`` looks again whether the servers that keep the log sync; besides at every new connection."""
POWER_AGAIN_SECONDS = 0.5
"""The same while records are held back, or while one of these servers is away."""
PEER_SILENT_SECONDS = 4.0
"""How long a replica may be unheard by its leader before it is shown as silent; the server's heartbeats are 1 s apart, and
after 4 s without one the others begin to elect a new leader."""
PEER_BEHIND_OPERATIONS = 100
"""How many operations a replica may lack before it is shown as behind; under load a few are always on their way."""

LONGEST_CONTROL_LINE_BYTES = 256 * 1024
"""Longest line that a server may send (its INFO names every server of a cluster); a longer one ends the connection."""
LONGEST_MESSAGE_BYTES = 65 * 1024 * 1024
"""Longest message that a server may send, headers included; over the largest that one can be configured to take."""

# ---- the stream
STREAM_FULL_SHARE = 0.95
"""Records are refused above this share of ``max_bytes`` so that leases still fit."""
DEFAULT_WAL_BYTES = 8 * 1024 * 1024 * 1024
"""``max_bytes`` of the stream when ``wal_bytes`` is not set and the server is not the embedded one."""
TRIM_SECONDS = 1.0
"""How often a writer whose acks moved trims the stream."""
FLOOR_SECONDS = 10.0
"""How often a process that appends asks how far the writer is, to forget which of its records a lost log would take along."""
WRITER_IN_HAND_SECONDS = 5.0
"""For how long after a log was lost a writer may still store what it had got from it, before ``flush()`` says what is lost."""
ACK_WAIT_SECONDS = 5.0
"""After this a message that was pulled and not acknowledged is delivered again."""
MAX_ACK_PENDING = 20_000
"""Messages a consumer may have delivered and not acknowledged, all writers together."""

# ---- steps
STEP_RETRIES = 100
"""Most retries that one step may ask for."""
STEP_BACKOFF_SECONDS = 0.5
"""First pause between two attempts of a step, unless it says otherwise."""
STEP_BACKOFF_FACTOR = 2.0
"""How much longer each further pause of a step is, unless it says otherwise."""
STEP_BACKOFF_LONGEST_SECONDS = 60.0
"""Longest pause between two attempts of a step, unless it says otherwise."""
STEP_BACKOFF_LIMIT_SECONDS = 3600.0
"""Longest pause that a step may ask for."""
STEP_PAGE_RECORDS = 500
"""Recorded steps of one page from the database."""
STEP_MEMORY_BYTES = 32 * 1024 * 1024
"""Encoded results of recorded steps that one run keeps in memory; those beyond are read when they are asked for."""

# ---- leases
LEASE_SECONDS = 3600.0
"""Life of a lease; the runtime renews it at a third of this."""
LEASES_AT_ONCE = 64
"""Leases of one process that are renewed, or given up at its end, at the same time."""

# ---- writer
WRITER_BATCH_ROWS = 512
"""A batch closes at this many records."""
WRITER_BATCH_BYTES = 4 * 1024 * 1024
"""A batch closes at this many bytes."""
PULL_RECORDS = 512
"""Records of one pull request."""
PULL_AHEAD_RECORDS = 2048
"""Records that a writer has waiting or asked for, over all its open pull requests."""
PULL_BYTES = 4 * 1024 * 1024
"""Bytes of one pull request; more where the server's ``max_payload`` is larger."""
PULL_AHEAD_BYTES = 14 * 1024 * 1024
"""Bytes that a writer has waiting or asked for; one pull request at least. Both consumers stay under half of the 64 MiB at
which a server gives up on a client that does not read."""
WRITER_LINGER_SECONDS = 0.02
"""A batch closes this long after its first record."""
WRITER_GIVE_BACK_SECONDS = 10.0
"""A writer whose database is away this long gives its messages back and probes empty-handed."""
WRITER_POLL_SECONDS = 0.2
"""Longest wait of one empty pull; a stopping writer notices within this."""
WRITER_CONNECTION_LOSSES = 2
"""A batch that loses the connection this often while the database answers is halved."""
WRITER_ASIDE_FIRST_SECONDS = 1.0
"""A record that alone cannot be stored now, though others can, is given back for this long; doubled each time."""
WRITER_ASIDE_LONGEST_SECONDS = 60.0
"""Longest time a record that cannot be stored now is given back for."""
WRITER_ASIDE_RECORDS = 10_000
"""Records given back alone that one writer remembers, to try them alone when they return."""
WRITER_BODY_READS = 3
"""A large record's body must be missing in the log this many times before the record is given up (a replica may lag)."""
CLOCK_STEP_CHECKPOINTS = 10_000
"""How many checkpoints of an agent the clock of the log's server may be set back over without ``resume()`` going back with it."""
WRITER_SUSPECT_DELIVERIES = 5
"""From this delivery on a record is first stored by a process of its own: writers may have died of it. Writers that come and go
give back what they were sent, and so a record may be delivered three times under steady load without a death."""
WRITER_DEATHS = 3
"""So many processes of its own must die of a record, one after the other, before it is given up."""
WRITER_APART_SECONDS = 60.0
"""How long the process of its own may give no sign of life, or take to start."""
WRITER_APART_LONGEST_SECONDS = 600.0
"""How long it may take for one record."""
WRITER_MEMORY_TRIES = 3
"""A record for which alone there is not memory enough is given back and tried so many times before it is given up."""
WRITER_WARN_SECONDS = 30.0
"""A failure that goes on is logged at once and then at most this often, with counts."""
BACKOFF_FIRST_SECONDS = 0.1
"""First pause after a transient database failure; doubled each time, with full jitter."""
BACKOFF_LONGEST_SECONDS = 5.0
"""Longest pause between two attempts on the database."""
CLOSE_SECONDS = 10.0
"""Deadline of ``close()``: PubAcks, flush, acks and lease releases together."""

# ---- stores
PAYLOAD_PART_BYTES = 1024 * 1024
"""Payloads over this are stored in parts of this size in ``payload_parts``."""
DATABASE_CONNECT_SECONDS = 5
"""Connect timeout of the database driver."""
DATABASE_TRUST_SECONDS = 1.0
"""How long since it was used a connection is read over without a ping, which would cost as much as a query."""
DATABASE_STATEMENT_SECONDS = 30
"""Read and write timeout of the database driver."""
DATABASE_LOCK_SECONDS = 10
"""How long a statement waits for another transaction's lock on a row or a table (backup, ALTER); less than
``DATABASE_STATEMENT_SECONDS``, so that the database and not the driver ends the wait: what a driver gives up goes on waiting in
the server, one connection more at every try."""
DATABASE_IDLE_SECONDS = 30
"""After this a server ends a transaction whose client has gone silent, and gives its row locks to others."""
DATABASE_CONNECTIONS = 8
"""Connections one store holds at most; further callers wait for one to be returned."""
DATABASE_CHECKOUT_SECONDS = 30.0
"""How long a caller waits for a connection of the store."""
DATABASE_FORK_SECONDS = 10.0
"""How long ``fork()`` waits for the running SQLite transactions of its process."""
DATABASE_STATEMENT_BYTES = 4 * 1024 * 1024
"""Longest INSERT statement, unless one row alone is longer; never over half of the server's ``max_allowed_packet``."""
DATABASE_STATEMENT_ROWS = 64
"""Rows of one INSERT statement. A database on the same machine works on one in a single stretch, and whoever wants its
processor waits that long: 128 rows take twice as long, and are hardly faster for a row."""
DATABASE_LEAST_PACKET_BYTES = 8 * 1024 * 1024
"""Smallest ``max_allowed_packet`` a server may have: one row with two payload parts, all of it escaped, must fit."""
DATABASE_MIGRATION_SECONDS = 600
"""Longest statement of a schema migration."""
DATABASE_MIGRATION_LOCK_SECONDS = 60
"""How long a process waits for another one's schema migration."""
DATABASE_MIGRATION_TRIES = 10
"""How often a migration is begun in a cluster where another node's process may be making the same changes."""
DATABASE_MIGRATION_PAUSE_SECONDS = 0.5
"""Longest pause between two of these tries."""
SQLITE_WAL_BYTES = 64 * 1024 * 1024
"""Size to which SQLite cuts its own write-ahead file after a checkpoint."""
SQLITE_BUSY_SECONDS = 5.0
"""How long SQLite waits for another process's write."""
HISTORY_PAGE_RECORDS = 256
"""Records of one page of ``history()``."""
HISTORY_PAGE_BYTES = 8 * 1024 * 1024
"""Bytes of one page of ``history()`` from the database; one record at least."""
GRAPH_PAGE_CHECKPOINTS = 50
"""Checkpoints of a graph that are read at once from the database."""
GRAPH_FIRST_PAGE_CHECKPOINTS = 10
GRAPH_PAGE_BYTES = 16 * 1024 * 1024
"""``list`` fills so many checkpoints at once at first, then as many as stay within this, but one at least."""
GRAPH_COMPRESS_ABOVE_BYTES = 512 * 1024
"""Channel values over this are compressed with zstd when that makes them smaller; below, that takes longer than sending."""
GRAPH_KEEP_SECONDS = 3.0
"""How long operations on graphs' threads stay in the log at least (server's clock), so that a look may be brought up to date."""
GRAPH_TRUST_SECONDS = 2.0
"""How long after a look began it may be; the rest of ``GRAPH_KEEP_SECONDS`` is for clocks that differ or step."""
GRAPH_LOOK_SECONDS = 30.0
"""How long a look is brought up to date before the database is asked again: what an operator discards stands in no log."""
GRAPH_CACHE_BYTES = 64 * 1024 * 1024
"""Size of the checkpoints that a process keeps from its last looks; one that is over a quarter of it is not kept."""
WRITER_STANDS_SECONDS = 3.0
"""A writer that acknowledged nothing for so long, while records wait, is taken to be without its database."""
GRAPH_KNOWN_VALUES = 100_000
"""Channel values that a checkpointer remembers to be durable, so that it need not write them again."""
GRAPH_DROPS_PER_RECORD = 1000
"""Checkpoints, and channel values, that one record deletes."""
TRACE_JSON_BYTES = 1024 * 1024
"""Largest JSON document kept in ``agent_traces``; a larger one becomes a marker that says so."""
TRACE_JSON_DEPTH = 30
"""Deepest JSON in ``agent_traces``; what is nested deeper becomes a marker that says so."""
ERROR_TEXT_CHARACTERS = 2000
"""Longest database error text kept in ``dead_letters``."""

# ---- Celery
TASK_RETRIES = 20
"""How often a ``durable_task`` is retried: about ten minutes with the pauses below."""
TASK_RETRY_FIRST_SECONDS = 1
"""First pause before a task is retried, whole seconds; doubled each time, with full jitter."""
TASK_RETRY_LONGEST_SECONDS = 60
"""Longest pause before a task is retried, whole seconds; well under a broker's visibility timeout."""

# ---- embedded server
LOCAL_START_SECONDS = 10.0
"""How long the embedded nats-server may take to answer."""
LOCAL_WAL_SHARE = 0.25
"""Share of the disk's free space that the embedded stream may use."""
LOCAL_WAL_MAX_BYTES = 16 * 1024 * 1024 * 1024
"""Largest embedded stream."""
LOCAL_WAL_MIN_BYTES = 64 * 1024 * 1024
"""Smallest embedded stream that is worth starting."""
LOCAL_START_ATTEMPTS = 3
"""Embedded servers that may die at start (port taken, bad binary) before the call fails."""
LOCAL_STOP_SECONDS = 5.0
"""How long the embedded server may take to stop after the last user left before it is killed."""
LOCAL_LOG_BYTES = 4 * 1024 * 1024
"""Size at which ``nats-server.log`` is rotated."""
LOCAL_LOG_FILES = 3
"""Files of ``nats-server.log`` kept, the current one included."""

Durability = Literal["process", "power"]
WriterMode = Literal["on", "off"]

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]{1,32}")


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of one runtime; equal settings in one process share one runtime. Make it with :func:`load`.

    ``nats_url``: comma-separated ``nats://`` or ``tls://`` URLs; None runs an embedded server below ``directory``.
    ``database_url``: ``mysql://user:pass@host:port/db`` or ``sqlite:///path``; None is SQLite below ``directory``.
    ``namespace``: 1 to 32 of ``A-Z a-z 0-9 _ -``; one stream, one set of rows. ``writer``: ``"on"`` moves records to the
    database from this process, ``"off"`` leaves that to others (``skialith writer``). ``durability``: what a PubAck must
    survive, ``"process"`` or ``"power"``; the latter is verified through ``nats_monitor_url`` (comma-separated ``http://`` URLs,
    one for each server that keeps the log) or ``nats_system_url`` (``nats://user:pass@host`` of the system account, which
    reaches all of them; ``nats_system_creds`` in place of a password). ``timeout``: seconds a blocking
    call may take (0 < t <= 25).
    """

    nats_url: str | None = None
    database_url: str | None = None
    namespace: str = "default"
    writer: WriterMode = "on"
    durability: Durability = "process"
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    directory: str = ".skialith"
    replicas: int = 1
    wal_bytes: int | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    lease_seconds: float = LEASE_SECONDS
    nats_creds: str | None = None
    nats_nkey_seed: str | None = None
    nats_tls_ca: str | None = None
    nats_tls_cert: str | None = None
    nats_tls_key: str | None = None
    nats_monitor_url: str | None = None
    nats_system_url: str | None = None
    nats_system_creds: str | None = None
    nats_server: str | None = None

    @property
    def embedded(self) -> bool:
        """Whether this runtime uses the private nats-server below ``directory``."""
        return self.nats_url is None

    @property
    def path(self) -> Path:
        """``directory`` as an absolute path: embedded store, SQLite file, locks."""
        return Path(self.directory)

    @property
    def store_url(self) -> str:
        """The database URL in force: ``database_url``, or the SQLite file of the embedded default."""
        return self.database_url or f"sqlite:///{quote(str(self.path / 'skialith.db'))}"


def load(environ: Mapping[str, str] | None = None, **arguments: Any) -> Config:
    """Build the settings from arguments and ``SKIALITH_*`` variables; an argument that is None counts as not given.

    Raises :class:`~skialith.errors.ConfigurationError` naming the setting and the accepted values.
    """
    env = os.environ if environ is None else environ
    known = {field.name for field in fields(Config)}
    unknown = arguments.keys() - known
    if unknown:
        raise ConfigurationError(f"unknown setting {min(unknown)!r}; known: {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name in known:
        given = arguments.get(name)
        text = env.get(f"SKIALITH_{name.upper()}")
        if given is not None:
            values[name] = given
        elif text:
            values[name] = text
    return _checked(values)


def _checked(values: dict[str, Any]) -> Config:
    for name in ("timeout", "lease_seconds"):
        values[name] = _number(name, values.get(name, getattr(Config(), name)), float)
    for name in ("replicas", "max_record_bytes"):
        values[name] = _number(name, values.get(name, getattr(Config(), name)), int)
    if values.get("wal_bytes") is not None:
        values["wal_bytes"] = _number("wal_bytes", values["wal_bytes"], int)
    if isinstance(values.get("writer"), bool):
        values["writer"] = "on" if values["writer"] else "off"
    values["directory"] = os.path.abspath(str(values.get("directory", ".skialith")))
    for name in Config.__slots__:
        value = values.get(name)
        if value is not None and not isinstance(value, (str, int, float)):
            raise ConfigurationError(f"{name} must be text or a number, not {type(value).__name__}")
    config = Config(**values)
    _one_of("writer", config.writer, ("on", "off"))
    _one_of("durability", config.durability, ("process", "power"))
    _one_of("replicas", config.replicas, (1, 3, 5))
    if not isinstance(config.namespace, str) or not _NAMESPACE.fullmatch(config.namespace):
        raise ConfigurationError(f"namespace {config.namespace!r}: use 1 to 32 of A-Z a-z 0-9 _ -")
    if not 0 < config.timeout <= MAX_TIMEOUT_SECONDS:
        raise ConfigurationError(
            f"timeout {config.timeout!r}: use more than 0 and at most {MAX_TIMEOUT_SECONDS} seconds"
        )
    if config.lease_seconds < 1:
        raise ConfigurationError(f"lease_seconds {config.lease_seconds!r}: use at least 1 second")
    if config.max_record_bytes > LARGEST_RECORD_BYTES:
        raise ConfigurationError(f"max_record_bytes {config.max_record_bytes}: use at most {LARGEST_RECORD_BYTES}")
    if config.max_record_bytes < 1 or (config.wal_bytes is not None and config.wal_bytes < 1):
        raise ConfigurationError("max_record_bytes and wal_bytes must be positive")
    for name in ("nats_url", "nats_system_url"):
        urls.check_nats(name, getattr(config, name))
    urls.check_database(config.database_url)
    return config


def _number(name: str, value: Any, kind: type[float | int]) -> float | int:
    try:
        return kind(str(value))
    except ValueError:
        raise ConfigurationError(f"{name} must be a number, not {value!r}") from None


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ConfigurationError(f"{name} {value!r}: use one of {', '.join(map(repr, allowed))}")


def check_id(argument: str, value: object) -> str:
    """Return ``value`` if it may name an agent or an event: text, 1 to 255 characters, any Unicode.

    Raises :class:`~skialith.errors.InvalidArgument` naming ``argument``; nothing was sent.
    """
    if not isinstance(value, str):
        raise InvalidArgument(f"{argument} must be a str, not {type(value).__name__}", argument=argument)
    if not value:
        raise InvalidArgument(f"{argument} must not be empty", argument=argument)
    if len(value) > MAX_ID_CHARACTERS:
        raise InvalidArgument(
            f"{argument} has {len(value)} characters; at most {MAX_ID_CHARACTERS} are allowed",
            argument=argument,
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{argument} holds a lone surrogate at index {error.start}, which is not Unicode text",
            argument=argument,
        ) from None
    return str.__str__(value)
