"""Who may come into the sidecar and with how much, over real connections: token, Host, Origin, and the limits of requests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from skialith.sidecar.config import HEAD_BYTES

from ..fixtures.nats import wait_until
from ..fixtures.sidecar import Sidecar, sidecar

TOKEN = "correct-horse-battery-staple"
LIMIT = 64 * 1024
SECONDS = 2.0


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """Without a token, and with little time and room for bodies."""
    limits = {"BODY_SECONDS": SECONDS, "HEAD_SECONDS": 0.5, "BODIES_BYTES": 4 * LIMIT}
    folder = tmp_path_factory.mktemp("plain")
    with sidecar("--body-bytes", str(LIMIT), cwd=folder, limits=limits) as made:
        yield made


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    """With a token, and one origin whose pages may call."""
    folder = tmp_path_factory.mktemp("guarded")
    with sidecar("--cors-origin", "https://agents.example/", cwd=folder, token=TOKEN) as made:
        yield made


def event(name: str = "e", **payload: Any) -> dict[str, Any]:
    return {"event_id": name, "payload": payload}


def refused(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that an answer is this problem, and return it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["type"] == f"urn:skialith:problem:{kind}"
    assert document["status"] == status
    assert document["outcome"] == "not_written"
    return document


class Raw:
    """A bare connection, for what no HTTP client sends."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *lines: str, body: bytes = b"") -> None:
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def read_until(self, end: bytes) -> None:
        received = b""
        while not received.endswith(end):
            received += self.socket.recv(65536)

    def read(self) -> httpx.Response:
        """The answer up to the end of the connection."""
        received = b""
        while piece := self.socket.recv(65536):
            received += piece
        head, _, body = received.partition(b"\r\n\r\n")
        status, *fields = head.decode().split("\r\n")
        headers = [tuple(field.split(": ", 1)) for field in fields]
        return httpx.Response(int(status.split()[1]), headers=headers, content=body)  # type: ignore[arg-type]


POST = ("POST /agents/raw/events HTTP/1.1", "Host: localhost", "Content-Type: application/json")


# ---- the token


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
    ],
)
def test_without_the_token_nobody_comes_in(guarded: Sidecar, headers: dict[str, str]) -> None:
    client = guarded.client(headers=headers)
    for method, path in (
        ("GET", "/agents/a/state"),
        ("POST", "/agents/a/events"),
        ("GET", "/metrics"),
        ("GET", "/nowhere"),
    ):
        answer = client.request(method, path, json=event() if method == "POST" else None)
        refused(answer, 401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")


def test_the_token_lets_in_whatever_the_case_of_the_scheme(guarded: Sidecar) -> None:
    for scheme in ("Bearer", "bearer"):
        answer = guarded.client(headers={"Authorization": f"{scheme} {TOKEN}"}).get("/agents/a/state")
        assert answer.status_code == 200


def test_probes_and_the_document_need_no_token_but_say_less(guarded: Sidecar) -> None:
    stranger, friend = guarded.client(headers={}), guarded.client()
    assert stranger.get("/health").json()["status"] == "ok"
    assert stranger.get("/openapi.json").json()["info"]["title"] == "Skialith"
    assert {check["detail"] for check in stranger.get("/ready").json()["checks"]} == {"ask with the token for more"}
    assert any("used" in check["detail"] for check in friend.get("/ready").json()["checks"])


@pytest.mark.parametrize("path", ["/%68ealth", "/health/", "//health", "/health/../metrics", "/health%2F..%2Fmetrics"])
def test_no_spelling_of_an_open_path_opens_another(guarded: Sidecar, path: str) -> None:
    with Raw(guarded.port) as raw:
        raw.send(f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close")
        refused(raw.read(), 401, "unauthorized")


# ---- Host and Origin


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil", ""]
)
def test_without_a_token_a_foreign_host_is_refused(plain: Sidecar, host: str) -> None:
    refused(plain.client().get("/health", headers={"Host": host}), 403, "forbidden")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "127.9.9.9", "[::1]:7420", "agents.localhost"]
)
def test_the_names_of_this_machine_are_not(plain: Sidecar, host: str) -> None:
    assert plain.client().get("/health", headers={"Host": host}).status_code == 200


