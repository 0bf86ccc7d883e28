"""The floor nobody can beat: a blocking socket that sends one HPUB and reads its PubAck."""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

from skialith import _fastpath


class RawPublisher:
    """Speaks just enough of the NATS client protocol (docs.nats.io, "Client Protocol") to publish and be acknowledged."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 4222))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._line()
        connect = {
            "verbose": False,
            "headers": True,
            "no_responders": True,
            "protocol": 1,
            "lang": "bench",
            "version": "0",
        }
        self._socket.sendall(f"CONNECT {json.dumps(connect)}\r\nSUB _INBOX.bench 1\r\nPING\r\n".encode())
        while self._line() != b"PONG":
            pass

    def request(self, subject: str, payload: bytes) -> dict[str, object]:
        """One API request and its answer."""
        self._socket.sendall(_fastpath.pub(subject, "_INBOX.bench", payload))
        answer: dict[str, object] = json.loads(self._reply())
        return answer

    def append(self, subject: str, key: bytes, payload: bytes) -> bytes:
        """Publish one message and return its PubAck."""
        self._socket.sendall(_fastpath.hpub(subject, "_INBOX.bench", _fastpath.record_headers(key), payload))
        return self._reply()

    def _reply(self) -> bytes:
        while True:
            words = self._line().split()
            if words[0] == b"PING":
                self._socket.sendall(b"PONG\r\n")
            elif words[0] == b"MSG":
                return self._exactly(int(words[-1]) + 2)[:-2]

    def _line(self) -> bytes:
        while b"\r\n" not in self._buffer:
            self._buffer += self._socket.recv(65536)
        line, self._buffer = self._buffer.split(b"\r\n", 1)
        return line

    def _exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += self._socket.recv(65536)
        data, self._buffer = self._buffer[:count], self._buffer[count:]
        return data

    def close(self) -> None:
        self._socket.close()
