"""Clients of a sidecar, each a thread that writes down what it sends before it sends it, and what it was told."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import quote

from skialith.records import Ack
from tests.fixtures.sidecar import Sidecar, sidecar

from .evidence import Notebook, digest, payload
from .world import World

CALL_SECONDS = 30.0
"""How long a client waits for an answer."""
LARGE_CHARACTERS = 1_300_000
"""Text of a large payload: over what goes into one message, and over what a sidecar's loop packs itself."""
LEASE = "Skialith-Lease"


@contextlib.contextmanager
def serve(
    world: World, *options: str, port: int | None = None, die: dict[str, int] | None = None, break_: str = ""
) -> Iterator[Sidecar]:
    """A sidecar of the world, ready unless it is to ``die``. ``die``, ``break_``: as of a child."""
    before = f"from tests.chaos import faults; faults.install({die or {}}, {{}}, {break_!r})" if die or break_ else ""
    settings = {"SKIALITH_NAMESPACE": world.namespace, "SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}
    if world.nats_url:
        settings |= {"SKIALITH_NATS_URL": world.nats_url, "SKIALITH_DATABASE_URL": world.database_url}
    settings["SKIALITH_TIMEOUT"] = "10"
    with sidecar(
        *options, cwd=world.place, port=port, settings=settings, before=before, ready=None if die else True
    ) as made:
        yield made


@dataclass(slots=True)
class Answer:
    """What came of one request. ``status`` 0: nothing came, and the rest says what is known of the record's fate."""

    status: int
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == 200

    @property
    def kind(self) -> str:
        """The last part of a problem's type, or what the connection ended in."""
        return str(self.document.get("type", "")).rpartition(":")[2]


def _nothing(kind: str, outcome: str) -> Answer:
    return Answer(0, {"type": kind, "outcome": outcome, "retryable": True})


class Client:
    """One agent's client. It goes to one of ``ports`` at each request, and keeps its connections if ``keeps``."""

    def __init__(
        self, world: World, agent: str, ports: Sequence[int], name: str = "client", keeps: bool = True
    ) -> None:
        self.agent = agent
        self.ports = list(ports)
        self.keeps = keeps
        self.notebook = Notebook(world.folder, f"{name}-{agent}")
        self.dice = random.Random(f"{world.seed}/{name}/{agent}")
        self.lease = ""
        self.answers: list[Answer] = []
        self._numbers = itertools.count(1)
        self._connections: dict[int, HTTPConnection] = {}

    # ---- the verbs

    def resume(self, port: int | None = None) -> Answer:
        return self._look("resume", "POST", "resume", {"owner": self.notebook.name}, port)

    def state(self, port: int | None = None) -> Answer:
        return self._look("peek", "GET", "state", None, port)

    def event(self, identity: str = "", **how: Any) -> Answer:
        identity = identity or self.identity()
        value = payload(identity)
        body = {"event_id": identity, "payload": value}
        return self._write("event", [(identity, value)], "events", body, **how)

    def events(self, identities: Sequence[str], **how: Any) -> Answer:
        items = [(identity, payload(identity)) for identity in identities]
        body = {"events": [{"event_id": identity, "payload": value} for identity, value in items]}
        return self._write("events", items, "events/batch", body, **how)

    def checkpoint(self, step: int, token: str = "", *, large: bool = False, **how: Any) -> Answer:
        """``token``: of a call that is made again."""
        token = token or self.identity()
        value = payload(token)
        if large:
            value["text"] = "~" * LARGE_CHARACTERS
        body = {"step_index": step, "state": value}
        return self._write("checkpoint", [(token, value)], "checkpoint", body, {"Idempotency-Key": token}, **how)

    def identity(self) -> str:
        return f"{self.notebook.name}/{next(self._numbers)}"

    def until_answered(self, call: Callable[[], Answer], stopping: threading.Event) -> Answer:
        """Make the call again for as long as its answer is to try again."""
        while True:
            answer = call()
            if answer.ok or not answer.document["retryable"] or stopping.is_set():
                return answer
            stopping.wait(self.dice.uniform(0, 0.2))

    # ---- one request

    def _look(self, verb: str, method: str, what: str, body: Any, port: int | None) -> Answer:
        number = self.notebook.intend(verb, self.agent, CALL_SECONDS)
        answer = self._request(method, what, body, {}, port)
        if answer.ok:
            state = answer.document
            token = None if state["is_new"] else state["state"]["id"]
            shown = {"step": state["step_index"], "token": token, "digest": digest(state["state"])}
            self.notebook.done(number, **shown, source=state["source"], database_ok=state["database_ok"])
            self.lease = state["lease"]["token"] if verb == "resume" else self.lease
        else:
            self._failed(number, answer)
        return answer

    def _write(
        self,
        verb: str,
        items: list[tuple[str, Any]],
        what: str,
        body: Any,
        headers: dict[str, str] | None = None,
        *,
        port: int | None = None,
        patience: float = CALL_SECONDS,
        given_up: Callable[[], object] | None = None,
    ) -> Answer:
        """After ``patience`` seconds without an answer the connection is closed; if ``given_up``, as soon as this returns."""
        number = self.notebook.intend(verb, self.agent, CALL_SECONDS, items)
        carried = {**(headers or {}), **({LEASE: self.lease} if self.lease else {})}
        answer = self._request("POST", what, body, carried, port, patience, given_up)
        if answer.ok:
            acks = answer.document["acks"] if verb == "events" else [answer.document]
            self.notebook.done(number, [Ack(ack["seq"], ack["duplicate"]) for ack in acks])
        else:
            self._failed(number, answer)
        return answer

    def _failed(self, number: int, answer: Answer) -> None:
        told = answer.document
        self.notebook.line(
            "fail",
            n=number,
            acks=[[ack["seq"], ack["duplicate"]] for ack in told.get("acks", ())],
            error=answer.kind,
            outcome=told["outcome"],
            retryable=told["retryable"],
            text=str(told.get("detail"))[:300],
        )

    def _request(
        self,
        method: str,
        what: str,
        body: Any,
        headers: dict[str, str],
        port: int | None,
        patience: float = CALL_SECONDS,
        given_up: Callable[[], object] | None = None,
    ) -> Answer:
        port = port or self.dice.choice(self.ports)
        text = None if body is None else json.dumps(body)
        try:
            connection = self._connected(port)
        except OSError:
            answer = _nothing("refused", "not_written")
        else:
            try:
                assert connection.sock is not None
                connection.sock.settimeout(patience)
                connection.request(
                    method,
                    f"/agents/{quote(self.agent, safe='')}/{what}",
                    text,
                    {"Content-Type": "application/json", **headers} if text else headers,
                )
                if given_up is not None:
                    given_up()
                    self._close(connection, port, hard=self.dice.random() < 0.3)
                    answer = _nothing("given up", "unknown")
                else:
                    response = connection.getresponse()
                    document = json.loads(response.read())
                    answer = Answer(response.status, document)
                    if not self.keeps:
                        self._close(connection, port)
            except (OSError, HTTPException) as error:
                self._close(connection, port)
                answer = _nothing(type(error).__name__, "unknown")
        self.answers.append(answer)
        return answer

    def _connected(self, port: int) -> HTTPConnection:
        connection = self._connections.get(port)
        if connection is None or connection.sock is None:
            connection = HTTPConnection("127.0.0.1", port, timeout=CALL_SECONDS)
            connection.connect()
            self._connections[port] = connection
        return connection

    def _close(self, connection: HTTPConnection, port: int, *, hard: bool = False) -> None:
        if hard and connection.sock is not None:  # with a reset, not with an end
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        self._connections.pop(port, None)

    def close(self) -> None:
        for port, connection in list(self._connections.items()):
            self._close(connection, port)


@contextlib.contextmanager
def at_work(clients: Sequence[Client], work: Callable[[Client, threading.Event], None]) -> Iterator[threading.Event]:
    """Every client works in a thread of its own until the block ends or sets the event; what one raises fails the test."""
    stopping, errors = threading.Event(), []

    def main(client: Client) -> None:
        try:
            work(client, stopping)
        except BaseException:  # noqa: BLE001 - raised again below, as the test's
            errors.append(traceback.format_exc())
        finally:
            client.close()

    threads = [threading.Thread(target=main, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield stopping
    finally:
        stopping.set()
        for thread in threads:
            thread.join(2 * CALL_SECONDS)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)


def mixed(client: Client, stopping: threading.Event) -> None:
    """Own the agent; then events, batches and checkpoints, each until it is durable, and now and then another resume."""
    if not client.until_answered(client.resume, stopping).ok:
        return
    step = 0
    while not stopping.is_set():
        step += 1
        chance = client.dice.random()
        if chance < 0.5:
            identity = client.identity()
            answer = client.until_answered(lambda: client.event(identity), stopping)  # noqa: B023 - called at once
        elif chance < 0.65:
            identities = [client.identity() for _ in range(client.dice.randrange(2, 40))]
            answer = client.until_answered(lambda: client.events(identities), stopping)  # noqa: B023
        elif chance < 0.95:
            token, large = client.identity(), client.dice.random() < 0.1
            answer = client.until_answered(lambda: client.checkpoint(step, token, large=large), stopping)  # noqa: B023
        else:
            answer = client.until_answered(client.resume if client.dice.random() < 0.5 else client.state, stopping)
        assert answer.ok or stopping.is_set(), answer


def wait_answers(clients: Sequence[Client], count: int, seconds: float = 60.0) -> None:
    """Until each of them got so many more answers with 200."""
    goals = [sum(answer.ok for answer in client.answers) + count for client in clients]
    deadline = time.monotonic() + seconds
    while any(sum(a.ok for a in client.answers) < goal for client, goal in zip(clients, goals, strict=True)):
        assert time.monotonic() < deadline, [client.answers[-3:] for client in clients]
        time.sleep(0.01)
