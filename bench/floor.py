"""The floor nobody can beat: a blocking socket that sends HPUB and reads the PubAck, with no client around it."""

from __future__ import annotations

import json
import os
import secrets
import socket
from urllib.parse import urlsplit

CHUNK = 256
"""Messages of one write when pipelining."""
WINDOW = 4096
"""Messages in flight when pipelining; over 10,000 the server begins to refuse."""


class RawPublisher:
    """Speaks just enough of the NATS client protocol (docs.nats.io, "Client Protocol") to publish and be acknowledged.

    One thread uses it. ``stream``: made with the settings that a Skialith log has, without its consumers.
    """

    def __init__(self, url: str, stream: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 4222))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._stream = stream
        self._inbox = f"_INBOX.{secrets.token_hex(8)}".encode()
        while b"\r\n" not in self._receive():
            pass
        self._buffer = b""
        connect = {
            "verbose": False,
            "headers": True,
            "no_responders": True,
            "protocol": 1,
            "lang": "bench",
            "version": "0",
        }
        self._socket.sendall(f"CONNECT {json.dumps(connect)}\r\nSUB {self._inbox.decode()} 1\r\nPING\r\n".encode())
        while b"PONG\r\n" not in self._buffer:
            self._receive()
        self._buffer = self._buffer.partition(b"PONG\r\n")[2]  # the server may have more to say of itself

    def request(self, subject: str, body: bytes) -> dict[str, object]:
        """One API request and its answer."""
        self._socket.sendall(b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), self._inbox, len(body), body))
        answer: dict[str, object] = json.loads(self._reply())
        return answer

    def make_stream(self, replicas: int = 1) -> None:
        """Raises ``AssertionError`` saying why the server does not make it."""
        settings = {
            "name": self._stream,
            "subjects": [f"{self._stream}.>"],
            "storage": "file",
            "discard": "new",
            "max_bytes": 2**30,
            "duplicate_window": 30_000_000_000,
            "allow_direct": True,
            "num_replicas": replicas,
        }
        answer = self.request(f"$JS.API.STREAM.CREATE.{self._stream}", json.dumps(settings).encode())
        assert "error" not in answer, answer

    def remove_stream(self) -> None:
        self.request(f"$JS.API.STREAM.DELETE.{self._stream}", b"")

    def append(self, body: bytes, headers: bytes = b"") -> bytes:
        """Publish one message with an id of its own and return its PubAck."""
        self._socket.sendall(self._frame(body, headers))
        ack = self._reply()
        assert b'"seq"' in ack, ack
        return ack

    def lease_headers(self) -> bytes:
        """What a fenced append carries: the last sequence of another subject, of which the server keeps watch."""
        subject = f"{self._stream}.lease"
        self._socket.sendall(b"PUB %b %b 1\r\nx\r\n" % (subject.encode(), self._inbox))
        seq = json.loads(self._reply())["seq"]
        name = b"Nats-Expected-Last-Subject-Sequence"
        return b"%b:%d\r\n%b-Subject:%b\r\n" % (name, seq, name, subject.encode())

    def chunks(self, body: bytes, count: int) -> list[bytes]:
        """``count`` messages, ready to be sent."""
        frames = [self._frame(body, b"") for _ in range(count)]
        return [b"".join(frames[first : first + CHUNK]) for first in range(0, count, CHUNK)]

    def append_chunks(self, chunks: list[bytes]) -> None:
        """Send what :meth:`chunks` made as fast as the server takes it, until the last PubAck."""
        sent = acked = 0
        rest = b""
        for chunk in [*chunks, b""]:
            sent += chunk.count(b"HPUB ")
            self._socket.sendall(chunk)
            while sent - acked > (WINDOW if chunk else 0):
                received = rest + self._socket.recv(1 << 20)
                assert b'"error"' not in received, received
                acked += received.count(b'"seq":')
                rest = received[-5:]

    def _frame(self, body: bytes, headers: bytes) -> bytes:
        block = b"NATS/1.0\r\nNats-Msg-Id:%b\r\n%b\r\n" % (os.urandom(16).hex().encode(), headers)
        size = len(block)
        return b"HPUB %b.a %b %d %d\r\n%b%b\r\n" % (
            self._stream.encode(), self._inbox, size, size + len(body), block, body,
        )  # fmt: skip

    def _reply(self) -> bytes:
        while True:
            head, found, rest = self._buffer.partition(b"\r\n")
            if found and head.startswith(b"MSG "):
                size = int(head.rsplit(b" ", 1)[1])
                if len(rest) >= size + 2:
                    self._buffer = rest[size + 2 :]
                    return rest[:size]
            elif found:
                self._buffer = rest
                if head == b"PING":
                    self._socket.sendall(b"PONG\r\n")
                continue
            self._receive()

    def _receive(self) -> bytes:
        received = self._socket.recv(65536)
        if not received:
            raise ConnectionError("the server closed the connection")
        self._buffer += received
        return self._buffer

    def close(self) -> None:
        self._socket.close()
