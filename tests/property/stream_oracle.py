"""What skialith.wal._wire must do with a server's bytes, said a second time in plain Python that shares no code with it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

NUMBER = re.compile(rb"0|[1-9][0-9]*")
PUBACK = re.compile(
    rb'\{"stream":"[^\x00-\x1f\x7f-\xff"\\]*"(?:,"domain":"[^\x00-\x1f\x7f-\xff"\\]*")?'
    rb', ?"seq":(0|[1-9][0-9]*)(,"duplicate": ?true)?\}'
)


def number(word: bytes, limit: int = 2**64) -> int | None:
    """A decimal number without sign or leading zeros, below the limit."""
    value = int(word) if NUMBER.fullmatch(word) and len(word) < 30 else limit
    return value if value < limit else None


def puback(data: bytes) -> tuple[int, bool] | None:
    found = PUBACK.fullmatch(data)
    seq = number(found[1]) if found else None
    return (seq, bool(found[2])) if found and seq else None


def headers(head: bytes) -> dict[str, str]:
    first, *lines = head.decode("utf-8", "replace").split("\r\n")
    _, *words = first.split(" ", 2)
    fields = [tuple(line.split(":", 1)) for line in lines if ":" in line]
    return dict(zip(("Status", "Description"), words, strict=False)) | {name: value.strip() for name, value in fields}


@dataclass
class Pull:
    token: int
    left: int


@dataclass
class Source:
    """A consumer as the wire sees it."""

    pulls: list[Pull] = field(default_factory=list)
    messages: list[tuple[Any, ...]] = field(default_factory=list)
    status: tuple[str, str] | None = None
    arrived: bool = False

    @property
    def expected(self) -> int:
        return sum(pull.left for pull in self.pulls)


@dataclass
class Routing:
    """Where the bytes of connection 1 go. ``waiting``: tokens of replies; ``single``: those that take one answer only."""

    inbox: bytes
    waiting: set[int]
    single: set[int]
    sources: dict[bytes, Source]
    longest_line: int
    longest_message: int
    rest: bytes = b""
    replies: list[tuple[int, dict[str, str] | None, bytes]] = field(default_factory=list)
    answers: dict[int, tuple[int, bool] | bytes] = field(default_factory=dict)
    broken: bool = False

    def take(self, data: bytes) -> None:
        """All bytes that ever came."""
        while data and not self.broken:
            end = data.find(b"\n", 0, self.longest_line) + 1
            if end == 0:
                self.broken = len(data) >= self.longest_line
                return
            line = data[:end]
            if not line.startswith((b"MSG ", b"HMSG ")):
                self.rest += line
                data = data[end:]
                continue
            parts = self._parts(line)
            if parts is None:
                self.broken = True
                return
            subject, reply, head, total = parts
            whole = end + total + 2
            if len(data) < whole:
                return
            if data[whole - 2 : whole] != b"\r\n":
                self.broken = True
                return
            if not self._message(subject, reply, data[end : end + head], data[end + head : whole - 2]):
                self.rest += data[:whole]
            data = data[whole:]

    def _parts(self, line: bytes) -> tuple[bytes, bytes, int, int] | None:
        verb, _, text = line.partition(b" ")
        if not text.endswith(b"\r\n"):
            return None
        words = [word for word in re.split(rb"[ \t]", text[:-2]) if word]
        sizes = 2 if verb == b"HMSG" else 1
        if len(words) - sizes not in (2, 3):
            return None
        found = [number(word) for word in words[-sizes:]]
        head, total = found[0] if sizes == 2 else 0, found[-1]
        if head is None or total is None or head > total or total > self.longest_message:
            return None
        return words[0], words[2] if len(words) - sizes == 3 else b"", head, total

    def _message(self, subject: bytes, reply: bytes, head: bytes, data: bytes) -> bool:
        if subject.startswith(self.inbox + b".") and len(subject) > len(self.inbox) + 1:
            token = number(subject[len(self.inbox) + 1 :])
            if token is not None:
                self._reply(token, head, data)
            return True
        return self._delivery(subject, reply, data)

    def _reply(self, token: int, head: bytes, data: bytes) -> None:
        for source in self.sources.values():
            for pull in source.pulls:
                if pull.token == token:
                    self._status(source, pull, headers(head) if head else {})
                    return
        if token not in self.waiting:
            return
        if token in self.single:
            self.waiting.discard(token)
            self.answers[token] = (None if head else puback(data)) or data
        else:
            self.replies.append((token, headers(head) if head else None, data))

    def _status(self, source: Source, pull: Pull, fields: dict[str, str]) -> None:
        code = fields.get("Status", "")
        if code not in ("", "100"):
            source.pulls.remove(pull)
            source.status = code, fields.get("Description", "")
            source.arrived = True

    def _delivery(self, subject: bytes, reply: bytes, data: bytes) -> bool:
        tokens = reply.split(b".")
        if tokens[:2] != [b"$JS", b"ACK"] or not (len(tokens) == 9 or len(tokens) >= 11):
            return False
        first = 4 if len(tokens) == 9 else 6
        numbers = [number(token) for token in tokens[first : first + 5]]
        source = self.sources.get(b".".join(tokens[first - 2 : first]))
        if source is None or None in numbers:
            return False
        delivered, seq, _, time_ns, _ = numbers
        text = subject.decode("utf-8", "replace"), reply.decode("utf-8", "replace")
        source.messages.append((text[0], data, (time_ns, seq), text[1], 1, delivered))
        source.arrived = True
        if source.pulls:
            source.pulls[0].left -= 1
            if source.pulls[0].left == 0:
                source.pulls.pop(0)
        return True