def test_with_a_token_the_host_does_not_matter(guarded: Sidecar) -> None:
    assert guarded.client().get("/agents/a/state", headers={"Host": "agents.internal"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost", "https://localhost:7420", ""])
def test_a_page_of_another_origin_is_refused(plain: Sidecar, origin: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:7420"}
    refused(plain.client().post("/agents/a/events", json=event(), headers=headers), 403, "forbidden")
    refused(plain.client().options("/agents/a/events", headers=headers), 403, "forbidden")


def test_the_same_origin_is_not(plain: Sidecar) -> None:
    headers = {"Origin": "http://localhost:7420", "Host": "localhost:7420"}
    assert plain.client().post("/agents/a/events", json=event(), headers=headers).status_code == 200


def test_without_cors_no_answer_names_an_origin(plain: Sidecar) -> None:
    headers = {"Origin": "http://localhost:7420", "Host": "localhost:7420"}
    answer = plain.client().get("/health", headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_lets_the_configured_origin_in_and_no_other(guarded: Sidecar) -> None:
    client = guarded.client()
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, skialith-lease"}
    mine = {"Origin": "https://agents.example"}
    preflight = guarded.client(headers={}).options("/agents/a/events", headers={**mine, **asked})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://agents.example"
    answer = client.post("/agents/a/events", json=event(), headers=mine)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://agents.example"
    assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
    # A page must be able to read why it was refused.
    problem = guarded.client(headers=mine).get("/agents/a/state")
    refused(problem, 401, "unauthorized")
    assert problem.headers["access-control-allow-origin"] == "https://agents.example"

    other = {"Origin": "https://evil.example"}
    assert guarded.client(headers={}).options("/agents/a/events", headers={**other, **asked}).status_code == 400
    answer = client.post("/agents/a/events", json=event(), headers=other)
    refused(answer, 403, "forbidden")
    assert "access-control-allow-origin" not in answer.headers


# ---- bodies


def test_a_body_of_exactly_the_limit_passes_and_one_byte_more_does_not(plain: Sidecar) -> None:
    def sent(size: int) -> httpx.Response:
        body = json.dumps(event("whole", text=""))
        body = json.dumps(event("whole", text="x" * (size - len(body))))
        assert len(body) == size
        headers = {"Content-Type": "application/json"}
        return plain.client().post("/agents/limit/events", content=body, headers=headers)

    assert sent(LIMIT).status_code == 200
    document = refused(sent(LIMIT + 1), 413, "too-large")
    assert (document["limit"], document["size"]) == (LIMIT, LIMIT + 1)


def test_a_declared_size_over_the_limit_is_refused_before_a_byte_of_it(plain: Sidecar) -> None:
    with Raw(plain.port) as raw:
        raw.send(*POST, f"Content-Length: {10 * 1024**3}", "Expect: 100-continue", "Connection: close")
        assert refused(raw.read(), 413, "too-large")["limit"] == LIMIT


def test_a_chunked_body_is_counted_while_it_comes(plain: Sidecar) -> None:
    client, headers = plain.client(), {"Content-Type": "application/json"}

    def chunks(size: int) -> Iterator[bytes]:
        body = json.dumps(event("chunked", text="x" * size)).encode()
        for at in range(0, len(body), 4096):
            yield body[at : at + 4096]

    assert client.post("/agents/limit/events", content=chunks(LIMIT // 2), headers=headers).status_code == 200
    answer = client.post("/agents/limit/events", content=chunks(LIMIT), headers=headers)
    assert refused(answer, 413, "too-large")["limit"] == LIMIT
    assert client.get("/health").status_code == 200


def test_an_endless_chunked_body_is_cut(plain: Sidecar) -> None:
    with Raw(plain.port) as raw:
        raw.send(*POST, "Transfer-Encoding: chunked")
        sent = 0
        with pytest.raises(OSError):  # noqa: PT011 - reset or broken pipe
            for _ in range(10_000):
                raw.socket.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                sent += 4096
        assert sent < 10_000 * 4096


@pytest.mark.parametrize("declared", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_arrive_is_given_up(plain: Sidecar, declared: str) -> None:
    with Raw(plain.port) as raw:
        began = time.monotonic()
        raw.send(*POST, declared)
        document = refused(raw.read(), 408, "body-timeout")
        assert document["retryable"]
        assert time.monotonic() - began >= SECONDS


def test_trickling_does_not_buy_time(plain: Sidecar) -> None:
    with Raw(plain.port) as raw:
        raw.send(*POST, "Content-Length: 60000")

        def trickle() -> None:
            try:
                for _ in range(1000):
                    raw.socket.sendall(b" ")
                    time.sleep(0.02)  # the pace of a slow client
            except OSError:
                return

        thread = threading.Thread(target=trickle)
        thread.start()
        assert raw.read().status_code == 408
        raw.socket.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_client_that_leaves_in_its_body_harms_nobody(tmp_path: Path) -> None:
    with sidecar("--body-bytes", str(LIMIT), cwd=tmp_path, limits={"BODIES_BYTES": 4 * LIMIT}) as made:
        for _ in range(3 * 4 * 2):  # more than fit at once, if they stayed counted
            with Raw(made.port) as raw:
                raw.send(*POST, f"Content-Length: {LIMIT // 2}", body=b"{")
        client = made.client()
        wait_until(lambda: client.post("/agents/a/events", json=event()).status_code == 200, 10, "there is room again")


def test_bodies_that_are_too_much_together_are_told_to_come_back(plain: Sidecar) -> None:
    waiting = [Raw(plain.port) for _ in range(4)]
    try:
        for raw in waiting:
            raw.send("GET /health HTTP/1.1", "Host: localhost")
            raw.read_until(b"}")  # it is accepted now, so what it sends next comes before what the client sends
        for raw in waiting:
            raw.send(*POST, f"Content-Length: {LIMIT}", body=b"{")
        client = plain.client()
        answers: list[httpx.Response] = []

        def overloaded() -> bool:
            answers.append(client.post("/agents/a/events", json=event()))
            return answers[-1].status_code == 503

        wait_until(overloaded, SECONDS, "the room for bodies is full")
        assert refused(answers[-1], 503, "overloaded")["retryable"]
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert client.get("/agents/a/state").status_code == 200
    finally:
        assert [raw.read().status_code for raw in waiting] == [408] * 4
        for raw in waiting:
            raw.socket.close()
    assert client.post("/agents/a/events", json=event()).status_code == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"]
)
def test_a_body_that_is_not_json_is_refused(plain: Sidecar, kind: str) -> None:
    body = json.dumps(event())
    answer = plain.client().post("/agents/a/events", content=body, headers={"Content-Type": kind})
    refused(answer, 415, "not-json")


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_json(plain: Sidecar, kind: str) -> None:
    body = json.dumps(event())
    assert plain.client().post("/agents/a/events", content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_post_without_a_body_needs_no_content_type(plain: Sidecar) -> None:
    assert plain.client().post("/agents/a/resume").status_code == 200


# ---- before a request is one


def test_what_is_not_http_is_told_so(plain: Sidecar) -> None:
    with Raw(plain.port) as raw:
        raw.send("nonsense")
        refused(raw.read(), 400, "invalid")


@pytest.mark.parametrize("length", ["-1", "x", "1\r\nContent-Length: 2"])
def test_a_bad_content_length_is_told_so(plain: Sidecar, length: str) -> None:
    with Raw(plain.port) as raw:
        raw.send(*POST, f"Content-Length: {length}")
        refused(raw.read(), 400, "invalid")


@pytest.mark.parametrize("shape", ["one", "many", "path"])
def test_headers_have_a_limit(plain: Sidecar, shape: str) -> None:
    size = HEAD_BYTES + 1000  # not much more: what nobody reads makes the answer be lost
    lines = {
        "one": ["GET /health HTTP/1.1", "Host: localhost", "X: " + "x" * size],
        "many": ["GET /health HTTP/1.1", "Host: localhost", *[f"X-{n}: {'x' * 100}" for n in range(size // 100)]],
        "path": ["GET /" + "x" * size],
    }[shape]
    with Raw(plain.port) as raw:
        raw.socket.sendall("\r\n".join(lines).encode())
        assert raw.read().status_code == 431


def test_a_connection_that_asks_nothing_is_closed(plain: Sidecar) -> None:
    for beginning in ("", "GET /health HTTP/1.1\r\nHost:"):
        with Raw(plain.port) as raw:
            raw.socket.sendall(beginning.encode())
            assert raw.socket.recv(1) == b""


def test_too_many_connections_are_told_to_come_back(tmp_path: Path) -> None:
    with sidecar(cwd=tmp_path, limits={"CONCURRENT_REQUESTS": 5}) as crowded:
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                raw = stack.enter_context(Raw(crowded.port))
                raw.send("GET /health HTTP/1.1", "Host: localhost")
                assert raw.socket.recv(4096).startswith(b"HTTP/1.1 200")
            for _ in range(2):
                raw = stack.enter_context(Raw(crowded.port))
                raw.send("GET /health HTTP/1.1", "Host: localhost")
                answer = raw.read()
                assert refused(answer, 503, "overloaded")["retryable"]
                assert answer.headers["retry-after"] == "1"
        client = crowded.client(timeout=5)
        wait_until(lambda: client.get("/health").status_code == 200, 10, "there is room again")


# ---- paths and methods


def test_an_id_may_hold_anything(plain: Sidecar) -> None:
    client = plain.client()
    for encoded, agent_id in (
        ("a%2Fb", "a/b"),
        ("%2e%2E", ".."),
        ("%25", "%"),
        ("%C3%A4%3F%23", "ä?#"),
        ("%E2%80%8B", "\u200b"),
    ):
        with Raw(plain.port) as raw:  # httpx would tidy the path up
            raw.send(f"GET /agents/{encoded}/state HTTP/1.1", "Host: localhost", "Connection: close")
            assert raw.read().json()["agent_id"] == agent_id
    refused(client.get("/agents/a/b/state"), 404, "not-found")


def test_what_is_not_there_is_a_problem(plain: Sidecar) -> None:
    client = plain.client()
    for path in ("/", "/nowhere", "/health/", "/agents/a/events/"):
        refused(client.get(path), 404, "not-found")
    answer = client.put("/agents/a/checkpoint")
    refused(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "POST"
    answer = client.put("/dead-letters/writer/00")
    refused(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "DELETE, GET"
    refused(client.options("/health"), 405, "method-not-allowed")


def test_head_is_get_without_a_body(plain: Sidecar) -> None:
    client = plain.client()
    for path in ("/health", "/ready", "/agents/head/state"):
        answer, whole = client.head(path), client.get(path)
        assert answer.status_code == whole.status_code == 200
        assert answer.content == b""
        assert answer.headers["content-type"] == whole.headers["content-type"]
        assert int(answer.headers["content-length"]) > 0
    assert client.head("/agents/a/events").status_code == 405
