"""What chaos children write down outside of Skialith, one line per fact, so that it survives their SIGKILL."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ormsgpack

from skialith.errors import BatchFailed, RecordsLost, SkialithError

ROUNDS = float(os.environ.get("SKIALITH_CHAOS_ROUNDS", "1"))
"""How many times longer than in the short run everything goes on."""
SUFFIX = ".evidence"
APPENDS = ("event", "events", "checkpoint")
"""The verbs that append."""


def digest(value: Any) -> str:
    """A payload's hash: equal for payloads that are equal."""
    return hashlib.blake2b(ormsgpack.packb(value, option=ormsgpack.OPT_SORT_KEYS), digest_size=12).hexdigest()


def payload(identity: str, size: int = 0) -> dict[str, Any]:
    """The payload that belongs to an id, the same in every process; ``size`` adds that many incompressible bytes."""
    dice = random.Random(identity)
    value: dict[str, Any] = {
        "kind": dice.choice(["thought", "tool_call", "observation", "note"]),
        "id": identity,
        "text": "~" * dice.randrange(200),
        "numbers": [dice.random(), dice.randrange(2**40)],
    }
    if size:
        value["blob"] = dice.randbytes(size)
    return value


class Notebook:
    """One child's file. Every line is one ``write`` to a descriptor opened with O_APPEND; nothing is buffered."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = f"{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(folder / f"{self.name}{SUFFIX}", flags, 0o600)
        self._numbers = itertools.count(1)

    def line(self, op: str, **facts: Any) -> None:
        text = json.dumps({"op": op, "at": time.monotonic_ns(), **facts}, ensure_ascii=True) + "\n"
        os.write(self._file, text.encode("ascii"))

    def close(self) -> None:
        """Nothing more is written down."""
        os.close(self._file)

    def intend(
        self, verb: str, agent: str, timeout: float, items: Iterable[tuple[str, Any]] = (), lane: str = ""
    ) -> int:
        """Before a call: what it is about to do within how many seconds, items as (id, payload). Gives the call's number.

        ``lane``: calls of one agent in the same lane keep their order, though one begins before the other is over.
        """
        number = next(self._numbers)
        digests = [[key, digest(value)] for key, value in items]
        self.line("call", n=number, verb=verb, agent=agent, timeout=timeout, items=digests, lane=lane)
        return number

    def done(self, number: int, acks: Iterable[Any] = (), **result: Any) -> None:
        """After a call that returned."""
        self.line("done", n=number, acks=[[ack.seq, ack.duplicate] for ack in acks], **result)

    def failed(self, number: int, error: SkialithError) -> None:
        """After a call that raised."""
        acks = error.acks if isinstance(error, BatchFailed) else []
        self.line(
            "fail",
            n=number,
            acks=[[ack.seq, ack.duplicate] for ack in acks],
            error=type(error).__name__,
            cause=type(error.__cause__).__name__,
            outcome=error.outcome,
            retryable=error.retryable,
            text=str(error)[:300],
            lost=error.sequences if isinstance(error, RecordsLost) else [],
        )

    def interrupted(self, number: int) -> None:
        """After a call that ended because something else was raised inside it, such as Ctrl-C."""
        self.line("fail", n=number, acks=[], error="Interrupted", cause="", outcome="unknown", retryable=True, text="")


@dataclass(slots=True)
class Call:
    """One call of a child. Times are CLOCK_MONOTONIC nanoseconds, which all processes share; ``ended`` 0: it never did.

    ``items``: (id, payload hash) of each record. ``acks``: (seq, duplicate) of the first records, those that are durable.
    ``outcome``: of the first record without an ack; empty if there is none, ``"killed"`` if the call never ended.
    """

    child: str
    verb: str
    agent: str
    items: list[tuple[str, str]]
    timeout: float
    began: int
    ended: int = 0
    acks: list[tuple[int, bool]] = field(default_factory=list)
    error: str = ""
    text: str = ""
    outcome: str = "killed"
    lane: str = ""
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def acknowledged(self) -> list[tuple[str, str]]:
        """The items that have a PubAck."""
        return self.items[: len(self.acks)]

    @property
    def unacknowledged(self) -> list[tuple[str, str]]:
        """The items that have none (that the caller knows of)."""
        return self.items[len(self.acks) :]

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9 if self.ended else 0.0


@dataclass(slots=True)
class Evidence:
    """All that the children wrote down."""

    calls: list[Call] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    def of(self, *verbs: str) -> Iterator[Call]:
        return (call for call in self.calls if call.verb in verbs)

    def errors(self, *verbs: str) -> set[str]:
        """Names of all errors that calls raised, those of the given verbs."""
        return {call.error for call in self.calls if call.error and call.verb in verbs}


def read(folder: Path) -> Evidence:
    """The evidence of every child that wrote into ``folder``, calls in the order they began."""
    evidence = Evidence()
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        _read_file(file, evidence)
    evidence.calls.sort(key=lambda call: call.began)
    return evidence


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of one file; a last one that was cut by a kill is no evidence."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def _read_file(file: Path, evidence: Evidence) -> None:
    child = file.name.removesuffix(SUFFIX)
    calls: dict[int, Call] = {}
    for line in lines(file):
        if line["op"] == "call":
            items = [(key, value) for key, value in line["items"]]
            calls[line["n"]] = Call(child, line["verb"], line["agent"], items, line["timeout"], line["at"])
            calls[line["n"]].lane = line.get("lane", "")
        elif line["op"] == "note":
            evidence.notes.append({**line, "child": child})
        else:
            call = calls[line["n"]]
            call.ended = line["at"]
            call.acks = [(seq, duplicate) for seq, duplicate in line["acks"]]
            call.error, call.text = line.get("error", ""), line.get("text", "")
            call.outcome = line.get("outcome", "")
            call.result = line
    evidence.calls.extend(calls.values())
