"""The stream of a namespace: its names, provisioning, consumers and size."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

from .. import _fastpath
from ..config import (
    ACK_WAIT_SECONDS,
    API_TIMEOUT_SECONDS,
    DEFAULT_WAL_BYTES,
    DUPLICATE_WINDOW_SECONDS,
    ENVELOPE_RESERVE_BYTES,
    GRAPH_KEEP_SECONDS,
    MAX_ACK_PENDING,
    STREAM_FULL_SHARE,
    Config,
)
from ..errors import ConfigurationError, WalError
from ._waiting import Tally
from .api import Api, ApiError, backoff, time_ns
from .group import Group, group
from .transport import Connection

WRITER = "writer"
TRACE_INGEST = "trace_ingest"
MINIMUM_SERVER = (2, 12)
TRACES_KEY = "skialith.traces"

_NO_MESSAGE = 10037
_STREAM_NOT_FOUND = 10059
_CONSUMER_NOT_FOUND = 10014
_NAME_IN_USE = 10058
_NO_STORAGE = (10047, 10028, 10002)
_JETSTREAM_OFF = (10039, 10035, 10076)


class Subjects:
    """The subjects of one namespace; an agent is one token of them."""

    def __init__(self, namespace: str) -> None:
        root = f"skialith.{namespace}"
        self.all = f"{root}.>"
        self.logs = f"{root}.log.>"
        self.events = f"{root}.log.event.>"
        self.checkpoints = f"{root}.log.checkpoint.>"
        self.graphs = f"{root}.log.graph.>"
        self.chunks = f"{root}.chunk.>"
        self.leases = f"{root}.lease.>"
        self.dead = f"{root}.dead.>"
        self.dead_graphs = f"{root}.dead.graph.>"
        self.dead_chunks = f"{root}.deadchunk.>"
        self._root = root

    def event(self, agent_id: str) -> str:
        return f"{self._root}.log.event.{_fastpath.subject_token(agent_id)}"

    def checkpoint(self, agent_id: str) -> str:
        return f"{self._root}.log.checkpoint.{_fastpath.subject_token(agent_id)}"

    def graph(self, thread_name: str) -> str:
        return f"{self._root}.log.graph.{_fastpath.subject_token(thread_name)}"

    def chunk(self, agent_id: str) -> str:
        return f"{self._root}.chunk.{_fastpath.subject_token(agent_id)}"

    def lease(self, agent_id: str) -> str:
        return f"{self._root}.lease.{_fastpath.subject_token(agent_id)}"

    def mark(self, name: str) -> str:
        """Of messages that mean nothing but that they are there; no agent's token begins so."""
        return f"{self._root}.lease.~{name}"

    def dead_letter(self, kind: str, agent_id: str) -> str:
        token = _fastpath.subject_token(agent_id) if agent_id else "~unknown"
        return f"{self._root}.dead.{kind}.{token}"

    def dead_chunk(self, agent_id: str) -> str:
        return f"{self._root}.deadchunk.{_fastpath.subject_token(agent_id)}"


