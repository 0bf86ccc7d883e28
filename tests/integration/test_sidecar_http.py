"""HTTP as unusual clients speak it: old, pipelined, upgrading, hesitating, half open; and ids of every kind of character."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.fixtures.nats import wait_until
from tests.fixtures.sidecar import Sidecar, sidecar

UPGRADE = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
"""What java.net.http.HttpClient sends with its first request to a host."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar(
        cwd=tmp_path_factory.mktemp("sidecar"), settings={"SKIALITH_WAL_BYTES": str(256 * 1024 * 1024)}
    ) as made:
        yield made


class Raw:
    """A connection on which answers are read one by one."""

    def __init__(self, made: Sidecar) -> None:
        self.socket = socket.create_connection(("127.0.0.1", made.port), timeout=20)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, method: str = "POST") -> tuple[int, dict[str, str], Any]:
        """Status, headers and document of the next answer."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip().decode().lower():
            name, _, value = line.partition(": ")
            headers[name] = value
        size = 0 if method == "HEAD" else int(headers.get("content-length", "0"))
        text = self._file.read(size)
        return status, headers, json.loads(text) if text else None

    def at_end(self) -> bool:
        return self._file.read(1) == b""


def request(method: str, path: str, body: Any = None, *headers: str, version: str = "1.1") -> bytes:
    text = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if text:
        lines += [f"Content-Length: {len(text)}", "Content-Type: application/json"]
    return "\r\n".join([*lines, "", ""]).encode() + text


def event(name: str, payload: Any = 1) -> dict[str, Any]:
    return {"event_id": name, "payload": payload}


def event_ids(made: Sidecar, agent: str) -> list[str]:
    page = made.client().get(f"/agents/{quote(agent, safe='')}/history", params={"limit": 1000}).json()
    return [each["event_id"] for each in page["events"]]


def test_http_1_0(served: Sidecar) -> None:
    with Raw(served) as raw:
        raw.send(request("POST", "/agents/old/events", event("e"), version="1.0"))
        status, headers, _ = raw.read()
        assert (status, headers["connection"]) == (200, "close")
        assert raw.at_end()


def test_head_is_get_without_the_body(served: Sidecar) -> None:
    with Raw(served) as raw:
        raw.send(request("HEAD", "/agents/head/state") + request("GET", "/agents/head/state"))
        status, headers, _ = raw.read("HEAD")
        again, same, document = raw.read()
        assert status == again == 200
        assert headers["content-length"] == same["content-length"] == str(len(json.dumps(document)))


@pytest.mark.parametrize("size", [1, 200_000])
def test_pipelined_requests_are_answered_in_their_order(served: Sidecar, size: int) -> None:
    agent, names = f"pipelined-{size}", [f"e{n}" for n in range(20)]
    with Raw(served) as raw:
        raw.send(b"".join(request("POST", f"/agents/{agent}/events", event(name, "~" * size)) for name in names))
        answers = [raw.read() for _ in names]
    assert [status for status, _, _ in answers] == [200] * len(names)
    sequences = [document["seq"] for _, _, document in answers]
    assert sequences == sorted(sequences)
    assert event_ids(served, agent) == names


def test_a_body_that_waits_to_be_asked_for(served: Sidecar) -> None:
    head, _, body = request("POST", "/agents/waits/events", event("e"), "Expect: 100-continue").partition(b"\r\n\r\n")
    with Raw(served) as raw:
        raw.send(head + b"\r\n\r\n")
        assert raw.read()[0] == 100
        raw.send(body)
        assert raw.read()[0] == 200


def test_one_that_is_refused_instead_ends_the_connection(served: Sidecar) -> None:
    """Else nobody knew whether what comes next is that body."""
    with Raw(served) as raw:
        raw.send(
            b"POST /agents/waits/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
            b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n"
        )
        status, headers, _ = raw.read()
        assert (status, headers["connection"]) == (415, "close")
        assert raw.at_end()


@pytest.mark.parametrize("size", [1, 300_000])
@pytest.mark.parametrize("apart", [False, True])
def test_a_client_that_offers_http_2_is_answered_all_the_same(served: Sidecar, size: int, apart: bool) -> None:
    agent = f"offers-{size}-{apart}"
    whole = request("POST", f"/agents/{agent}/events", event("e1", "~" * size), *UPGRADE)
    at = whole.index(b"\r\n\r\n") + 4 if apart else len(whole)
    with Raw(served) as raw:
        raw.send(whole[:at])
        if apart:
            # Whatever it does with the head alone, it has done it when it answers somebody else.
            assert served.client().get("/health").status_code == 200
            raw.send(whole[at:])
        assert raw.read()[0] == 200
        raw.send(request("POST", f"/agents/{agent}/events", event("e2")))
        assert raw.read()[0] == 200
        raw.send(request("POST", f"/agents/{agent}/events", event("e3"), *UPGRADE) * 500)
        answers = [raw.read() for _ in range(500)]
        assert {status for status, _, _ in answers} == {200}
        for more in ("", ", close"):
            raw.send(request("GET", "/health", None, "Upgrade: websocket", f"Connection: Upgrade{more}"))
            assert raw.read()[2]["status"] == "ok"
        assert raw.at_end()
    assert event_ids(served, agent) == ["e1", "e2", "e3"]


def test_connections_that_are_given_up_leave_nothing_behind(served: Sidecar) -> None:
    files = len(os.listdir(f"/proc/{served.process.pid}/fd"))
    whole = request("POST", "/agents/given-up/events", event("e"))
    with served.client(timeout=20.0) as client:
        for n in range(200):
            with Raw(served) as raw:
                raw.send(whole[: n % len(whole)])
        assert client.get("/health").status_code == 200
    wait_until(lambda: len(os.listdir(f"/proc/{served.process.pid}/fd")) <= files + 2, 20, "they are closed")


IDS = [
    *(chr(code) for code in (*range(33), *range(127, 161), 0x2028, 0xD7FF, 0xE000, 0xFFFE, 0xFFFF, 0x10FFFF)),
    *(character * 255 for character in "aé😀/"),
    *(
        "..",
        ".",
        "%",
        "%2F",
        "%00",
        "a/b",
        "a//b",
        "/",
        "?",
        "#",
        "\\",
        "~",
        ">",
        "*",
        "a.b",
        "a%20b",
        "nul\0in",
        "a b ",
    ),
]


def test_ids_of_every_kind(served: Sidecar) -> None:
    """Each is an agent of its own, found again by its id."""
    with Raw(served) as raw:
        for name in IDS:
            path = f"/agents/{''.join(f'%{byte:02X}' for byte in name.encode())}"
            raw.send(request("POST", f"{path}/events", event(name, name)))
            status, _, document = raw.read()
            assert status == 200, (name, document)
            raw.send(request("GET", f"{path}/history"))
            _, _, document = raw.read()
            assert [(each["event_id"], each["payload"]) for each in document["events"]] == [(name, name)]