class Stream:
    """The stream ``SKIALITH_<namespace>`` and the dead-letter stream beside it."""

    def __init__(self, config: Config, connection: Connection, wal_bytes: int | None) -> None:
        """``wal_bytes``: ``max_bytes`` for a stream made now; None takes the configured or the default size."""
        self.namespace = config.namespace
        self.name = f"SKIALITH_{config.namespace}"
        self.dead_name = f"SKIALITH-DEAD_{config.namespace}"
        self.subjects = Subjects(config.namespace)
        self.api = Api(connection)
        self.traces = True
        self.replicas = config.replicas
        self.group: Group | None = None
        """Who kept the replicas when the stream was looked at last."""
        self.max_bytes = 0
        self.created = ""
        self.seen_server = ""
        """Id of the server on which the stream was looked at last."""
        self.shorter = False
        """Whether it lacked then what this process had been acknowledged before."""
        self._clock = (0, 0.0, 0.0)
        """The server's clock when the stream was looked at last, and this one's before and after."""
        self._config = config
        self._connection = connection
        self._wal_bytes = config.wal_bytes or wal_bytes or DEFAULT_WAL_BYTES
        self.tally = Tally()
        """What this process appended."""
        self._stored_bytes = 0
        self.keep_graphs_seconds = GRAPH_KEEP_SECONDS

    # ---- provisioning

    async def provision(self, deadline: float, create: bool = True) -> None:
        """Create or check stream and consumers; any number of processes may do this at once.

        Raises ``ConfigurationError`` naming the fix, or ``WalUnavailable``. Without ``create`` a stream that is not there is
        a ``WalError``: who only looks must not reserve space for a mistyped namespace.
        """
        self._check_server()
        try:
            info = await self._ensure_stream(self.name, self._settings(), deadline, create)
            self._note(info)
            # At once: with replicas each chooses a leader of its own, for which it takes seconds while a node is away.
            consumers = [(WRITER, self.subjects.logs), (TRACE_INGEST, self.subjects.events)][: 1 + self.traces]
            results = await asyncio.gather(
                self._ensure_stream(self.dead_name, self._dead_settings(), deadline),
                *(self._ensure_consumer(name, subject, deadline) for name, subject in consumers),
                return_exceptions=True,
            )
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        except ApiError as error:
            raise self._explained(error) from error

    def _check_server(self) -> None:
        info = self._connection.info
        version = str(info.get("version", "0"))
        found = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
        if found < MINIMUM_SERVER:
            raise ConfigurationError(
                f"nats-server {version} is too old: Skialith needs 2.12 or newer, for atomic batch publish "
                "(allow_atomic) and expected-sequence headers by subject; upgrade the server"
            )
        if self._connection.max_payload < 2 * ENVELOPE_RESERVE_BYTES:
            raise ConfigurationError(
                f"this nats-server takes {self._connection.max_payload:,} bytes in one message: set its max_payload to at least "
                f"{2 * ENVELOPE_RESERVE_BYTES:,} (the default is 1MB)"
            )
        if not info.get("jetstream"):
            raise ConfigurationError(
                "JetStream is disabled on this nats-server: start it with -js, or put `jetstream {}` into its configuration"
            )

    def _settings(self) -> dict[str, Any]:
        subjects = self.subjects
        return {
            "name": self.name,
            "subjects": [subjects.logs, subjects.chunks, subjects.leases],
            "retention": "limits",
            "discard": "new",
            "storage": "file",
            "max_age": 0,
            "max_msgs": -1,
            "max_msgs_per_subject": -1,
            "max_bytes": self._wal_bytes,
            "num_replicas": self._config.replicas,
            "duplicate_window": int(DUPLICATE_WINDOW_SECONDS * 1e9),
            "allow_direct": True,
            "allow_atomic": True,
            "allow_msg_ttl": True,
            "allow_rollup_hdrs": True,
            "deny_delete": False,
            "deny_purge": False,
            "sealed": False,
            "metadata": {TRACES_KEY: "on"},
        }

    def _dead_settings(self) -> dict[str, Any]:
        # A dead letter is the last copy of a record, so nothing here ages out or is dropped.
        return {
            **self._settings(),
            "name": self.dead_name,
            "subjects": [self.subjects.dead, self.subjects.dead_chunks],
            "max_bytes": max(self._wal_bytes // 16, 8 * 1024 * 1024),
            "metadata": {},
        }

    async def _ensure_stream(
        self, name: str, settings: dict[str, Any], deadline: float, create: bool = True
    ) -> dict[str, Any]:
        try:
            info = await self.api.call(f"STREAM.INFO.{name}", deadline=deadline)
        except ApiError as error:
            if error.code != _STREAM_NOT_FOUND:
                raise
            if not create:
                raise WalError(
                    f"the namespace {self.namespace!r} has no log on this server: nothing was saved under it yet. Check "
                    "the namespace (--namespace, SKIALITH_NAMESPACE), or save something first"
                ) from error
            # Sequences start at the clock, so that they stay monotone when a stream is wiped and made again.
            first = {**settings, "first_seq": time.time_ns() // 1000}
            try:
                info = await self.api.call(f"STREAM.CREATE.{name}", first, deadline=deadline)
            except ApiError as racing:
                if racing.code != _NAME_IN_USE:
                    raise
                info = await self._made_by_another(name, deadline)
        self._compare(name, settings, info["config"])
        return info

    async def _made_by_another(self, name: str, deadline: float) -> dict[str, Any]:
        """A cluster refuses a second stream of a name from when it decides on the first, and shows that somewhat later."""
        pauses = backoff()
        while True:
            try:
                return await self.api.call(f"STREAM.INFO.{name}", deadline=deadline)
            except ApiError as error:
                pause = next(pauses)
                if error.code != _STREAM_NOT_FOUND or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)

    def _compare(self, name: str, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        # Size, replicas and traces belong to whoever runs the stream; the rest is what correctness rests on.
        owned = {"max_bytes", "num_replicas", "metadata", "name"}
        wrong = [
            f"{key} is {found.get(key)!r}, must be {value!r}"
            for key, value in wanted.items()
            if key not in owned and found.get(key, False if isinstance(value, bool) else None) != value
        ]
        if found.get("max_bytes", -1) <= 0:
            wrong.append("max_bytes is not set")
        if wrong:
            raise ConfigurationError(
                f"the stream {name} exists with other settings ({'; '.join(wrong)}): change them with "
                f"`nats stream edit {name}`, or choose another namespace (SKIALITH_NAMESPACE)"
            )

    async def _ensure_consumer(self, name: str, filter_subject: str, deadline: float) -> None:
        wanted = {
            "durable_name": name,
            "name": name,
            "ack_policy": "explicit",
            "deliver_policy": "all",
            "replay_policy": "instant",
            "filter_subject": filter_subject,
            "max_deliver": -1,
            "ack_wait": int(ACK_WAIT_SECONDS * 1e9),
            "max_ack_pending": MAX_ACK_PENDING,
        }
        try:
            info = await self.consumer_info(name, deadline)
        except ApiError as error:
            if error.code != _CONSUMER_NOT_FOUND:
                raise
            body = {"stream_name": self.name, "config": wanted, "action": ""}
            info = await self.api.call(
                f"CONSUMER.CREATE.{self.name}.{name}.{filter_subject}",
                body,
                deadline=deadline,
            )
        found = info["config"]
        wrong = [
            f"{key} is {found.get(key, -1)!r}, must be {wanted[key]!r}"
            for key in ("ack_policy", "deliver_policy", "filter_subject", "max_deliver")
            if found.get(key, -1) != wanted[key]
        ]
        if wrong:
            raise ConfigurationError(
                f"the consumer {name} of {self.name} exists with other settings ({'; '.join(wrong)}): remove it with "
                f"`nats consumer rm {self.name} {name}` and start again; it is made anew and nothing is stored twice"
            )

    async def restore_consumer(self, name: str) -> bool:
        """Make a consumer that was deleted anew; it starts at the first record, and nothing is stored twice.

        False if it is gone because the namespace has no traces.
        """
        deadline = time.monotonic() + API_TIMEOUT_SECONDS
        await self.info(deadline)
        if name == TRACE_INGEST and not self.traces:
            return False
        subject = self.subjects.logs if name == WRITER else self.subjects.events
        await self._ensure_consumer(name, subject, deadline)
        return True

    def _explained(self, error: ApiError) -> ConfigurationError:
        if error.code in _NO_STORAGE:
            text = (
                f"the server cannot reserve {self._wal_bytes:,} bytes for {self.name} ({error}): set SKIALITH_WAL_BYTES "
                "lower, or raise max_file_store on the server"
            )
        elif error.code in _JETSTREAM_OFF:
            text = f"JetStream is not enabled for this account ({error}): enable it in the server's configuration"
        else:
            text = f"the server refused to set up {self.name}: {error}"
        return ConfigurationError(text)

    async def set_traces(self, enabled: bool, deadline: float) -> None:
        """Switch ``agent_traces`` for the whole namespace; writers notice at their next trim."""
        info = await self.info(deadline)
        config = info["config"]
        config["metadata"] = {
            **config.get("metadata", {}),
            TRACES_KEY: "on" if enabled else "off",
        }
        await self.api.call(f"STREAM.UPDATE.{self.name}", config, deadline=deadline)
        self.traces = enabled
        if enabled:
            await self._ensure_consumer(TRACE_INGEST, self.subjects.events, deadline)
            return
        try:
            await self.api.call(f"CONSUMER.DELETE.{self.name}.{TRACE_INGEST}", deadline=deadline)
        except ApiError as error:
            if error.code != _CONSUMER_NOT_FOUND:
                raise

    # ---- looking

    @property
    def wal_id(self) -> str:
        """What a database knows this log by; another one after the stream was made anew."""
        return f"{self.name}@{self.created}"

    async def info(self, deadline: float | None = None) -> dict[str, Any]:
        appended = self.tally.last_seq
        info = await self.api.call(f"STREAM.INFO.{self.name}", deadline=deadline)
        self._note(info)
        self.shorter = int(info["state"]["last_seq"]) < appended
        return info

    def time_at(self, moment: float) -> int:
        """The server's clock at a ``time.monotonic()`` of the last seconds, Unix nanoseconds, or a moment later.

        If this process appended nothing since the stream was looked at, then the time of that look.
        """
        server_ns, asked, answered = self._clock
        until = moment if self.tally.appended_bytes else min(moment, answered)
        return server_ns + max(0, int((until - asked) * 1e9))

    async def dead_info(self, deadline: float | None = None) -> dict[str, Any]:
        return await self.api.call(f"STREAM.INFO.{self.dead_name}", deadline=deadline)

    async def consumer_info(self, name: str, deadline: float | None = None) -> dict[str, Any]:
        return await self.api.call(f"CONSUMER.INFO.{self.name}.{name}", deadline=deadline)

    async def next_message(
        self, seq: int, filter_subject: str, deadline: float | None = None, stream: str = ""
    ) -> dict[str, Any] | None:
        """The first message at or behind ``seq`` that matches, read from the leader; None if there is none.

        A leader that stood still does not know for a moment that it was replaced, and answers as of then.
        """
        return await self._message({"seq": seq, "next_by_subj": filter_subject}, deadline, stream)

    async def last_message(self, subject: str, deadline: float | None = None) -> dict[str, Any] | None:
        """The last message on ``subject``, read from the leader as :meth:`next_message`; None if there is none."""
        return await self._message({"last_by_subj": subject}, deadline)

    async def _message(self, query: dict[str, Any], deadline: float | None, stream: str = "") -> dict[str, Any] | None:
        try:
            answer = await self.api.call(f"STREAM.MSG.GET.{stream or self.name}", query, deadline=deadline)
        except ApiError as error:
            if error.code == _NO_MESSAGE:
                return None
            raise
        message: dict[str, Any] = answer["message"]
        return message

    async def oldest_pending(self, consumer: str, deadline: float | None = None) -> int | None:
        """Store time (nanoseconds) of the first record that ``consumer`` has not acknowledged for good; None if there is none."""
        message = (await self.behind_floor(consumer, deadline))[1]
        return None if message is None else time_ns(message["time"])

    async def behind_floor(self, consumer: str, deadline: float | None = None) -> tuple[int, dict[str, Any] | None]:
        """The ack floor, and the first record of the consumer's behind it, None if there is none.

        An ack floor alone can stand still for ever, so the stream is asked what stands behind it.
        """
        floor = int((await self.consumer_info(consumer, deadline))["ack_floor"]["stream_seq"])
        wanted = self.subjects.logs if consumer == WRITER else self.subjects.events
        return floor, await self.next_message(floor + 1, wanted, deadline)

    async def stored(self, seq: int, deadline: float) -> bool | None:
        """Whether the writer has acknowledged for good what stands up to ``seq``, the sequence of a record.

        None, only with replicas: nothing is there that it has not, by the word of one who may not know of it (a replaced leader).
        """
        info = await self.consumer_info(WRITER, deadline)
        floor, given = int(info["ack_floor"]["stream_seq"]), int(info["delivered"]["stream_seq"])
        if self.replicas > 1 and (floor >= seq or (given >= seq and not info["num_ack_pending"])):
            return True
        message = await self.next_message(floor + 1, self.subjects.logs, deadline)
        if message is None:
            return True if self.replicas == 1 else None
        return int(message["seq"]) > seq

    # ---- size

    def _note(self, info: dict[str, Any]) -> None:
        self.traces = info["config"].get("metadata", {}).get(TRACES_KEY, "on") == "on"
        self.created = info["created"]
        self.seen_server = self._connection.server_id
        self._clock = (time_ns(info["ts"]), info["asked_at"], time.monotonic())
        self._stored_bytes = info["state"]["bytes"]
        self.tally.appended_bytes = 0
        self.max_bytes = info["config"]["max_bytes"]
        self.replicas = info["config"]["num_replicas"]
        self.group = group(info, self.replicas)

    def has_room(self, size: int) -> bool:
        """Whether a record of ``size`` bytes leaves the share of the stream that is kept for leases."""
        return self._stored_bytes + self.tally.appended_bytes + size <= self.max_bytes * STREAM_FULL_SHARE
